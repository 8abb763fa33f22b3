"""The plan of a run: the splits of its data, and refusals before anything is written."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from mbv2_jax import model_dir
from mbv2_jax.configs import digits
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.runtime import processes
from mbv2_jax.training import plan
from tests.support import tiny_model


@pytest.fixture
def config(tmp_path):
    """The digits' recipe on a folder of 60 images in three classes."""
    for label in "abc":
        folder = tmp_path / "photos" / "train" / label
        folder.mkdir(parents=True)
        for number in range(20):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    config = digits.get_config()
    config.data.source = f"folder:{tmp_path / 'photos'}"
    config.data.data_dir = str(tmp_path / "data")
    config.model.num_classes = 3
    config.batch_size = 8
    return config


def made(
    config, train: str, held_out: str, workdir: pathlib.Path, checkpoint: str | None = None
) -> plan.Plan:
    config.data.train_split, config.data.eval_split = train, held_out
    return plan.plan(config, str(workdir), checkpoint, processes.single())


def test_a_part_of_the_training_split_may_be_held_out(config, tmp_path):
    found = made(config, "train[15:]", "train[:15]", tmp_path / "run")
    assert len(found.train_source) == 45
    assert len(found.evaluation.source) == 15
    config.data.source, config.model.num_classes = "digits", 10
    found = made(config, "train[10%:]", "train[:10%]", tmp_path / "run")
    assert len(found.train_source) + len(found.evaluation.source) == 1437


def test_held_out_images_must_not_be_trained_on(config, tmp_path):
    for train, held_out in [
        ("train", "train"),
        ("train[10:]", "train[:15]"),
        ("train", "train[:1]"),
    ]:
        with pytest.raises(UserError, match="hold the same images, or some of them"):
            made(config, train, held_out, tmp_path / "run")
    config.data.source, config.model.num_classes = "digits", 10
    with pytest.raises(UserError, match=r"'train' and 'test\+train\[:5\]' hold the same images"):
        made(config, "train", "test+train[:5]", tmp_path / "run")


def test_checkpoint_that_another_run_saved_meanwhile_stops_a_run(config, tmp_path):
    found = made(config, "train[15:]", "train[:15]", tmp_path / "run")
    plan.check_current(found)
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(RunFailed, match=r"saved step 7 in .*: give the same command again"):
        plan.check_current(found)


def test_made_up_statistics_are_not_trained_with(config, tmp_path):
    spec = tiny_model.SPEC.replace({"model.folded_norm": True})
    description = dataclasses.replace(tiny_model.DESCRIPTION, spec=spec)
    model_dir.write(tmp_path / "model", **tiny_model.variables(), description=description)
    config.model.width = config.model.strides = None  # the checkpoint's
    arguments = (config, "train[15:]", "train[:15]", tmp_path / "run", str(tmp_path / "model"))
    with pytest.raises(
        UserError, match=r"model\.folded_norm is True: .* Give --config\.model\.norm_eval=true"
    ):
        made(*arguments)
    assert not (tmp_path / "run").exists()
    config.model.norm_eval = True
    found = made(*arguments)
    # The trained model's statistics are still those.
    assert found.config["model"]["folded_norm"] is True
    # Nothing is trained where only a head is fitted.
    config.model.norm_eval, config.num_epochs, config.fit_head = False, 0.0, True
    assert made(*arguments).total_steps == 0


def test_fast_decoding_without_its_libraries_is_refused_before_anything_is_written(
    config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # as if it were not installed
    config.data.train_decode = "fast"
    with pytest.raises(UserError, match=r"pip install '\.\[fast\]'"):
        made(config, "train[15:]", "train[:15]", tmp_path / "run")
    assert not (tmp_path / "run").exists()
