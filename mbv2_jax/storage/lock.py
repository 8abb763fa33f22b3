"""Exclusive access to a run's workdir: a second run would undo the first one's work.

On a disk, a lock on WORKDIR/.lock ends with the process that holds it. In a bucket, a lease takes
its place (lease.py).
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from mbv2_jax.errors import UserError
from mbv2_jax.storage import bucket
from mbv2_jax.storage.lease import Lease, in_use, parse_owner, report_wait

_NFS_TIMEOUT = 120.0  # seconds for which NFS may keep the lock of a host that died
_POLL = 1.0  # seconds between two attempts at a lock


@contextlib.contextmanager
def exclusive(folder: pathlib.Path, *, acquire: bool = True) -> Iterator[Callable[[], None]]:
    """Keeps every other run out of a workdir for as long as the block lasts.

    Args:
      folder: the run's workdir, on a disk or in a bucket.
      acquire: whether this process takes the lock. The processes of a run share its workdir, and
        only one of them may take it.

    Yields:
      A function that raises RunFailed if the workdir belongs to another run by now. On a disk that
      cannot happen.

    Raises:
      UserError: another run is at work there, or the folder cannot be written or locked.
    """
    if not acquire:
        yield _do_nothing
        return
    if bucket.is_address(folder):
        with Lease(folder) as lease:
            yield lease.check
        return
    with _open_lock(folder) as file:
        _acquire(file, folder)
        file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        json.dump(owner, file)
        file.flush()
        yield _do_nothing


def check_free(folder: pathlib.Path) -> None:
    """Checks that no other run is at work in a workdir, which need not exist.

    Call it before looking at checkpoints, which another run may be deleting. In a bucket it does
    nothing: there only `exclusive`, which waits for a renewal, can tell.

    Raises:
      UserError: another run is at work there.
    """
    if not bucket.is_address(folder) and (folder / ".lock").exists():
        with _open_lock(folder) as file:
            _acquire(file, folder)


def _do_nothing() -> None:
    """Stands for the check of a lock that cannot be lost."""


def _open_lock(folder: pathlib.Path) -> TextIO:
    try:
        return (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--workdir {folder} cannot be written: {error.strerror}") from None


def _acquire(file: TextIO, folder: pathlib.Path) -> None:
    """Locks a file for this process.

    Raises:
      UserError: a process that is alive holds the lock, or the file system has no locks.
    """
    reported, end = False, time.monotonic() + _NFS_TIMEOUT
    while not _try_lock(file, folder):
        file.seek(0)
        owner = parse_owner(file.read())
        # The system itself releases the lock of a process that died on this machine.
        if owner.get("machine") in (None, _machine()) or time.monotonic() >= end:
            raise in_use(folder, owner)
        if not reported:
            report_wait(folder, owner, _NFS_TIMEOUT, "its host died")
            reported = True
        time.sleep(_POLL)


def _try_lock(file: TextIO, folder: pathlib.Path) -> bool:
    """Returns whether the file could be locked at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"--workdir {folder}: its file system cannot lock a file ({error.strerror}), which "
            "would keep a second run out. Mount it with locks (Lustre: -o flock; NFS: without "
            "nolock), or give another --workdir"
        ) from None
    return True


def _machine() -> str:
    """Returns an identifier of this machine since its last start.

    The host's name does not identify a machine: a pod that replaces another one elsewhere has the
    same name.
    """
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()
