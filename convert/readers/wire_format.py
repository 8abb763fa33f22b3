"""The wire format of protocol buffers: the fields of a message, read in place.

The protobuf library copies a message and makes objects of all its parts, of which two bytes of a
file can become a hundred in memory. Here, a field is a view of the file, and is read when asked
for; the fields that are passed on the way are counted, because a file may consist of nothing else.
"""

from collections.abc import Iterator

import numpy as np

_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}  # the kinds of fixed size -> bytes
_LONGEST = 10  # bytes of a varint
_BLOCK = 1 << 20  # bytes of integers that are decoded at a time


class Limit:
    """The number of fields that may still be read in the messages of a file."""

    def __init__(self, fields: int):
        self._fields = self._left = fields

    def count(self) -> None:
        """Counts a field.

        Raises:
          ValueError: it is one too many.
        """
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more than {self._fields:,} fields")


class Message:
    """A message in a file: a view of its bytes, whose fields are known by their numbers."""

    def __init__(self, content: memoryview, limit: Limit):
        """Reads nothing yet.

        Args:
          content: the bytes of the message.
          limit: that of all messages in the file.
        """
        self.content = content
        self._limit = limit

    def fields(self) -> Iterator[tuple[int, int | memoryview]]:
        """Yields the number and the value of each field, in the order of the file.

        The value of a varint is an int, not negative; that of any other field is a view of its
        bytes.

        Raises:
          ValueError: the bytes are not a message, or the limit is reached.
        """
        place = 0
        while place < len(self.content):
            self._limit.count()
            key, place = _varint(self.content, place)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, place = _varint(self.content, place)
                yield number, value
                continue
            if kind == _DELIMITED:
                size, place = _varint(self.content, place)
            elif kind in _FIXED:
                size = _FIXED[kind]
            else:
                raise ValueError(f"a field of the unknown kind {kind}")
            if size > len(self.content) - place:
                raise ValueError("a field ends beyond its message")
            yield number, self.content[place : place + size]
            place += size

    def views(self, number: int) -> Iterator[memoryview]:
        """Yields the values of the fields of a number that are not varints."""
        for found, value in self.fields():
            if found == number and isinstance(value, memoryview):
                yield value

    def view(self, number: int) -> memoryview:
        """Returns the value of a field that is not a varint; an empty one where it is not there."""
        last = memoryview(b"")  # of several, the last one counts
        for value in self.views(number):
            last = value
        return last

    def messages(self, number: int) -> Iterator["Message"]:
        """Yields the messages that are the fields of a number."""
        for value in self.views(number):
            yield Message(value, self._limit)

    def message(self, number: int) -> "Message":
        """Returns the message that is a field; an empty one where it is not there."""
        return Message(self.view(number), self._limit)

    def text(self, number: int) -> str:
        """Returns a string; "" where it is not there."""
        return bytes(self.view(number)).decode()

    def integers(self, number: int, dtype: type[np.integer] = np.int64) -> np.ndarray:
        """Returns the values of a field of integers, packed or not.

        Args:
          number: the field's.
          dtype: of the result, to whose bits the integers are cut off. Negative ones are written in
            two's complement of 64 bits.

        Raises:
          ValueError: as `fields`.
        """
        found: list[np.ndarray] = []
        for other, value in self.fields():
            if other != number:
                continue
            if isinstance(value, int):
                value %= 1 << 64
                found.append(np.array([value], np.uint64).astype(dtype))
            else:
                found += (block.astype(dtype) for block in _unpacked(value))
        return np.concatenate(found) if found else np.zeros(0, dtype)


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """Returns the varint at a place, and the place after it."""
    value = 0
    for position, byte in enumerate(content[place : place + _LONGEST]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, place + position + 1
    raise ValueError("a number does not end")


def _unpacked(content: memoryview) -> Iterator[np.ndarray]:
    """Yields the varints that follow each other, uint64, a block at a time."""
    septets = np.frombuffer(content, np.uint8)
    while len(septets):
        block = septets[:_BLOCK]
        (ends,) = np.nonzero(block < 0x80)
        sizes = np.diff(ends, prepend=-1)
        if not len(ends) or sizes.max() > _LONGEST:
            raise ValueError("a number does not end")
        values = np.zeros(len(ends), np.uint64)
        for position in range(sizes.max()):
            longer = sizes > position
            septet = block[ends[longer] - sizes[longer] + 1 + position] & 0x7F
            values[longer] |= septet.astype(np.uint64) << np.uint64(7 * position)
        yield values
        septets = septets[ends[-1] + 1 :]
