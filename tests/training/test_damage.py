"""Checkpoints that are damaged, and disks that are full: what was saved before is not lost."""

import pathlib
import resource
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from tests.training import commands
from tests.training.test_resume import checkpoints


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


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_the_config])
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
    assert (workdir / "damaged" / str(newest)).is_dir()  # for whoever wants to know


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
    assert f"error: no checkpoint in {workdir / 'checkpoints'} is whole" in err
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*")} == before
    # Nor is such a one evaluated.
    checkpoint = f"--checkpoint={workdir / 'checkpoints' / str(step)}"
    status, out, err = commands.run(cache, *tiny(workdir), "--mode=eval", checkpoint)
    assert (status, out) == (2, "")
    assert "by their SHA-256, they are not what was saved" in err or "cannot be read" in err


def test_save_that_fails_stops_the_run_and_leaves_the_earlier_ones(tiny, cache, unbroken, tmp_path):
    """The stand-in for a full disk: a limit on the size of files, below that of the arrays'."""
    whole, line = unbroken
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before, newest = checkpoints(workdir)[-2:]
    shutil.rmtree(workdir / "checkpoints" / str(newest))
    saved = commands.arrays(workdir / "checkpoints" / str(before) / "state")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = commands.start(cache, *tiny(workdir), preexec_fn=limit)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, ""), err
    last = err.splitlines()[-1]
    assert last.startswith(f"failed: a checkpoint cannot be saved in {workdir}/checkpoints: ")
    assert last.endswith(f"last good checkpoint: {workdir}/checkpoints/{before}")
    assert newest not in checkpoints(workdir)
    kept = commands.arrays(workdir / "checkpoints" / str(before) / "state")
    for name in saved:
        np.testing.assert_array_equal(kept[name], saved[name], err_msg=name)

    status, out, err = commands.run(cache, *tiny(workdir))
    assert status == 0, err
    assert out.splitlines()[-1] == line
