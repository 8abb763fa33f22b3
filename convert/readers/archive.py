"""Archives of weights: zip with checked sizes and CRCs, and tar, read as a stream."""

import gzip
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Self

from mbv2_jax.errors import UserError

from .contents import damage_named

# Weights hardly compress: a file that unpacks to more than this many bytes, and to this many times
# its own size, was made to fill the memory.
_PLAIN = 64 << 20
_RATIO = 8
_LONGEST_HEADER = 4096  # bytes in a tar archive that name a member, and tell its times
_TAR_RATIO = 2  # where the archive's other files are weights, too


class Archive:
    """An open zip archive.

    Attributes:
      names: of its members, in the archive's order.
    """

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile):
        self._path = path
        self._archive = archive
        self.names = tuple(archive.namelist())

    def read(self, name: str, most: int | None = None) -> bytes:
        """Returns a member's content, checked against its CRC.

        Args:
          name: the member's.
          most: the bytes that it may have; None for as many as the archive may unpack to.

        Raises:
          KeyError: there is no such member.
          UserError: it is too large.
          zipfile.BadZipFile: it is damaged, or marked as a folder.
        """
        member = self._archive.getinfo(name)
        if most is not None and member.file_size > most:
            raise UserError(
                f"{self._path} was refused: its {name!a} has {member.file_size:,} bytes, and "
                f"more than {most:,} are implausible"
            )
        if member.external_attr & 0x10:  # torch would skip it silently
            raise zipfile.BadZipFile(f"{name} is marked as a folder")
        if not member.CRC:  # torch.save writes 0 where the user switched the CRCs off
            member.CRC = None  # type: ignore[assignment] # zipfile then checks none
        return self._archive.read(member)


@contextmanager
def open_archive(path: pathlib.Path) -> Iterator[Archive]:
    """Opens a zip archive; whatever error the body meets is raised as one of a damaged file.

    Raises:
      UserError: the archive is damaged, or unpacks to an implausible size.
    """
    with damage_named(path), zipfile.ZipFile(path) as archive:
        _check_sizes(path, archive)
        yield Archive(path, archive)


def _check_sizes(path: pathlib.Path, archive: zipfile.ZipFile) -> None:
    most = _PLAIN + _RATIO * path.stat().st_size
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > most:
        largest = max(members, key=lambda member: member.file_size)
        raise UserError(
            f"{path} was refused: it unpacks to {total / 2**30:.1f} GiB, its {largest.filename} to "
            f"{largest.file_size / 2**30:.1f}, and weights do not compress so well"
        )


def is_tar(path: pathlib.Path) -> bool:
    """Returns whether a file is a tar archive, also one that gzip compressed."""
    try:
        with _decompressed(path) as file:
            return file.read(512)[257:262] == b"ustar"
    # The type of error depends on the damage: OSError, EOFError, zlib.error
    except Exception:
        return False


def read_tar(path: pathlib.Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Returns the files with wanted names in a tar archive; links and folders are left out.

    Raises:
      UserError: the archive is damaged, or unpacks to an implausible size.
    """
    found = {}
    with damage_named(path), _decompressed(path) as file:
        bounded = _Bounded(path, file)
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=bounded, mode="r|", tarinfo=_Member
        ) as archive:
            for member in archive:
                if member.isreg() and not member.issparse() and wanted(member.name):
                    content = archive.extractfile(member)
                    found[member.name] = content.read() if content else b""
        while bounded.read(1 << 20):  # gzip checks its CRC at the end
            pass
    return found


class _Member(tarfile.TarInfo):
    """A member of a tar archive, whose extended headers are short.

    tarfile takes hours for a long one that was made for it, and more memory than the file has.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Reads a header, and refuses one of a long header that follows.

        Raises:
          ValueError: it announces a header that is longer than any path.
        """
        member = super().frombuf(buf, encoding, errors)
        if not member.isreg() and member.size > _LONGEST_HEADER:
            raise ValueError(f"one of its headers has {member.size:,} bytes")
        return member


class _Bounded:
    """A file that is read once, and not beyond the plausible size of an archive's content."""

    def __init__(self, path: pathlib.Path, file: IO[bytes] | gzip.GzipFile):
        self._path = path
        self._file = file
        self._left = _PLAIN + _TAR_RATIO * path.stat().st_size

    def read(self, size: int) -> bytes:
        """Returns the next bytes, `size` at most."""
        content = self._file.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise UserError(
                f"{self._path} was refused: it unpacks to more than {_TAR_RATIO} times its size, "
                "and weights do not compress so well"
            )
        return content


@contextmanager
def _decompressed(path: pathlib.Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Opens a file, through gzip if it begins as gzip's files do."""
    with open(path, "rb") as plain:
        compressed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        if not compressed:
            yield plain
            return
        with gzip.open(plain) as file:
            yield file
