"""A run's workdir as a place, on a disk or in a bucket: made, written to, and one run's alone."""

import contextlib
import fcntl
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mbv2_jax import bucket
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.training.lease import Lease


def make_writable(workdir: pathlib.Path) -> None:
    """Makes the workdir where there is none; raises UserError where it cannot be written."""
    if bucket.is_address(workdir):
        return  # no folders there; and `alone_in` writes
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def alone_in(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Keeps a second run out of the workdir, where each would undo what the other writes.

    On a disk the lock goes with the process, however that ends; for a bucket see lease.py.

    Yields:
      Raises RunFailed, when called, if the workdir is another run's by now.
    """
    if jax.process_index() != 0:  # the processes of one run share a workdir
        yield _still_ours
        return
    if bucket.is_address(workdir):
        with Lease(workdir) as lease:
            yield lease.check
        return
    with (workdir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {workdir}: wait for it, or give another --workdir"
            ) from None
        yield _still_ours


def _still_ours() -> None:
    """Says nothing: on a disk a lock cannot be lost."""


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a .json file that is complete or not there at all."""
    text = json.dumps(value, indent=2) + "\n"
    if bucket.is_address(path):
        try:
            with bucket.as_oserror(path):
                path.write_text(text)
        except OSError as error:
            raise RunFailed(f"{path} cannot be written: {error.strerror}") from None
        return
    fresh = path.with_suffix(".json.new")
    fresh.write_text(text)
    fresh.replace(path)
