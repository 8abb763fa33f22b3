"""The checkpoints of a run by name: WORKDIR:best, WORKDIR:last, WORKDIR:STEP."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax import checkpoint_names, inference, model_dir
from mbv2_jax.errors import UserError
from mbv2_jax.training.checkpoint import Checkpoints
from mbv2_jax.training.settings import Checkpoint
from mbv2_jax.training.state import TrainState
from tests.support import tiny_model

Results = Mapping[int, dict[str, float] | None]


def save(run: pathlib.Path, results: Results, split: str = "val", **fields: Any) -> None:
    """Saves a checkpoint with the tiny weights of each step's number as seed, with its result."""
    settings = Checkpoint(**{"best_metric": "top1", "keep_last": 10, **fields})
    config = {"checkpoint": {"best_metric": settings.best_metric}, "data": {"eval_split": split}}
    best = {"step": 3, "by": "top1"}
    with Checkpoints(run, settings) as checkpoints:
        for step, result in results.items():
            arrays = jax.tree.map(jnp.asarray, tiny_model.variables(step))
            state = TrainState(jnp.int32(step), **arrays, opt_state={}, ema=None)
            origin = {"step": step, "best": best}
            description = dataclasses.replace(tiny_model.DESCRIPTION, origin=origin)
            checkpoints.save(state, config, description, result)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("named") / "run"
    results = {3: {"top1": 60.0, "loss": 0.5}, 9: {"top1": 50.0, "loss": 0.4}, 10: None}
    save(run, results)
    return run


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved, tmp_path / "run")


def opened(path: object) -> int:
    """Returns the step of the checkpoint whose arrays are read."""
    found = model_dir.read(str(path))
    step = found.description.origin["step"]
    expected = tiny_model.variables(step)["params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(found.params["classifier"]["kernel"], expected)
    return step


def test_best_last_and_steps_open_their_checkpoint(run, capsys):
    assert opened(f"{run}:best") == 3
    assert capsys.readouterr().err == f"{run}:best is step 3: top1 60\n"
    assert opened(f"{run}:last") == 10
    assert opened(f"{run}:9") == 9
    assert opened(f"{run}/:best") == 3
    assert opened(run) == 10
    predictor = inference.init_model(f"{run}:best")
    assert predictor.class_names == tiny_model.CLASSES


def test_of_equal_ones_the_latest_is_the_best_and_a_smaller_loss_is_better(tmp_path):
    save(tmp_path / "equal", {3: {"top1": 60.0}, 9: {"top1": 60.0}})
    assert opened(f"{tmp_path / 'equal'}:best") == 9
    losses = {3: {"loss": 0.4}, 9: {"loss": 0.5}}
    save(tmp_path / "loss", losses, best_metric="loss")
    assert opened(f"{tmp_path / 'loss'}:best") == 3


def test_the_best_survives_a_restart(tmp_path):
    """The metrics of a checkpoint are on the disk, and not only in the process that saved it."""
    result = {"top1": 60.0}
    save(tmp_path / "run", {3: result}, keep_last=1)
    for step in (9, 10):
        save(tmp_path / "run", {step: {"top1": 50.0}}, keep_last=1)
    assert model_dir.training_steps(tmp_path / "run") == [3, 10]
    assert opened(f"{tmp_path / 'run'}:best") == 3


def test_a_best_that_was_not_kept_is_mentioned(run, capsys):
    shutil.rmtree(run / "checkpoints" / "3")
    assert opened(f"{run}:best") == 9
    assert "step 3 was better, but it has no checkpoint" in capsys.readouterr().err


def test_evaluations_on_other_images_do_not_count(run):
    save(run, {12: {"top1": 10.0}}, split="test")
    assert opened(f"{run}:best") == 12


def test_a_folder_of_that_name_comes_first(run):
    tiny_model.write(run.with_name("run:best"), seed=5)
    found = model_dir.read(f"{run}:best")
    assert found.description == tiny_model.DESCRIPTION


def fails(path: object) -> str:
    with pytest.raises(UserError) as error:
        model_dir.read(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_names_that_stand_for_nothing_are_explained(run, tmp_path):
    assert f"{run} has no checkpoint of step 4; it has 3, 9, 10" in fails(f"{run}:4")
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere} is not a training run with checkpoints" in fails(f"{nowhere}:best")
    model = tiny_model.write(tmp_path / "model")
    assert "is not a training run with checkpoints" in fails(f"{model}:last")
    for step in (3, 9):
        shutil.rmtree(run / "checkpoints" / str(step) / "metrics")
    message = fails(f"{run}:best")
    assert "no checkpoint in" in message and "name one by its step: 3, 9, 10" in message


def test_a_damaged_checkpoint_is_refused(run):
    (largest,) = (run / "checkpoints/3/state/d").iterdir()
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    message = fails(f"{run}:best")
    assert str(run / "checkpoints" / "3" / "state") in message
    assert "damaged" in message or "cannot be read" in message
    (run / "checkpoints/3/metrics/metrics").write_text("{")
    assert "checkpoints/3/metrics/metrics is damaged" in fails(f"{run}:best")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("runs/a:best", ("runs/a", "best")),
        ("gs://bucket/runs/a:414", ("gs://bucket/runs/a", "414")),
        ("gs://bucket/runs/a", ("gs://bucket/runs/a", "")),
        ("https://host/a.pth:1", ("https://host/a.pth:1", "")),
        ("runs/a:bets", ("runs/a:bets", "")),
        ("runs:2/a", ("runs:2/a", "")),
    ],
)
def test_addresses_keep_their_colons(source, parts):
    assert checkpoint_names.split(source) == parts
