"""One run at a time in a workdir on a disk; tests/storage/test_bucket.py has those in a bucket."""

import errno
import fcntl
import json
import os
import threading

import pytest

from mbv2_jax.errors import UserError
from mbv2_jax.storage import lock


def test_lock_of_a_host_that_died_is_waited_for(tmp_path, capsys):
    """NFS gives it back after a while; here another open file of this process does."""
    with (tmp_path / ".lock").open("w") as file:
        json.dump({"host": "elsewhere", "pid": 7, "machine": "another"}, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        lapse = threading.Timer(2, fcntl.flock, (file, fcntl.LOCK_UN))
        lapse.start()
        with lock.exclusive(tmp_path):
            assert not lapse.is_alive()
    said = capsys.readouterr().err
    assert f"another run is or was at work in {tmp_path} (elsewhere, process 7): waiting" in said


def test_lock_of_a_host_that_lives_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_NFS_TIMEOUT", 1.5)
    with (tmp_path / ".lock").open("w") as file:
        json.dump({"host": "elsewhere", "pid": 7, "machine": "another"}, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"at work in .* \(elsewhere, process 7\): wait for it"):
            lock.check_free(tmp_path)


def test_lock_of_another_user_is_reported(tmp_path):
    (tmp_path / ".lock").mkdir()  # root may write what is another's, but no folder
    with pytest.raises(UserError, match=r"--workdir .* cannot be written: Is a directory"):
        lock.check_free(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def flock(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match="its file system cannot lock a file"),
        lock.exclusive(tmp_path),
    ):
        raise AssertionError("locked")


def test_processes_that_share_a_run_do_not_lock(tmp_path):
    with lock.exclusive(tmp_path), lock.exclusive(tmp_path, acquire=False) as check:
        check()
