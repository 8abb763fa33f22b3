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

from mbv2_jax.errors import RunFailed, UserError, first_line, listed
from mbv2_jax.runtime import processes
from mbv2_jax.storage import bucket
from mbv2_jax.storage.lease import Lease, who

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
    _refuse(workdir, blind(workdir, "workdir", timeouts))


def check_seen(workdir: pathlib.Path, inside: str, timeouts: ConfigDict) -> None:
    """Raises UserError, in every process, unless all of them see something in the workdir.

    Args:
      workdir: the run's.
      inside: the path in it of what process 0 sees.
      timeouts: the config's `distributed` section.
    """
    _refuse(workdir, _blind(workdir / inside, f"view of {inside}", timeouts))


def _refuse(workdir: pathlib.Path, unseeing: list[int]) -> None:
    if unseeing:
        raise UserError(
            f"--workdir {workdir} is not shared: processes {listed(map(str, unseeing))} do not see "
            "what process 0 sees there. Give a directory that all hosts share, on NFS or Lustre, "
            "or gs://BUCKET/DIR"
        )


def blind(folder: pathlib.Path, name: str, timeouts: ConfigDict) -> list[int]:
    """Returns the processes that do not see what the first one writes in a folder of that name.

    Args:
      folder: there already in each; in a bucket all see it.
      name: what it is, for messages; each may be asked for once.
      timeouts: the config's `distributed` section.
    """
    if processes.count() == 1 or bucket.is_address(folder):
        return []
    token = folder / f".shared-{uuid.uuid4().hex}"
    first = processes.exchange(f"file in the {name}", token.name, timeouts)[0]
    try:
        if processes.index() == 0:
            token.touch()
        processes.exchange(f"look into the {name}", True, timeouts)
        return _blind(folder / first, f"view of the {name}", timeouts)
    finally:
        token.unlink(missing_ok=True)


def _blind(path: pathlib.Path, name: str, timeouts: ConfigDict) -> list[int]:
    """Returns the processes that do not see `path`, which may take a moment to come."""
    end = time.monotonic() + _VISIBLE_WITHIN
    while not (seen := path.exists()) and time.monotonic() < end:
        time.sleep(0.5)
    return [i for i, sees in enumerate(processes.exchange(name, seen, timeouts)) if not sees]


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Raises RunFailed, with what and why, if something in a workdir cannot be read.

    Args:
      path: what is read.
    """
    try:
        with bucket.as_oserror(path):
            yield
    except OSError as error:
        raise RunFailed(
            f"{error.filename or path} cannot be read now: {first_line(error)}. Nothing is "
            "lost: once that is mended, the same command goes on from there"
        ) from None


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
    with _open_lock(workdir) as file:
        _lock(file, workdir)
        file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        json.dump(owner, file)
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
        with _open_lock(workdir) as file:
            _lock(file, workdir)


def _open_lock(workdir: pathlib.Path) -> TextIO:
    try:
        return (workdir / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


def _machine() -> str:
    """Returns what tells this machine, since it was started, from others.

    Not its name: the pod that replaces another one on another machine has the same.
    """
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _lock(file: TextIO, workdir: pathlib.Path) -> None:
    """Locks a file for this process.

    Raises:
      UserError: another process has it, and lives; or there are no locks here.
    """
    told, end = False, time.monotonic() + _LAPSE
    while not _locked(file, workdir):
        owner = _owner(file)
        # A lock of a process that died on this machine is gone with it.
        if owner.get("machine") in (None, _machine()) or time.monotonic() >= end:
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
    """Returns {"host", "pid", "machine"} of who locked a file; {} where it does not say."""
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
