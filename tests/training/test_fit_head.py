"""The head that a run fits before it trains, through the command, against scikit-learn."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import Ridge

import mbv2_jax
from mbv2_jax import model_dir
from tests.support import commands, short_network, tiny_model


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
    with short_network.in_use():
        model = tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")
    return [f"--checkpoint={model}", f"--config.data.source=folder:{photos}"]


@pytest.fixture(scope="module")
def probe(cache, arguments, tmp_path_factory):
    """The workdir of a probe, its command, and what it printed."""
    run = tmp_path_factory.mktemp("probe") / "run"
    # 27 photos in batches of 8: the last batch is filled up with photos that must not count twice.
    command = ["--config=probe", *arguments, "--config.batch_size=8", f"--workdir={run}"]
    status, out, err = commands.run(cache, *command, devices=2)
    assert status == 0, err
    return run, command, out, err


def test_a_probe_is_ridge_regression_on_the_features(photos, arguments, probe):
    run, _, out, err = probe
    assert "fitted the classifier to the features of 27 images" in err
    assert "num_epochs is 0: nothing to train" in err
    assert json.loads(out.splitlines()[-1])["examples"] == 24

    with short_network.in_use():
        before = mbv2_jax.init_model(arguments[0].partition("=")[2])
        features = np.asarray(before.extract_feat(photos / "train"), np.float64)  # sorted
        saved, first = model_dir.read(run), tiny_model.variables()
    labels = np.repeat(np.arange(3), 9)
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
    for name, part in first["params"].items():
        if name != "classifier":
            np.testing.assert_equal(saved.params[name], part)
    np.testing.assert_equal(saved.batch_stats, first["batch_stats"])
    assert saved.classes == ("dark", "grey", "light")


def test_the_same_command_again_changes_nothing(cache, probe):
    _, command, out, _ = probe
    status, again, err = commands.run(cache, *command, devices=2)
    assert (status, again) == (0, out), err


def test_training_begins_with_the_fitted_head(cache, arguments, probe, tmp_path):
    # A rate of 0 changes nothing, and shows where training began.
    status, out, err = commands.run(
        cache,
        "--config=finetune_folder",
        *arguments,
        "--config.num_epochs=1",
        "--config.batch_size=8",
        "--config.schedule.base_lr=0",
        f"--workdir={tmp_path / 'still'}",
        devices=2,
    )
    assert status == 0, err
    assert out.splitlines()[-1] == probe[2].splitlines()[-1]


def test_a_head_of_the_same_classes_is_kept(cache, probe, tmp_path):
    run, command, out, _ = probe
    second = [command[0], f"--checkpoint={run}", *command[2:-1], f"--workdir={tmp_path / 'run'}"]
    status, again, err = commands.run(cache, *second, devices=2)
    assert (status, again) == (0, out), err
    assert "classifier included" in err and "fitted" not in err


def test_without_a_checkpoint_there_is_nothing_to_fit_to(cache, arguments, tmp_path):
    run = tmp_path / "run"
    status, _, err = commands.run(cache, "--config=probe", arguments[1], f"--workdir={run}")
    assert status == 2
    assert "fit_head is set, and there is no backbone" in err and "--checkpoint=PATH" in err
    assert not run.exists()
