"""One run at a time in a workdir on a disk."""

import errno
import fcntl
import json
import os
import pathlib
import threading

import pytest

from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.training import loop, workdir


def test_lock_of_a_host_that_died_is_waited_for(tmp_path, capsys):
    """NFS gives it back after a while; here another open file of this process does."""
    with (tmp_path / ".lock").open("w") as file:
        json.dump({"host": "elsewhere", "pid": 7, "machine": "another"}, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        lapse = threading.Timer(2, fcntl.flock, (file, fcntl.LOCK_UN))
        lapse.start()
        with workdir.alone_in(tmp_path):
            assert not lapse.is_alive()
    said = capsys.readouterr().err
    assert f"another run is or was at work in {tmp_path} (elsewhere, process 7): waiting" in said


def test_lock_of_a_host_that_lives_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "_LAPSE", 1.5)
    with (tmp_path / ".lock").open("w") as file:
        json.dump({"host": "elsewhere", "pid": 7, "machine": "another"}, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"at work in .* \(elsewhere, process 7\): wait for it"):
            workdir.check_alone(tmp_path)


def test_run_whose_disk_goes_away_ends_in_a_line(tmp_path, monkeypatch):
    is_dir = pathlib.Path.is_dir

    def stale(path: pathlib.Path) -> bool:
        if path.name == "checkpoints":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return is_dir(path)

    monkeypatch.setattr(pathlib.Path, "is_dir", stale)
    with (
        pytest.raises(RunFailed, match=r"^why; last good checkpoint: it cannot be seen now$"),
        loop._ending_in_a_line(tmp_path),
    ):
        raise RunFailed("why")


def test_lock_that_is_another_users_is_said(tmp_path):
    (tmp_path / ".lock").mkdir()  # root may write what is another's, but no folder
    with pytest.raises(UserError, match=r"--workdir .* cannot be written: Is a directory"):
        workdir.check_alone(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def flock(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match="its file system cannot lock a file"),
        workdir.alone_in(tmp_path),
    ):
        raise AssertionError("locked")
