"""Damaged checkpoints and full disks: what was saved before is not lost."""

import errno
import os
import pathlib
import resource
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from mbv2_jax.errors import RunFailed
from mbv2_jax.training import loop
from tests.support import commands, groups
from tests.support.commands import checkpoints


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max(
        (file for file in folder.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
    )


def flip_a_bit(step: pathlib.Path) -> None:
    file = largest(step / "state")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(step: pathlib.Path) -> None:
    file = largest(step / "state")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def lose_the_config(step: pathlib.Path) -> None:
    (step / "config" / "metadata").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        pytest.param(truncate, marks=pytest.mark.slow),
        pytest.param(lose_the_config, marks=pytest.mark.slow),
    ],
)
def test_falls_back_to_the_checkpoint_before(
    tiny, cache, unbroken, tmp_path, damage: Callable[[pathlib.Path], None]
):
    whole, line = unbroken
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before, newest = checkpoints(workdir)[-2:]
    damage(workdir / "checkpoints" / str(newest))
    status, out, err = commands.run(cache, *tiny(workdir))
    assert status == 0, err
    assert f"checkpoint of step {newest} is damaged, and not used: " in err
    assert f"continuing after step {before}" in err
    assert out.splitlines()[-1] == line
    assert commands.metrics(workdir) == commands.metrics(whole)
    for item in (f"checkpoints/{newest}/state", "model/arrays"):
        ours, theirs = commands.arrays(workdir / item), commands.arrays(whole / item)
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert (workdir / "damaged" / str(newest)).is_dir()  # kept for inspection


def test_no_whole_checkpoint_is_an_error_and_nothing_is_overwritten(
    tiny, cache, unbroken, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    for step in checkpoints(workdir):
        flip_a_bit(workdir / "checkpoints" / str(step))
    before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*")}
    status, out, err = commands.run(cache, *tiny(workdir))
    assert (status, out) == (2, "")
    assert f"error: every checkpoint in {workdir / 'checkpoints'} is damaged" in err
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*")} == before
    # A damaged checkpoint is not evaluated either.
    checkpoint = f"--checkpoint={workdir / 'checkpoints' / str(step)}"
    status, out, err = commands.run(cache, *tiny(workdir), "--mode=eval", checkpoint)
    assert (status, out) == (2, "")
    assert "by their SHA-256, they are not what was saved" in err or "cannot be read" in err


@pytest.mark.parametrize("part", ["state", pytest.param("model", marks=pytest.mark.slow)])
def test_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    tiny, cache, unbroken, tmp_path, part
):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    newest = checkpoints(workdir)[-1]
    file = largest(workdir / "checkpoints" / str(newest) / part)
    file.unlink()
    file.symlink_to("/proc/self/mem")  # whose first byte is an I/O error
    before = {file: file.lstat().st_mtime_ns for file in workdir.rglob("*")}
    status, out, err = commands.run(cache, *tiny(workdir))
    assert (status, out) == (1, ""), err
    assert err.splitlines()[-1].startswith(
        f"failed: {file} cannot be read now: Input/output error. Nothing is lost: "
    )
    assert {file: file.lstat().st_mtime_ns for file in workdir.rglob("*")} == before


def run_limited(cache: pathlib.Path, *arguments: str, size: int) -> tuple[int, str, str]:
    """Runs a command as `commands.run` does; no file may exceed `size`, as on a full disk."""
    process = commands.start(cache, *arguments)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# At 10 bytes not even the lock can be written, at 1000 the lock, but not the next file.
@pytest.mark.parametrize("size", [10, 1000])
def test_disk_that_is_full_from_the_beginning_is_said(tiny, cache, unbroken, tmp_path, size):
    workdir = tmp_path / "run"
    status, out, err = run_limited(cache, *tiny(workdir), size=size)
    assert (status, out) == (1, ""), err
    last = err.splitlines()[-1]
    assert last.startswith(f"failed: {workdir}"), last
    assert last.endswith("File too large; last good checkpoint: none was saved yet")
    assert "Traceback" not in err


def test_save_that_fails_stops_the_run_and_leaves_the_earlier_ones(tiny, cache, tmp_path):
    workdir = tmp_path / "run"
    # The last convolution makes the arrays larger than all other files; the limit is between.
    arguments = [*tiny(workdir), "--config.model.last_convolution=True"]
    process = commands.start(cache, *arguments)
    groups.wait_for(lambda: checkpoints(workdir), [process])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (120_000, 120_000))
    before = max(checkpoints(workdir))
    saved = commands.arrays(workdir / "checkpoints" / str(before) / "state")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, ""), err
    last = err.splitlines()[-1]
    assert last.startswith(f"failed: a checkpoint cannot be saved in {workdir}/checkpoints: ")
    assert last.endswith(f"last good checkpoint: {workdir}/checkpoints/{before}")
    assert "Traceback" not in err  # tensorstore would print one for every array
    assert max(checkpoints(workdir)) == before
    kept = commands.arrays(workdir / "checkpoints" / str(before) / "state")
    for name in saved:
        np.testing.assert_array_equal(kept[name], saved[name], err_msg=name)

    status, _, err = commands.run(cache, *arguments)
    assert status == 0, err
    assert f"continuing after step {before}" in err


def test_run_whose_disk_goes_away_ends_in_a_line(tmp_path, monkeypatch):
    is_dir = pathlib.Path.is_dir

    def stale(path: pathlib.Path) -> bool:
        if path.name == "checkpoints":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return is_dir(path)

    monkeypatch.setattr(pathlib.Path, "is_dir", stale)
    with (
        pytest.raises(RunFailed, match=r"^why; last good checkpoint: it cannot be seen now$"),
        loop._naming_last_checkpoint(tmp_path),
    ):
        raise RunFailed("why")
