"""The head that a run fits before it trains, through the command, against scikit-learn."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import Ridge

import mbv2_jax
from mbv2_jax import model_dir
from tests.support import commands, tiny_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noisy photos of three classes whose colours lie close together."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 8)):
        for level, name in enumerate(("dark", "grey", "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.normal(100 + 40 * level, 50, (40, 50, 3)).clip(0, 255)
                path = folder / split / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def arguments(photos, tmp_path_factory):
    model = tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")
    return [f"--checkpoint={model}", f"--config.data.source=folder:{photos}"]


def test_a_probe_is_ridge_regression_on_the_features(cache, photos, arguments, tmp_path):
    run = tmp_path / "probe"
    # 27 photos in batches of 8: the last batch is filled up with photos that must not count twice.
    command = ["--config=probe", *arguments, "--config.batch_size=8", f"--workdir={run}"]
    status, out, err = commands.run(cache, *command, module=commands.WHOLE, devices=2)
    assert status == 0, err
    assert "fitted the classifier to the features of 27 images" in err
    assert "num_epochs is 0: nothing to train" in err
    assert json.loads(out.splitlines()[-1])["examples"] == 24

    before = mbv2_jax.init_model(arguments[0].partition("=")[2])
    features = np.asarray(before.extract_feat(photos / "train"), np.float64)  # in sorted order
    labels = np.repeat(np.arange(3), 9)
    saved = model_dir.read(run)
    kernel = saved.params["classifier"]["kernel"].astype(np.float64)
    # Of the penalties that were to choose from, one gives this kernel, up to the logits' scale.
    variance = ((features - features.mean(0)) ** 2).sum()
    distances = []
    for penalty in np.logspace(-7, 1, 17) * variance:
        theirs = Ridge(alpha=penalty).fit(features, np.eye(3)[labels]).coef_.T
        scale = (kernel * theirs).sum() / (theirs**2).sum()
        distances.append(np.abs(kernel - scale * theirs).max() / np.abs(kernel).max())
    # float32 features, whose normalisation is folded into the convolutions in one case only, are
    # 1e-6 apart, and small penalties divide by small singular values.
    assert min(distances) < 0.01

    # The backbone is the checkpoint's, bit for bit.
    first = tiny_model.variables()
    for name, part in first["params"].items():
        if name != "classifier":
            np.testing.assert_equal(saved.params[name], part)
    np.testing.assert_equal(saved.batch_stats, first["batch_stats"])
    assert saved.classes == ("dark", "grey", "light")

    # The model is there for every command; the same command again changes nothing.
    status, again, err = commands.run(cache, *command, module=commands.WHOLE, devices=2)
    assert (status, again) == (0, out), err


def test_training_begins_with_the_fitted_head(cache, arguments, tmp_path):
    command = ["--config=finetune_folder", *arguments, "--config.num_epochs=1"]
    # A rate of 0 changes nothing, and shows where training began.
    still = [*command, "--config.batch_size=9", "--config.schedule.base_lr=0"]
    status, out, err = commands.run(
        cache, *still, f"--workdir={tmp_path / 'still'}", module=commands.WHOLE
    )
    assert status == 0, err
    probe = ["--config=probe", *arguments, "--config.batch_size=9"]
    status, wanted, err = commands.run(
        cache, *probe, f"--workdir={tmp_path / 'probe'}", module=commands.WHOLE
    )
    assert status == 0, err
    assert out.splitlines()[-1] == wanted.splitlines()[-1]


def test_a_head_of_the_same_classes_is_kept(cache, arguments, tmp_path):
    probe = ["--config=probe", arguments[1], "--config.batch_size=9"]
    first = [*probe, arguments[0], f"--workdir={tmp_path / 'first'}"]
    status, out, err = commands.run(cache, *first, module=commands.WHOLE)
    assert status == 0, err
    second = [*probe, f"--checkpoint={tmp_path / 'first'}", f"--workdir={tmp_path / 'second'}"]
    status, again, err = commands.run(cache, *second, module=commands.WHOLE)
    assert (status, again) == (0, out), err
    assert "classifier included" in err and "fitted" not in err


def test_without_a_checkpoint_there_is_nothing_to_fit_to(cache, arguments, tmp_path):
    command = ["--config=probe", arguments[1], "--config.model.frozen_stages=-1"]
    status, _, err = commands.run(
        cache, *command, f"--workdir={tmp_path / 'run'}", module=commands.WHOLE
    )
    assert status == 2
    assert "fit_head is set, and there is no backbone" in err and "--checkpoint=PATH" in err
    assert not (tmp_path / "run").exists()
