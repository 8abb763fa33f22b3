"""Workdirs and model directories in a bucket of Google Cloud Storage: gs://BUCKET/FOLDER.

A path there is etils.epath's, which has the methods of pathlib's; what is underneath is fsspec with
gcsfs, and for arrays tensorstore's own driver. Orbax asks google-cloud-storage of what kind a
bucket is. All of them come with the extra `gcs`.

An object is there whole or not at all; nothing is appended to, and no folder is renamed at once. So
whoever writes several objects writes last the one that says that all are there.
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

_SCHEME = "gs://"
_PATIENCE = 30.0  # seconds until a bucket that does not answer is given up
_ELSEWHERE = ("s3://", "az://", "hf://", "http://", "https://")


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether a path is one in a bucket."""
    return os.fspath(text).startswith(_SCHEME)


def place(text: str | os.PathLike[str], what: str) -> pathlib.Path:
    """Returns the path that a user gave, on a disk or in a bucket, which then can be reached.

    Args:
      text: a local path, or gs://BUCKET/FOLDER.
      what: the flag that it is of, for messages.

    Returns:
      pathlib's, or etils.epath's with the same methods. Nothing says that there is something at it.

    Raises:
      UserError: there is no such bucket, or it may not be looked into, or what reads it is missing.
    """
    path = os.fspath(text)
    if not is_address(path):
        if path.startswith(_ELSEWHERE):
            raise UserError(f"{what}={path}: give a folder on a disk, or gs://BUCKET/FOLDER")
        return pathlib.Path(path)
    name, _, inside = path.removeprefix(_SCHEME).partition("/")
    if not name or not inside.strip("/"):
        raise UserError(f"{what}={path}: give a folder in a bucket, gs://BUCKET/FOLDER")
    _require(f"{what}={path}", name)
    from etils import epath

    return epath.Path(path)


def absolute(path: pathlib.Path) -> pathlib.Path:
    """Returns the path from the root of its disk, or as it is in a bucket."""
    return path if is_address(path) else path.absolute()


def blob(path: pathlib.Path) -> Any:
    """Returns the object at `path` as google-cloud-storage's Blob, which knows generations."""
    name, _, inside = os.fspath(path).removeprefix(_SCHEME).partition("/")
    return _bucket(name).blob(inside)


def remove_tree(path: pathlib.Path) -> None:
    """Deletes a folder of a bucket with all that is in it, if there is one."""
    path.rmtree(missing_ok=True)  # type: ignore[attr-defined] # epath's


def move_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves all that is in a folder of a bucket to another one, object by object.

    The marks that say that something is complete go first: what is left, if the process dies
    meanwhile, passes for incomplete.
    """
    import fsspec

    system, old = fsspec.url_to_fs(os.fspath(source))
    _, new = fsspec.url_to_fs(os.fspath(target))
    names = [name.removeprefix(old) for name in system.find(old)]
    for name in sorted(names, key=lambda name: (not name.endswith("commit_success.txt"), name)):
        system.mv_file(old + name, new + name)


def contents(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields name (relative, with /) and content of every file in a folder and below, sorted.

    On a disk or in a bucket; in the same order there and here.

    Raises:
      OSError: something cannot be read. Of a bucket, what its libraries raise; see `as_oserror`.
    """
    if not is_address(folder):
        tree = os.walk(folder, onerror=_raise)
        files = sorted(pathlib.Path(root, name) for root, _, names in tree for name in names)
        for file in files:
            try:
                content = file.read_bytes()
            except OSError as error:
                error.filename = str(file)  # which an error of reading lacks
                raise
            yield file.relative_to(folder).as_posix(), content
        return
    import fsspec

    system, root = fsspec.url_to_fs(os.fspath(folder))
    names = [name.removeprefix(f"{root}/") for name in system.find(root)]
    for name in sorted(names, key=pathlib.PurePosixPath):
        yield name, system.cat_file(f"{root}/{name}")


def _raise(error: OSError) -> NoReturn:
    raise error


@contextlib.contextmanager
def as_oserror(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever the libraries of a bucket raise into an OSError with the path and one line.

    An OSError that names a file is left as it is: it may be of a disk.
    """
    try:
        yield
    except FileNotFoundError as error:
        if not is_address(path):
            raise
        name = os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, name, str(error.args[-1])) from None
    except Exception as error:
        if not is_address(path) or not _of_a_bucket(error) or getattr(error, "filename", None):
            raise
        raise OSError(errno.EIO, first_line(error), os.fspath(path)) from None


def _of_a_bucket(error: Exception) -> bool:
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package in ("gcsfs", "google", "aiohttp", "requests")


def _require(given: str, name: str) -> None:
    """Raises UserError where the bucket `name` cannot be used."""
    _configure()
    try:
        import gcsfs  # noqa: F401
        import google.cloud.storage  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{given}: reading and writing gs:// needs pip install 'mbv2_jax[gcs]' ({error})"
        ) from None
    from google.api_core import exceptions
    from google.auth import exceptions as auth

    login = "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS"
    try:
        _bucket(name)
    except exceptions.NotFound:
        raise UserError(f"{given}: there is no bucket {_SCHEME}{name}") from None
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise UserError(
            f"{given}: no permission for {_SCHEME}{name}. Needed are the roles Storage Object User "
            f"and Storage Legacy Bucket Reader (storage.buckets.get): {first_line(error)}"
        ) from None
    except auth.DefaultCredentialsError:
        raise UserError(f"{given}: no credentials of Google Cloud are found: {login}") from None
    except auth.RefreshError as error:
        raise UserError(
            f"{given}: the credentials of Google Cloud do not hold: {first_line(error)}. To mend "
            f"that: {login}"
        ) from None
    except Exception as error:  # of the network, or a project that is not set
        raise UserError(
            f"{given}: {_SCHEME}{name} cannot be reached: {first_line(error)}"
        ) from None


@functools.lru_cache(maxsize=8)
def _bucket(name: str) -> Any:
    from google.cloud import storage
    from google.cloud.storage import retry

    return storage.Client().get_bucket(name, retry=retry.DEFAULT_RETRY.with_timeout(_PATIENCE))


@functools.cache
def _configure() -> None:
    """Sets what the libraries below should do, before they are imported; the user's own wins."""
    # Whatever else is installed, what reads a bucket is what the tests read it with.
    os.environ.setdefault("EPATH_USE_TF", "0")
    # gcsfs would ask for the kind of every bucket, at each call where it may not know. Without that
    # it takes all for usual ones; a zonal one needs "true".
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # It would keep each listing for good, and not see what tensorstore or another host writes.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    # They log each error with a traceback before they raise it; who catches it says it in a line.
    for name in ("gcsfs", "fsspec.prefetcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
