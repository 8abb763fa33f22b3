"""Zip archives of weights: members with checked sizes and CRCs."""

import pathlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from mbv2_jax.errors import UserError

from .contents import damage_named

# Weights hardly compress: a file that unpacks to more than this many bytes, and to this many times
# its own size, was made to fill the memory.
_PLAIN = 64 << 20
_RATIO = 8


class Archive:
    """An open zip archive.

    Attributes:
      names: of its members, in the archive's order.
    """

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile):
        self._path = path
        self._archive = archive
        self.names = tuple(archive.namelist())

    def read(self, name: str) -> bytes:
        """Returns a member's content, checked against its CRC.

        Raises:
          KeyError: there is no such member.
          zipfile.BadZipFile: it is damaged, or marked as a folder.
        """
        member = self._archive.getinfo(name)
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
