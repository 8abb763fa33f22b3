"""Random damage to the bytes of a file."""

import io
import random
import tarfile
import zipfile


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Returns a file's content with one kind of damage, at the places that `chance` chooses.

    Of an archive, either the file itself is damaged, which its checksums tell, or one of its
    members before it is packed again, which they do not.
    """
    if chance.random() < 0.6:
        if content.startswith(b"PK"):
            return _repacked_zip(content, chance)
        if content.startswith(b"\x1f\x8b"):
            return _repacked_tar(content, chance)
    return _spoilt(content, chance)


def _spoilt(content: bytes, chance: random.Random) -> bytes:
    return chance.choice(_KINDS)(bytearray(content), chance)


def _flipped(content: bytearray, chance: random.Random) -> bytes:
    """Flips bits, half of the time near one end, where the structure of most files is described."""
    near = min(len(content), chance.choice([200, 5_000, len(content), len(content)]))
    first = 0 if chance.random() < 0.5 else len(content) - near
    for _ in range(chance.choice([1, 1, 1, 3, 30])):
        content[first + chance.randrange(near)] ^= 1 << chance.randrange(8)
    return bytes(content)


def _cut(content: bytearray, chance: random.Random) -> bytes:
    return bytes(content[: chance.randrange(1, len(content))])


def _overwritten(content: bytearray, chance: random.Random) -> bytes:
    """Overwrites a part with zeros, ones or noise."""
    first, length = _part(content, chance)
    filling = chance.choice([b"\0" * length, b"\xff" * length, chance.randbytes(length)])
    content[first : first + length] = filling
    return bytes(content)


def _spliced(content: bytearray, chance: random.Random) -> bytes:
    """Copies a part to another place, over what is there or before it."""
    first, length = _part(content, chance)
    target = chance.randrange(len(content))
    end = target + length if chance.random() < 0.5 else target
    content[target:end] = content[first : first + length]
    return bytes(content)


def _removed(content: bytearray, chance: random.Random) -> bytes:
    first, length = _part(content, chance)
    del content[first : first + length]
    return bytes(content)


def _number(content: bytearray, chance: random.Random) -> bytes:
    """Overwrites a number with one at the end of its range."""
    width = chance.choice([1, 2, 4, 8])
    first = chance.randrange(max(len(content) - width, 1))
    half = 1 << 8 * width - 1
    value = chance.choice([0, 1, half - 1, half, 2 * half - 1])
    content[first : first + width] = value.to_bytes(width, "little")
    return bytes(content)


_KINDS = (_flipped, _flipped, _cut, _overwritten, _spliced, _removed, _number)


def _part(content: bytearray, chance: random.Random) -> tuple[int, int]:
    """Returns the beginning and the length of a part, which is mostly short."""
    first = chance.randrange(len(content))
    longest = min(len(content) - first, chance.choice([4, 64, 4_096, len(content)]))
    return first, chance.randint(1, longest)


def _repacked_zip(content: bytes, chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        spoilt = chance.choice([name for name in old.namelist() if old.getinfo(name).file_size > 1])
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, _spoilt(member, chance) if name == spoilt else member)
    return buffer.getvalue()


def _repacked_tar(content: bytes, chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as old,
        tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as new,
    ):
        for entry in old.getmembers():
            file = old.extractfile(entry)
            if file is not None:
                member = _spoilt(file.read(), chance)
                entry.size = len(member)
                new.addfile(entry, io.BytesIO(member))
    return buffer.getvalue()
