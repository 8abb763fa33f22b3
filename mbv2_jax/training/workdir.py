"""The workdir of a run: its creation, and errors of reading it as one line."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from mbv2_jax.errors import RunFailed, UserError, first_line
from mbv2_jax.storage import bucket


def make_writable(workdir: pathlib.Path) -> None:
    """Creates a workdir if it does not exist, and checks that it can be written.

    In a bucket, which has no folders, it does nothing; storage/lock.py writes there first.

    Raises:
      UserError: the workdir cannot be written.
    """
    if bucket.is_address(workdir):
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Converts an OSError to a RunFailed that says which part of a workdir cannot be read, and why.

    Args:
      path: the file or folder that the block reads.
    """
    try:
        with bucket.as_oserror(path):
            yield
    except OSError as error:
        raise RunFailed(
            f"{error.filename or path} cannot be read now: {first_line(error)}. Nothing is "
            "lost: once the cause is fixed, the same command resumes from there"
        ) from None
