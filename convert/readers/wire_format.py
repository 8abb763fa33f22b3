"""The wire format of protocol buffers: the fields of a message, read in place.

The protobuf library copies a message and makes objects of all its parts, of which two bytes of a
file can become a hundred in memory. Here, a field is a view of the file, and is read when asked
for.
"""

from collections.abc import Iterator

_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}  # the kinds of fixed size -> bytes
_LONGEST = 10  # bytes of a varint


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields the number and the value of each field of a message, in its order.

    The value of a varint is an int, not negative; that of any other field is a view of its bytes.

    Raises:
      ValueError: the bytes are not a message.
    """
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == _DELIMITED:
            size, place = _varint(message, place)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if size > len(message) - place:
            raise ValueError("a field ends beyond its message")
        yield number, message[place : place + size]
        place += size


def views(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yields the values of the fields of a number that are not varints."""
    for found, value in fields(message):
        if found == number and isinstance(value, memoryview):
            yield value


def view(message: memoryview, number: int) -> memoryview:
    """Returns the value of a field that is not a varint; an empty one where it is not there."""
    last = memoryview(b"")  # of several, the last one counts
    for value in views(message, number):
        last = value
    return last


def integers(message: memoryview, number: int) -> list[int]:
    """Returns the values of a field of signed integers, packed or not."""
    found: list[int] = []
    for other, value in fields(message):
        if other != number:
            continue
        if isinstance(value, int):
            found.append(value)
            continue
        place = 0
        while place < len(value):
            integer, place = _varint(value, place)
            found.append(integer)
    # Negative ones are written in two's complement of 64 bits.
    return [integer - (1 << 64) if integer >> 63 else integer for integer in found]


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Returns the varint at a place, and the place after it."""
    value = 0
    for position, byte in enumerate(message[place : place + _LONGEST]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, place + position + 1
    raise ValueError("a number does not end")
