"""A run's workdir as a place, on a disk or in a bucket: made, written to, and one run's alone."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from ml_collections import ConfigDict

from mbv2_jax import bucket
from mbv2_jax.errors import RunFailed, UserError, listed
from mbv2_jax.training import processes
from mbv2_jax.training.lease import Lease, who

# Seconds. A name that was never asked for is in no cache of NFS: its server is asked.
_VISIBLE_WITHIN = 10.0

_LAPSE = 120.0  # seconds for which NFS may keep the lock of a host that died


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


def check_shared(workdir: pathlib.Path, timeouts: ConfigDict) -> None:
    """Raises UserError, in every process, unless all of them see what the first one writes here.

    Checkpoints are written by all, and read by all when a run goes on.

    Args:
      workdir: there already.
      timeouts: the config's `distributed` section.
    """
    if processes.count() == 1 or bucket.is_address(workdir):
        return
    token = workdir / f".shared-{uuid.uuid4().hex}"
    name = processes.exchange("file in the workdir", token.name, timeouts)[0]
    try:
        if processes.index() == 0:
            token.touch()
        processes.exchange("having looked into the workdir", True, timeouts)
        check_seen(workdir, name, "view", timeouts)
    finally:
        token.unlink(missing_ok=True)


def check_seen(workdir: pathlib.Path, inside: str, name: str, timeouts: ConfigDict) -> None:
    """Raises UserError, in every process, unless all of them see something in the workdir.

    Args:
      workdir: the run's.
      inside: the path in it of what process 0 sees.
      name: of this exchange between the processes.
      timeouts: the config's `distributed` section.
    """
    end = time.monotonic() + _VISIBLE_WITHIN
    while not (seen := (workdir / inside).exists()) and time.monotonic() < end:
        time.sleep(0.5)
    blind = [i for i, sees in enumerate(processes.exchange(name, seen, timeouts)) if not sees]
    if blind:
        raise UserError(
            f"--workdir {workdir} is not shared: processes {listed(map(str, blind))} do not see "
            "what process 0 sees there. Give a directory that all hosts share, on NFS or Lustre, "
            "or gs://BUCKET/DIR"
        )


@contextlib.contextmanager
def alone_in(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Keeps a second run out of the workdir, where each would undo what the other writes.

    On a disk the lock goes with the process, however that ends; for a bucket see lease.py.

    Yields:
      Raises RunFailed, when called, if the workdir is another run's by now.
    """
    if processes.index() != 0:  # the processes of one run share a workdir
        yield _still_ours
        return
    if bucket.is_address(workdir):
        with Lease(workdir) as lease:
            yield lease.check
        return
    with (workdir / ".lock").open("a+") as file:
        _lock(file, workdir)
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        yield _still_ours


def _still_ours() -> None:
    """Says nothing: on a disk a lock cannot be lost."""


def check_alone(workdir: pathlib.Path) -> None:
    """Raises UserError if another run is at work in a workdir, where there is one.

    To be asked before its checkpoints are looked at, which the other run may be deleting.
    """
    if bucket.is_address(workdir):
        return  # there `alone_in` has to wait for a sign of life
    if processes.index() == 0 and (workdir / ".lock").exists():
        with (workdir / ".lock").open("a+") as file:
            _lock(file, workdir)


def _lock(file: TextIO, workdir: pathlib.Path) -> None:
    """Locks a file for this process.

    Raises:
      UserError: another process has it, and lives; or there are no locks here.
    """
    told, end = False, time.monotonic() + _LAPSE
    while not _locked(file, workdir):
        owner = _owner(file)
        # A lock of a process that died on this host is gone with it.
        if owner.get("host") in (None, socket.gethostname()) or time.monotonic() >= end:
            raise UserError(
                f"another run is at work in {workdir}{who(owner)}: wait for it, or give another "
                "--workdir"
            )
        if not told:
            processes.say(
                f"another run is or was at work in {workdir}{who(owner)}: waiting up to "
                f"{_LAPSE:.0f} s to see whether its host died"
            )
            told = True
        time.sleep(1)


def _locked(file: TextIO, workdir: pathlib.Path) -> bool:
    """Tries to lock a file; returns whether it could be."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: its file system cannot lock a file ({error.strerror}), which "
            "would keep a second run out. Mount it with locks (Lustre: -o flock; NFS: without "
            "nolock), or give another --workdir"
        ) from None
    return True


def _owner(file: TextIO) -> dict[str, Any]:
    """Returns {"host", "pid"} of who locked a file last; {} where it does not say."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:  # not written yet
        return {}
    return owner if isinstance(owner, dict) else {}


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
