"""A run's workdir as a place: made, written to, and one run's alone."""

import contextlib
import fcntl
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from mbv2_jax.errors import UserError


def make_writable(workdir: pathlib.Path) -> None:
    """Makes the workdir where there is none; raises UserError where it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def alone_in(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of the workdir, where each would undo what the other writes.

    The lock goes with the process, however that ends.
    """
    if jax.process_index() != 0:  # the processes of one run share a workdir
        yield
        return
    with (workdir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {workdir}: wait for it, or give another --workdir"
            ) from None
        yield


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a .json file that is complete or not there at all."""
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps(value, indent=2) + "\n")
    fresh.replace(path)
