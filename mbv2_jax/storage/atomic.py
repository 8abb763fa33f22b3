"""Atomic writes: a file or a folder that is complete, or not there at all.

On a disk, the content goes to a temporary neighbour that is renamed at the end. In a bucket, an
object is atomic by itself, and a folder has one file that marks it as complete. Every function
raises OSError with the path and one line; callers turn it into a UserError or a RunFailed.
"""

import contextlib
import errno
import io
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import IO, Any

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.storage import bucket

_MARGIN = 16 << 20  # bytes that a disk needs beyond the content, for metadata and logs


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file in UTF-8, replacing one that is there."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file, replacing one that is there."""
    with open_file(path, "wb") as file:
        file.write(content)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file with an indentation of two, replacing one that is there."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def open_file(path: pathlib.Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file for writing, which replaces the one at `path` when the block ends.

    If the block raises, nothing is left of the new file, and an old one stays. If `path` is a link,
    the file that it points to is replaced.

    Args:
      path: a file on a disk, in a folder that exists, or in a bucket.
      mode: "w" for text in UTF-8, or "wb".

    Yields:
      The open file. For a bucket it is in memory until the block ends.

    Raises:
      OSError: the file cannot be written.
    """
    opened = _open_object(path, mode) if bucket.is_address(path) else _open_local(path, mode)
    with opened as file:
        yield file


@contextlib.contextmanager
def _open_object(path: pathlib.Path, mode: str) -> Iterator[IO[Any]]:
    # Leaving a file of gcsfs by an exception would still finish the upload of its beginning.
    file = io.BytesIO()
    if "b" in mode:
        yield file
    else:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.flush()
    with bucket.as_oserror(path):
        path.write_bytes(file.getvalue())


@contextlib.contextmanager
def _open_local(path: pathlib.Path, mode: str) -> Iterator[IO[Any]]:
    target = pathlib.Path(os.path.realpath(path))
    temporary = _temporary(target)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        with temporary.open(mode, encoding=encoding, newline=newline) as file:
            yield file
        temporary.replace(target)
    except OSError as error:
        if error.filename in (None, os.fspath(temporary)):  # not about a file that the block reads
            raise OSError(error.errno, first_line(error), os.fspath(path)) from None
        raise
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, or its folder is gone
            temporary.unlink()


@contextlib.contextmanager
def replace_folder(path: pathlib.Path, mark: str) -> Iterator[pathlib.Path]:
    """Yields an empty folder, which takes the place of `path` when the block ends.

    On a disk the new folder is complete before the old one is moved away, and the old one is
    deleted last. A process that dies meanwhile leaves one of them complete, if only as `.NAME.new`
    beside `.NAME.old`. If the block raises, the old folder stays. If `path` is a link, the folder
    that it points to is replaced.

    In a bucket no folder can be renamed. There `mark` vouches for the rest: it is deleted first,
    and a process that dies meanwhile leaves a folder without it.

    Args:
      path: a folder on a disk or in a bucket; its parent folders are created.
      mark: the name of the file that says that the folder is complete, which the block must write
        last.

    Raises:
      OSError: the folder cannot be written.
    """
    if bucket.is_address(path):
        with bucket.as_oserror(path):
            (path / mark).unlink(missing_ok=True)
            bucket.remove_tree(path)
            yield path
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_writable(path: pathlib.Path, flag: str) -> None:
    """Checks that a new file can be written at `path`.

    Args:
      path: a file on a disk or in a bucket.
      flag: the flag that names it, such as "--out", for the message.

    Raises:
      UserError: the file exists already, or its folder cannot be written.
    """
    try:
        with bucket.as_oserror(path):
            if path.exists():
                raise UserError(f"{flag}={path} exists already: delete it, or give another name")
            if not bucket.is_address(path):
                temporary = _temporary(path)
                temporary.touch()
                temporary.unlink()
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be written: {first_line(error)}") from None


def check_space(folder: pathlib.Path, size: int) -> None:
    """Raises OSError if the disk of a folder has no space left for `size` bytes.

    Call it before Orbax starts to write: its threads print tracebacks when a disk fills up. A
    bucket has no limit.
    """
    if bucket.is_address(folder):
        return
    if shutil.disk_usage(folder).free < size + _MARGIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder))


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """Returns the name of a hidden file beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
