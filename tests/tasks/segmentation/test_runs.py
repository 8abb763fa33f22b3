"""Segmentation through the real commands: training, evaluation, and runs that are continued."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

import mbv2_jax
from mbv2_jax import command_line
from mbv2_jax.analysis import cam, embedding, report
from mbv2_jax.errors import UserError
from tests.support import commands, groups

NAMES = ("floor", "box", "ball", "nothing")
PALETTE = np.array([(90, 90, 90), (220, 40, 40), (40, 60, 220)], np.uint8)

CONFIG = """
from mbv2_jax.configs import default

def get_config():
    config = default.get_config("segmentation")
    config.batch_size = 4
    config.num_epochs = 2.0
    config.model.width = 0.1
    config.model.dropout = 0.1
    config.model.aspp_rates = (2,)
    config.data.source = "pairs:SCENES"
    config.data.eval_split = "val"
    config.data.image_size = 24
    config.data.train_transforms = "resize(size)|random_flip(0.5)"
    config.data.eval_transforms = "resize(size)"
    config.label_smoothing = 0.1
    config.class_weights = (0.5, 1.0, 1.0, 1.0)
    config.schedule.name = "poly"
    config.schedule.base_lr = 0.02
    config.checkpoint.every_steps = 4
    config.log.every_steps = 2
    return config
"""


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns a picture, (30, 40, 3), of a box and a ball on a floor, and its mask."""
    mask = np.zeros((30, 40), np.uint8)
    top, left = rng.integers(0, 14), rng.integers(0, 18)
    mask[top : top + 14, left : left + 16] = 1
    rows, columns = np.mgrid[:30, :40]
    y, x = rng.integers(6, 24), rng.integers(6, 34)
    mask[(rows - y) ** 2 + (columns - x) ** 2 < 36] = 2
    picture = PALETTE[mask] + rng.integers(0, 30, (30, 40, 3)).astype(np.uint8)
    mask[:1] = 255
    return picture, mask


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of 40 pictures to train on and 10 others, and the config that names it."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            picture, mask = draw(rng)
            Image.fromarray(picture).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "scenes.py").write_text(CONFIG.replace("SCENES", str(folder)))
    return folder


@pytest.fixture(scope="module")
def unbroken(scenes, cache) -> tuple[pathlib.Path, str]:
    """A finished run, and its output."""
    workdir = scenes / "run"
    status, out, err = commands.run(
        cache, f"--config={scenes / 'scenes.py'}", f"--workdir={workdir}"
    )
    assert status == 0, err
    return workdir, out


def test_a_run_ends_with_a_table_and_a_line_of_json(unbroken):
    workdir, out = unbroken
    header, *rows, last = out.splitlines()
    assert header.split() == ["class", "IoU", "accuracy", "pixels"]
    assert [row.split()[0] for row in rows] == list(NAMES)
    assert rows[-1].split()[1:] == ["-", "-", "0.0%"]
    result = json.loads(last)
    assert list(result) == ["mIoU", "pixel_accuracy", "loss", "examples"]
    assert result["examples"] == 10
    found = [float(row.split()[1]) for row in rows[:-1]]
    assert result["mIoU"] == pytest.approx(np.mean(found), abs=0.01)  # printed with 2 decimals
    assert (workdir / "curves.png").is_file()
    lines = [line for line in commands.metrics(workdir) if line["split"] == "train"]
    assert all(0 <= line["pixel_accuracy"] <= 100 for line in lines)


@pytest.mark.slow
def test_a_killed_and_continued_run_equals_the_unbroken_one(scenes, cache, unbroken, tmp_path):
    whole, out = unbroken
    workdir = tmp_path / "run"
    command = [f"--config={scenes / 'scenes.py'}", f"--workdir={workdir}"]
    process = commands.start(cache, *command)
    groups.wait_for(
        lambda: (
            commands.checkpoints(workdir)
            and commands.logged_step(workdir) > max(commands.checkpoints(workdir))
        ),
        [process],
    )
    groups.kill([process])
    saved = max(commands.checkpoints(workdir))
    assert 0 < saved < 20
    status, again, err = commands.run(cache, *command, "--config.data.workers=1")
    assert status == 0, err
    assert f"continuing after step {saved}" in err
    assert again == out
    commands.assert_equal_runs(workdir, whole)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 10), (4, 4)])
def test_evaluation_is_scikit_learns_on_the_pictures(
    scenes, cache, unbroken, tmp_path, devices, batch_size
):
    workdir, _ = unbroken
    rows_file = tmp_path / "rows.jsonl"
    status, out, err = commands.run(
        cache,
        f"--config={scenes / 'scenes.py'}",
        "--mode=eval",
        f"--checkpoint={workdir / 'model'}",
        f"--config.batch_size={batch_size}",
        f"--out={rows_file}",
        devices=devices,
    )
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    truth, predicted = pixels_of(scenes, workdir)
    counted = truth != 255
    found = metrics.jaccard_score(
        truth[counted], predicted[counted], labels=range(3), average=None, zero_division=0
    )
    # Other devices order float32 sums differently, which may turn a pixel of 5,000 that is a tie.
    assert result["mIoU"] == pytest.approx(100 * found.mean(), abs=0.1)
    right = 100 * metrics.accuracy_score(truth[counted], predicted[counted])
    assert result["pixel_accuracy"] == pytest.approx(right, abs=0.1)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [row["pixels"] for row in rows] == counted.sum((1, 2)).tolist()
    weights = [row["pixels"] for row in rows]
    for name in ("pixel_accuracy", "loss"):
        mean = np.average([row[name] for row in rows], weights=weights)
        assert result[name] == pytest.approx(mean, rel=1e-6)


def pixels_of(scenes: pathlib.Path, workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the true and the predicted classes at the size of evaluation, (10, 24, 24)."""
    from tests.support import short_network

    with short_network.in_use():
        predictor = mbv2_jax.init_model(workdir / "model")
        files = sorted((scenes / "val" / "images").iterdir())
        logits = predictor(np.stack([predictor.prepare(file) for file in files]))
    found = []
    for file in files:
        mask = Image.open(scenes / "val" / "masks" / file.name)
        found.append(np.asarray(mask.resize((24, 24), Image.Resampling.NEAREST)))
    return np.stack(found), np.asarray(logits).argmax(-1)


def test_figures_are_expected_by_name(scenes, cache, unbroken):
    workdir, out = unbroken
    result = json.loads(out.splitlines()[-1])
    command = [
        f"--config={scenes / 'scenes.py'}",
        "--mode=eval",
        f"--checkpoint={workdir / 'model'}",
    ]
    status, out, err = commands.run(cache, *command, f"--expect=mIoU={result['mIoU']:.2f}")
    assert status == 0, err
    assert out.splitlines()[-2].startswith("mIoU: expected ")
    status, _, err = commands.run(
        cache, *command, "--tta", f"--expect=mIoU={100 - result['mIoU']:.2f}"
    )
    assert status == 1
    assert "not within 0.05" in err


def test_impossible_expectations_and_heads_are_refused(scenes, cache, unbroken):
    workdir, _ = unbroken
    command = [
        f"--config={scenes / 'scenes.py'}",
        "--mode=eval",
        f"--checkpoint={workdir / 'model'}",
    ]
    status, _, err = commands.run(cache, *command, "--expect=top1=70")
    assert status == 2
    assert "give MIOU,PIXEL_ACCURACY in percent" in err and "mIoU=75.32" in err
    status, _, err = commands.run(cache, *command, "--config.model.aspp_rates=()")
    assert status == 2
    assert "aspp_rates is (), but" in err


def test_analysis_of_classifiers_is_refused(scenes, unbroken, tmp_path, few_layers):
    model = str(unbroken[0] / "model")
    refused = "is a model for 'segmentation', which gives an image no class"
    with pytest.raises(UserError, match=refused):
        cam.cam([str(scenes / "val" / "images" / "0.png")], model, str(tmp_path / "cam"))
    config = command_line.load_config(str(scenes / "scenes.py"))
    with pytest.raises(UserError, match=refused):
        report.report(config, {}, model, str(tmp_path / "report"))
    with pytest.raises(UserError, match="gives an image no class by which to colour it"):
        embedding.embedding(config, model, str(tmp_path / "embedding.png"))
    assert not any(tmp_path.iterdir())
