"""Paths in a bucket of Google Cloud Storage: gs://BUCKET/FOLDER.

A path in a bucket is an etils.epath.Path, which has the methods of pathlib.Path. epath reads and
writes through fsspec and gcsfs; arrays go through tensorstore's own driver; Orbax asks
google-cloud-storage for the kind of a bucket. The extra `gcs` installs all of them.

An object is there complete or not at all. Objects cannot be appended to, and a folder cannot be
renamed in one operation. A writer of several objects therefore writes last the one that marks the
others as complete.
"""

import contextlib
import errno
import functools
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NoReturn

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.installed import require

_SCHEME = "gs://"
_TIMEOUT = 30.0  # seconds to wait for a bucket's answer
_MARK = "commit_success.txt"  # the object with which Orbax marks a folder as complete


def is_address(text: str | os.PathLike[str]) -> bool:
    """Returns whether a path is the address of something in a bucket."""
    return os.fspath(text).startswith(_SCHEME)


def check_scheme(text: str | os.PathLike[str], field: str) -> None:
    """Raises UserError for an address of anything but a bucket of Google Cloud Storage.

    Args:
      text: a local path, or an address.
      field: the flag or the config's field that holds it, for the message.
    """
    path = os.fspath(text)
    if "://" in path and not is_address(path):
        raise UserError(f"{field}={path}: give a folder on a disk, or gs://BUCKET/FOLDER")


def parse_path(text: str | os.PathLike[str], field: str) -> pathlib.Path:
    """Returns the path that a user gave, after checking that its bucket can be reached.

    Args:
      text: a local path, or gs://BUCKET/FOLDER.
      field: the flag or the config's field that holds the path, for messages.

    Returns:
      A pathlib.Path, or an etils.epath.Path, which has the same methods. Nothing needs to exist
      there.

    Raises:
      UserError: the bucket does not exist or may not be read, or a package is missing.
    """
    path = os.fspath(text)
    check_scheme(path, field)
    if not is_address(path):
        return pathlib.Path(path)
    name, inside = _split(path)
    if not name or not inside.strip("/"):
        raise UserError(f"{field}={path}: give a folder in a bucket, gs://BUCKET/FOLDER")
    _check_bucket(f"{field}={path}", name)
    from etils import epath

    return epath.Path(path)


def absolute(path: pathlib.Path) -> pathlib.Path:
    """Returns the absolute form of a local path, and the address of a bucket unchanged."""
    return path if is_address(path) else path.absolute()


def kvstore(path: pathlib.Path) -> dict[str, str]:
    """Returns a folder on a disk or in a bucket as tensorstore's specification of a store."""
    folder = f"{os.fspath(path)}/"
    if not is_address(path):
        return {"driver": "file", "path": folder}
    name, inside = _split(folder)
    return {"driver": "gcs", "bucket": name, "path": inside}


def blob(path: pathlib.Path) -> Any:
    """Returns the object at `path` as a google-cloud-storage Blob, which knows generations."""
    name, inside = _split(os.fspath(path))
    return _bucket(name).blob(inside)


def remove_tree(path: pathlib.Path) -> None:
    """Deletes a folder of a bucket with everything in it, if it exists."""
    path.rmtree(missing_ok=True)  # type: ignore[attr-defined] # epath's


def move_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves every object of a folder in a bucket to another folder, one by one.

    The marks of completeness move first, so that a folder which a dying process leaves half moved
    counts as incomplete.
    """
    import fsspec

    system, old = fsspec.url_to_fs(os.fspath(source))
    _, new = fsspec.url_to_fs(os.fspath(target))
    names = [name.removeprefix(old) for name in system.find(old)]
    for name in sorted(names, key=lambda name: (not name.endswith(_MARK), name)):
        system.mv_file(old + name, new + name)


def contents(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields the relative name and the content of every file below a folder, sorted by name.

    The order is the same on a disk and in a bucket; names are separated by "/".

    Raises:
      OSError: a file cannot be read. For a bucket, also the errors of its libraries: see
        `as_oserror`.
    """
    return _object_contents(folder) if is_address(folder) else _file_contents(folder)


def _file_contents(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    tree = os.walk(folder, onerror=_raise)
    for file in sorted(pathlib.Path(root, name) for root, _, names in tree for name in names):
        try:
            content = file.read_bytes()
        except OSError as error:
            error.filename = str(file)  # read() itself does not set it
            raise
        yield file.relative_to(folder).as_posix(), content


def _object_contents(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    import fsspec

    system, root = fsspec.url_to_fs(os.fspath(folder))
    names = [name.removeprefix(f"{root}/") for name in system.find(root)]
    for name in sorted(names, key=pathlib.PurePosixPath):
        yield name, system.cat_file(f"{root}/{name}")


def _raise(error: OSError) -> NoReturn:
    raise error


@contextlib.contextmanager
def as_oserror(path: pathlib.Path) -> Iterator[None]:
    """Converts the errors of a bucket's libraries to an OSError with the path and one line.

    An OSError that names a file stays as it is, since it may be about a disk; so does every error
    where `path` is on a disk.
    """
    try:
        yield
    except FileNotFoundError as error:
        if not is_address(path):
            raise
        name = os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, name, str(error.args[-1])) from None
    except Exception as error:
        names_file = getattr(error, "filename", None)
        if not is_address(path) or not _is_bucket_error(error) or names_file:
            raise
        raise OSError(errno.EIO, first_line(error), os.fspath(path)) from None


def _is_bucket_error(error: Exception) -> bool:
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package in ("gcsfs", "google", "aiohttp", "requests")


def _split(address: str) -> tuple[str, str]:
    """Returns the bucket's name, and the path inside of it."""
    name, _, inside = address.removeprefix(_SCHEME).partition("/")
    return name, inside


def _check_bucket(given: str, name: str) -> None:
    """Raises UserError where the bucket `name` cannot be used; `given` starts the message."""
    require(f"{given}: reading and writing gs://", "gcsfs", "google.cloud.storage", extra="gcs")
    _configure_libraries()
    try:
        _bucket(name)
    except Exception as error:
        raise UserError(f"{given}: {_reason(error, name)}") from None


def _reason(error: Exception, name: str) -> str:
    """Returns why the bucket `name` cannot be used, with a remedy."""
    from google.api_core import exceptions
    from google.auth import exceptions as auth

    login = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
    match error:
        case exceptions.NotFound():
            return f"there is no bucket {_SCHEME}{name}"
        case exceptions.Forbidden() | exceptions.Unauthorized():
            return (
                f"no permission for {_SCHEME}{name}. It needs the roles Storage Object User and "
                "Storage Legacy Bucket Reader (storage.buckets.get): " + first_line(error)
            )
        case auth.DefaultCredentialsError():
            return f"no Google Cloud credentials were found: {login}"
        case auth.RefreshError():
            return f"the Google Cloud credentials were refused ({first_line(error)}): {login}"
        case _:  # of the network, or a project that is not set
            return f"{_SCHEME}{name} cannot be reached: {first_line(error)}"


@functools.lru_cache(maxsize=8)
def _bucket(name: str) -> Any:
    from google.cloud import storage
    from google.cloud.storage import retry

    return storage.Client().get_bucket(name, retry=retry.DEFAULT_RETRY.with_timeout(_TIMEOUT))


@functools.cache
def _configure_libraries() -> None:
    """Sets options of the bucket's libraries before they are imported; the user's own win."""
    # epath would use TensorFlow where that is installed; the tests cover fsspec only.
    os.environ.setdefault("EPATH_USE_TF", "0")
    # gcsfs would ask for the kind of every bucket, at each call where it may not know. "false" has
    # it treat every bucket as a standard one; a zonal bucket needs "true".
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # A cached listing would hide the objects that tensorstore or another host writes.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    # Both log a traceback before they raise, and our caller reports the error in one line.
    for name in ("gcsfs", "fsspec.prefetcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
