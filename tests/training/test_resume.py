"""A run that is killed and started again ends with the same bits as one that never stopped."""

import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import PIL.Image
import pytest

from tests.support import commands, fake_gcs
from tests.support.commands import checkpoints, logged_step


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Waits until `condition` holds, while the process still runs."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end, "nothing seen in two minutes"
        time.sleep(0.001)


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_inside_a_save(workdir: pathlib.Path, process: subprocess.Popen) -> int:
    """Kills the process while Orbax's temporary directory exists; returns the step being saved."""
    pattern = "checkpoints/*.orbax-checkpoint-tmp*"
    while True:
        wait_for(lambda: any(workdir.glob(pattern)), process)
        os.killpg(process.pid, signal.SIGSTOP)
        half = [path for path in workdir.glob(pattern) if path.is_dir()]
        step = int(half[0].name.partition(".")[0]) if half else None
        if step is not None and step not in checkpoints(workdir):
            break  # the process is stopped: the kill leaves the files as they are now
        os.killpg(process.pid, signal.SIGCONT)
    kill(process)
    assert half[0].is_dir() and step not in checkpoints(workdir)
    return step


def test_killed_and_continued_run_equals_the_unbroken_one(tiny, cache, unbroken, tmp_path):
    whole, last_line = unbroken
    workdir = tmp_path / "run"

    # Before anything is saved.
    process = commands.start(cache, *tiny(workdir))
    wait_for(lambda: logged_step(workdir) >= 3, process)
    kill(process)
    assert not checkpoints(workdir)

    # Between two saves, with lines in the log that no checkpoint covers.
    process = commands.start(cache, *tiny(workdir, workers=2))
    wait_for(
        lambda: checkpoints(workdir) and logged_step(workdir) > max(checkpoints(workdir)), process
    )
    kill(process)
    saved = checkpoints(workdir)

    # Inside a save.
    process = commands.start(cache, *tiny(workdir, workers=1))
    half_saved = kill_inside_a_save(workdir, process)
    complete = checkpoints(workdir)
    assert max(complete) >= max(saved)

    # SIGTERM to the whole group, as a cluster or a terminal does.
    process = commands.start(cache, *tiny(workdir, workers=2))
    wait_for(lambda: logged_step(workdir) > half_saved, process)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"continuing after step {max(complete)}" in err
    assert "same command again" in err, err
    stopped = max(checkpoints(workdir))
    assert half_saved < stopped < checkpoints(whole)[-1]
    assert f"stopped after step {stopped} " in err

    status, out, err = commands.run(cache, *tiny(workdir))
    assert status == 0, err
    assert f"continuing after step {stopped}" in err

    assert out.splitlines()[-1] == last_line
    commands.assert_equal_runs(workdir, whole)


def test_stops_where_an_evaluation_is_due_too(tiny, cache, tmp_path):
    workdir = tmp_path / "run"
    process = commands.start(cache, *tiny(workdir), "--config.log.eval_every_epochs=0.01")
    wait_for(lambda: logged_step(workdir) >= 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "same command again" in err
    assert not out and not (workdir / "model").exists()
    (step,) = checkpoints(workdir)
    last = commands.metrics(workdir)[-1]
    assert (last["step"], last["split"]) == (step, "eval")


def test_second_run_in_a_workdir_is_refused(tiny, cache, tmp_path):
    workdir = tmp_path / "run"
    process = commands.start(cache, *tiny(workdir), "--config.num_epochs=1000")
    wait_for(lambda: logged_step(workdir) >= 3, process)
    status, _, err = commands.run(cache, *tiny(workdir), "--config.num_epochs=1000")
    assert status == 2
    owner = f"({socket.gethostname()}, process {process.pid})"
    assert f"another run is at work in {workdir} {owner}: wait for it, or" in err
    assert process.poll() is None
    kill(process)


def test_finished_run_started_again_prints_the_same_line(tiny, cache, unbroken):
    workdir, last_line = unbroken
    kept = [path for path in workdir.rglob("*") if "model" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in kept if path.is_file()}
    status, out, err = commands.run(cache, *tiny(workdir))
    assert status == 0, err
    assert out.splitlines()[-1] == last_line
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"config.json", ".lock"}


class BucketRun:
    """A run of the tiny config in a bucket, which can be killed when it writes a certain object."""

    prefix = "runs/tiny/"

    def __init__(self, server: fake_gcs.Server, cache: pathlib.Path, arguments: list[str]):
        self.server, self.cache = server, cache
        self.arguments = [*arguments, "--config.checkpoint.every_steps=20"]

    def is_complete(self, step: int) -> bool:
        return f"{self.prefix}checkpoints/{step}/commit_success.txt" in self.server.names("bucket")

    def kill_when_it_writes(self, name: str, after: int | None = None) -> None:
        """`after`: only when that checkpoint is complete."""
        server = self.server
        server.held.clear()
        server.hold = lambda written: (
            written == self.prefix + name and (after is None or self.is_complete(after))
        )
        process = commands.start(self.cache, *self.arguments, env=server.environment)
        wait_for(server.held.is_set, process)
        kill(process)
        server.hold = lambda written: False
        server.age("bucket", f"{self.prefix}.lock", 61)  # a minute passes

    def finish(self) -> tuple[str, str]:
        """Returns standard output and standard error."""
        status, out, err = commands.run(self.cache, *self.arguments, env=self.server.environment)
        assert status == 0, err
        return out, err


@pytest.fixture
def in_bucket(tiny, cache):
    with fake_gcs.Server("bucket") as server:
        yield BucketRun(server, cache, tiny("gs://bucket/runs/tiny"))


@pytest.mark.slow
def test_run_in_a_bucket_that_is_killed_in_a_save_equals_the_unbroken_one(
    in_bucket, unbroken, tmp_path
):
    whole, last_line = unbroken
    in_bucket.kill_when_it_writes("checkpoints/40/commit_success.txt")
    assert in_bucket.is_complete(20) and not in_bucket.is_complete(40)
    out, err = in_bucket.finish()
    assert "continuing after step 20" in err
    assert out.splitlines()[-1] == last_line
    server = in_bucket.server
    commands.assert_equal_runs(server.download("bucket", in_bucket.prefix, tmp_path / "run"), whole)
    left = {name.split("/")[2] for name in server.names("bucket", in_bucket.prefix)}
    assert left == {
        "checkpoints", "config.json", "curves.png", "metrics.jsonl", "model", "tensorboard",
    }  # fmt: skip


@pytest.mark.slow
def test_run_in_a_bucket_is_killed_finished_evaluated_and_predicted_with(
    in_bucket, tiny, cache, unbroken, tmp_path
):
    whole, last_line = unbroken
    # Between two saves: the log goes further than the newest checkpoint.
    in_bucket.kill_when_it_writes("metrics.jsonl", after=20)
    in_bucket.arguments.append("--config.data.workers=2")
    out, err = in_bucket.finish()
    assert "continuing after step 20" in err
    server, address = in_bucket.server, "gs://bucket/runs/tiny"
    commands.assert_equal_runs(server.download("bucket", in_bucket.prefix, tmp_path / "run"), whole)

    out, err = in_bucket.finish()
    assert "already finished" in err
    assert out.splitlines()[-1] == last_line
    env = server.environment
    evaluate = [*tiny(address), "--mode=eval", "--out=gs://bucket/predicted.jsonl"]
    evaluate.append(f"--checkpoint={address}:last")
    status, out, err = commands.run(cache, *evaluate, env=env)
    assert (status, out.splitlines()[-1]) == (0, last_line), err
    assert len(server.read("bucket", "predicted.jsonl").splitlines()) == 360
    status, _, err = commands.run(cache, *evaluate, env=env)
    assert (status, "--out=gs://bucket/predicted.jsonl exists already" in err) == (2, True)
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    predict = [str(tmp_path / "black.png"), "--json", "--topk=1", "--checkpoint"]
    answers = [
        commands.run(cache, *predict, place, module="tests.support.short_predict", env=env)
        for place in (address, str(whole))
    ]
    assert answers[0][0] == 0, answers[0][2]
    assert answers[0][1] == answers[1][1] != ""


@pytest.mark.slow
def test_damaged_checkpoint_in_a_bucket_is_set_aside(in_bucket, unbroken, tmp_path):
    whole, last_line = unbroken
    in_bucket.kill_when_it_writes("model/model.json")
    assert in_bucket.is_complete(60)
    server, state = in_bucket.server, f"{in_bucket.prefix}checkpoints/60/state/d/"
    (name,) = server.names("bucket", state)
    server.put("bucket", name, server.read("bucket", name)[:-100])
    out, err = in_bucket.finish()
    assert "checkpoint of step 60 is damaged, and not used" in err
    assert "continuing after step 40" in err
    assert out.splitlines()[-1] == last_line
    run = server.download("bucket", in_bucket.prefix, tmp_path / "run")
    commands.assert_equal_runs(run, whole)
    assert (run / "damaged" / "60" / "state").is_dir()
