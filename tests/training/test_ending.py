"""The end of a run: early stopping, the checkpoint in model/, signs that nothing was learned."""

import json
import os
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest

from mbv2_jax import model_dir
from mbv2_jax.training import ending
from mbv2_jax.training.best import Best
from tests.support import commands, short_network
from tests.support.commands import checkpoints

# After the second epoch the learning rate is so high that the loss can only rise; clipped gradients
# keep it finite. It does not depend on the length of the run, so that all runs share a program.
RISING = [
    "--config.schedule.name=step",
    "--config.schedule.milestones=(1.0,)",
    "--config.schedule.factor=100.0",
    "--config.optimizer.clip_norm=1.0",
    "--config.num_epochs=4.0",
    "--config.checkpoint.patience=2",
]


def last_line(out: str) -> dict[str, float]:
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def early(tiny, cache, tmp_path_factory) -> tuple[pathlib.Path, str, str]:
    """A run that ends early: its workdir and outputs."""
    workdir = tmp_path_factory.mktemp("early") / "run"
    status, out, err = commands.run(cache, *tiny(workdir), *RISING)
    assert status == 0, err
    return workdir, out, err


def evaluations(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    lines = [line for line in commands.metrics(workdir) if line["split"] == "eval"]
    return {
        line["step"]: {name: line[name] for name in ("top1", "top5", "loss", "examples")}
        for line in lines
    }


def test_run_ends_after_so_many_evaluations_and_its_model_is_the_best(tiny, cache, early):
    workdir, out, err = early
    results = evaluations(workdir)
    best = min(results, key=lambda step: results[step]["loss"])
    last = best + 2 * 15  # two more evaluations, 15 steps apart
    value = f"{results[best]['loss']:.4f}"
    assert list(results) == list(range(15, last + 1, 15)) and last < 120
    why = f"2 evaluations, and checkpoint.patience allows 2, did not improve on loss {value}"
    assert f"ended early after step {last} of 120: {why} (step {best})" in err
    assert f"model/ is step {best}, the best (loss {value}); " in err
    assert f"{workdir}:last opens the last, {last}" in err
    assert last_line(out) == results[best]

    with short_network.in_use():
        model, kept = model_dir.read(workdir), model_dir.read(f"{workdir}:best")
    np.testing.assert_equal(model.variables(), kept.variables())
    origin = json.loads((workdir / "model" / "model.json").read_text())["origin"]
    assert (origin["step"], origin["checkpoint"], origin["last_step"]) == (best, "best", last)
    assert origin["best"]["result"] == results[best]
    for name, step in (("", best), (":last", last)):
        checkpoint = f"--checkpoint={workdir}{name}"
        status, out, err = commands.run(cache, *tiny(workdir), "--mode=eval", checkpoint)
        assert status == 0, err
        assert last_line(out) == results[step]


@pytest.mark.slow
def test_killed_run_ends_at_the_same_step_with_the_same_bits(tiny, cache, early, tmp_path):
    whole, whole_out, _ = early
    workdir = tmp_path / "run"
    process = commands.start(cache, *tiny(workdir), *RISING)
    end = time.monotonic() + 120
    while 30 not in checkpoints(workdir):  # one evaluation before the last at the latest
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (workdir / "model").exists()
    status, out, err = commands.run(cache, *tiny(workdir), *RISING)
    assert status == 0, err
    assert "continuing after step" in err
    assert out == whole_out
    assert checkpoints(workdir) == checkpoints(whole)
    assert commands.metrics(workdir) == commands.metrics(whole)
    for item in (f"checkpoints/{checkpoints(whole)[-1]}/state", "model/arrays"):
        np.testing.assert_equal(commands.arrays(workdir / item), commands.arrays(whole / item))
    ours, theirs = (
        json.loads((run / "model" / "model.json").read_text()) for run in (workdir, whole)
    )
    assert ours["origin"] == theirs["origin"]


@pytest.mark.slow
def test_run_that_ended_early_is_finished_until_it_may_go_on(tiny, cache, early, tmp_path):
    whole, whole_out, _ = early
    workdir = shutil.copytree(whole, tmp_path / "run")
    last = checkpoints(workdir)[-1]
    status, out, err = commands.run(cache, *tiny(workdir), *RISING)
    assert status == 0, err
    assert f"already finished (step {last} of 120; 2 evaluations, and checkpoint" in err
    assert out == whole_out
    assert checkpoints(workdir)[-1] == last

    # A best checkpoint that is damaged does not cost the model: the last one is written.
    best = json.loads((workdir / "model" / "model.json").read_text())["origin"]["step"]
    largest = max((workdir / f"checkpoints/{best}/state/d").iterdir(), key=os.path.getsize)
    largest.write_bytes(largest.read_bytes()[:-1])
    shutil.rmtree(workdir / "model")
    status, out, err = commands.run(cache, *tiny(workdir), *RISING)
    assert status == 0, err
    assert "the best checkpoint is left out: " in err and f"model/ is step {last}, the last" in err

    # With more patience it goes on.
    status, out, err = commands.run(
        cache, *tiny(workdir), *RISING, "--config.checkpoint.patience=3"
    )
    assert status == 0, err
    assert f"ended early after step {last + 15} of 120" in err


def test_another_evaluation_has_another_best(tiny, cache, unbroken, tmp_path):
    workdir = shutil.copytree(unbroken[0], tmp_path / "run")
    # Of 15 images more or less, every number differs.
    other = ["--config.data.eval_split=test[:345]", "--config.checkpoint.patience=1"]
    status, out, err = commands.run(cache, *tiny(workdir), *other)
    assert status == 0, err
    assert "the evaluation is another one now" in err
    assert "model/ is step 60, the last" in err
    assert last_line(out)["examples"] == 345


def test_damaged_evaluation_of_a_checkpoint_is_ignored(tiny, cache, unbroken, tmp_path):
    workdir = shutil.copytree(unbroken[0], tmp_path / "run")
    for step in checkpoints(workdir)[:-1]:
        (workdir / "checkpoints" / str(step) / "metrics" / "metrics").write_bytes(b"")
    status, out, err = commands.run(cache, *tiny(workdir))
    assert status == 0, err
    assert "is damaged, and ignored" in err and "Traceback" not in err
    assert out.splitlines()[-1] == unbroken[1]


def test_best_counts_evaluations_that_are_not_better():
    best = Best("top1")
    counted = []
    for step, value in enumerate([10.0, 30.0, 20.0, 30.0, 30.0, 31.0, 5.0]):
        best = best.after(step, {"top1": value})
        counted.append((best.step, best.stale))
        again = Best.continued({"best": best.to_json(), "total_steps": 9}, "top1", 9)
        assert again == best  # through a checkpoint
    assert counted == [(0, 0), (1, 0), (1, 1), (3, 2), (4, 3), (5, 0), (5, 1)]
    assert best.has_stalled(1) and not best.has_stalled(2) and not best.has_stalled(None)
    origin = {"best": best.to_json(), "total_steps": 9}
    assert Best.continued(origin, "top1", 10).stale == 0  # a longer run
    assert Best.continued(origin, "loss", 9) == Best("loss") == Best.continued({}, "loss", 9)


def test_run_that_learned_says_which_checkpoint_its_model_is(unbroken):
    workdir, _ = unbroken
    results = evaluations(workdir)
    origin = json.loads((workdir / "model" / "model.json").read_text())["origin"]
    best = min(results, key=lambda step: results[step]["loss"])
    assert (origin["step"], origin["checkpoint"], origin["last_step"]) == (60, "last", 60)
    assert (origin["best"]["step"], origin["best"]["by"]) == (best, "loss")
    assert origin["best"]["result"] == results[best]


@pytest.mark.slow
def test_run_that_learned_nothing_says_so_also_when_it_is_continued(tiny, cache, tmp_path):
    workdir = tmp_path / "run"
    still = ["--config.schedule.base_lr=0.0", "--config.schedule.warmup_steps=45"]
    still.append("--config.schedule.name=constant")  # one program for both lengths
    status, out, err = commands.run(cache, *tiny(workdir), *still, "--config.num_epochs=1.0")
    assert status == 0, err
    assert set(last_line(out)) == {"top1", "top5", "loss", "examples"}
    assert "means of 3 logged steps" in err
    assert (
        "the learning rate never left its warm-up, which takes 45 steps, and the run ended " in err
    )
    status, out, err = commands.run(cache, *tiny(workdir), *still)
    assert status == 0, err
    # 10.00 is the share of the largest class, 36 of scikit-learn's 360 digits.
    assert (
        "no better than chance (10.00 by always naming the largest class, 13.16 with luck)" in err
    )
    assert "means of 6 logged steps" in err  # those before the second start are among them
    assert "warm-up" not in err
    assert set(last_line(out)) == {"top1", "top5", "loss", "examples"}


def test_loss_has_to_fall_beyond_its_noise():
    noisy = 1.6 + np.random.default_rng(0).normal(0, 0.1, 30)
    assert "did not fall: 1.6" in ending._loss_stayed(noisy.tolist())
    assert "did not fall" in ending._loss_stayed((noisy + np.linspace(0, 2, 30)).tolist())
    assert ending._loss_stayed((noisy - np.linspace(0, 0.5, 30)).tolist()) == ""
    # Too few lines to know the noise.
    assert ending._loss_stayed([1.6] * 8) == ""
    assert "did not fall" in ending._loss_stayed([1.6] * 9)
