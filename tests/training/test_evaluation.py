"""Evaluation of a saved model on folders: its classes, --out, and its published figures.

The peer is in tests/parity/test_evaluation.py.
"""

import dataclasses
import json
import pathlib
import runpy
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mbv2_jax import model_dir
from mbv2_jax.command_line import load_config
from mbv2_jax.data.classes import IMAGENET_NAMES, IMAGENET_WNIDS
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.model_json import Description
from mbv2_jax.runtime import mesh, processes
from mbv2_jax.tasks.classification.settings import Head
from mbv2_jax.tasks.task import Aligned
from mbv2_jax.training import evaluation
from tests.support import tiny_model


def describe(names: tuple[str, ...], published: dict[str, Any] | None = None) -> Description:
    """Returns the description of the tiny model with other classes."""
    spec = dataclasses.replace(tiny_model.SPEC, head=Head(len(names)) if names else None)
    return Description(spec, names, {"kind": "made by a test"}, published)


def write_model(
    path: pathlib.Path, names: tuple[str, ...], published: dict[str, Any] | None = None
) -> pathlib.Path:
    """Writes a model that ignores the image and ranks class 0 before class 1 before class 2 ..."""
    arrays = tiny_model.variables()
    arrays["params"]["classifier"] = {
        "kernel": np.zeros((1280, len(names)), np.float32),
        "bias": -np.arange(len(names), dtype=np.float32),
    }
    model_dir.write(path, arrays["params"], arrays["batch_stats"], describe(names, published))
    return path


def write_images(folder: pathlib.Path, counts: dict[str, int]) -> pathlib.Path:
    """Writes `counts` images of noise, of the network's size, in a folder for each class."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (tiny_model.SIZE, tiny_model.SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def arguments(model: pathlib.Path, images: pathlib.Path, *others: str) -> list[str]:
    return [
        "--config=finetune_folder",
        "--mode=eval",
        f"--checkpoint={model}",
        f"--config.data.source=folder:{images}",
        "--config.data.eval_split=all",
        "--config.batch_size=200",
        *others,
    ]


def evaluate(
    model: pathlib.Path, images: pathlib.Path, out: pathlib.Path | None = None, **options: Any
) -> evaluation.Result:
    config = load_config("finetune_folder")
    config.data.source, config.data.eval_split = f"folder:{images}", "all"
    config.batch_size = options.pop("batch_size", 16)
    out_file = None if out is None else str(out)
    group = processes.single()
    return evaluation.evaluate(config, str(model), {}, group, out=out_file, **options)[0]


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_are_the_models_whatever_the_order_of_the_folders(tmp_path, capsys):
    model = write_model(tmp_path / "model", ("owl", "bee", "hen", "cat", "dog", "eel", "fox"))
    # In the folders' order: bee 1, fox 6, owl 0. The first five classes are owl to dog.
    images = write_images(tmp_path / "images", {"owl": 3, "bee": 4, "fox": 1})
    out = tmp_path / "out.jsonl"
    result = evaluate(model, images, out)
    assert (result["top1"], result["top5"], result["examples"]) == (100 * 3 / 8, 100 * 7 / 8, 8)
    probabilities = np.exp(-np.arange(7)) / np.exp(-np.arange(7)).sum()
    losses = -np.log(probabilities)
    # A float32 logarithm.
    mean = (3 * losses[0] + 4 * losses[1] + losses[6]) / 8
    assert result["loss"] == pytest.approx(mean, rel=1e-6)
    err = capsys.readouterr().err
    assert "3 of" in err and "7 classes, by name" in err
    lines = read(out)
    assert [pathlib.Path(line["image"]).relative_to(images).as_posix() for line in lines] == [
        *(f"bee/{i}.png" for i in range(4)),
        "fox/0.png",
        *(f"owl/{i}.png" for i in range(3)),
    ]
    assert [(line["label"], line["class"]) for line in lines] == [
        *[(1, "bee")] * 4,
        (6, "fox"),
        *[(0, "owl")] * 3,
    ]
    for line in lines:
        assert list(line) == ["image", "label", "class", "loss", "predictions"]
        assert line["loss"] == pytest.approx(losses[line["label"]], rel=1e-6)
        assert [(p["label"], p["class"]) for p in line["predictions"]] == [
            *enumerate(("owl", "bee", "hen", "cat", "dog"))
        ]
        scores = [p["score"] for p in line["predictions"]]
        assert scores == pytest.approx(probabilities[:5], rel=1e-6)


def test_folders_of_wordnet_ids_are_evaluated_on_all_logits_of_an_imagenet_model(tmp_path, capsys):
    counts = {"n01440764": 1, "n01484850": 2, "n01531178": 3, "n15075141": 4}
    labels = [0, *[2] * 2, *[11] * 3, *[999] * 4]  # tench, great white shark, goldfinch, paper
    images = write_images(tmp_path / "images", counts)
    for offset, names in enumerate((IMAGENET_NAMES, ("background", *IMAGENET_NAMES))):
        model = write_model(tmp_path / f"model{offset}", names)
        out = tmp_path / f"{offset}.jsonl"
        result = evaluate(model, images, out)
        assert [line["label"] for line in read(out)] == [label + offset for label in labels]
        assert result["top1"] == (10, 0)[offset]  # the background comes first
        assert result["top5"] == 30  # 0 and 2; 1 and 3
        assert "4 of ImageNet's 1000 classes, by WordNet id" in capsys.readouterr().err


def test_model_without_classifier_or_without_the_class_is_refused(tmp_path):
    images = write_images(tmp_path / "images", {"cat": 1, "yak": 1})
    with pytest.raises(UserError, match=rf"has no class 'yak', which is one of folder:{images}"):
        evaluate(write_model(tmp_path / "model", ("cat", "dog", "eel")), images)
    with pytest.raises(UserError, match="'cat' names more than one class of"):
        evaluate(write_model(tmp_path / "double", ("cat", "dog", "yak", "cat")), images)

    arrays = tiny_model.variables()
    del arrays["params"]["classifier"]
    model_dir.write(tmp_path / "features", **arrays, description=describe(()))
    with pytest.raises(UserError, match=r"features has no head.*--mode=train --checkpoint="):
        evaluate(tmp_path / "features", images)


def test_predictions_do_not_depend_on_devices_or_batches(tmp_path, monkeypatch):
    model = tiny_model.write(tmp_path / "model")
    images = write_images(tmp_path / "images", dict.fromkeys(tiny_model.CLASSES, 4) | {"hen": 3})
    four = evaluate(model, images, tmp_path / "four")
    monkeypatch.setattr(mesh, "_all_devices", lambda: jax.devices()[:1])
    one = evaluate(model, images, tmp_path / "one", batch_size=7)
    assert {name: one[name] for name in ("top1", "top5", "examples")} == {
        name: four[name] for name in ("top1", "top5", "examples")
    }
    ours, theirs = read(tmp_path / "four"), read(tmp_path / "one")
    assert len(ours) == 23 == len({line["image"] for line in ours})
    for a, b in zip(ours, theirs, strict=True):
        assert (a["image"], a["label"]) == (b["image"], b["label"])
        assert [p["label"] for p in a["predictions"]] == [p["label"] for p in b["predictions"]]
        # Batches of another size order float32 sums differently; logits are of order ten.
        scores = [p["score"] for p in a["predictions"]]
        assert scores == pytest.approx([p["score"] for p in b["predictions"]], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    # The printed loss is the mean of the written ones, which are float32.
    assert four["loss"] == pytest.approx(np.mean([line["loss"] for line in ours]), rel=1e-6)


def test_file_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    there = tmp_path / "there"
    there.write_text("mine")
    for out, message in (
        (there, "--out=.*there exists already: delete it"),
        (tmp_path, "exists already"),
        (tmp_path / "no" / "out", "cannot be written: No such file"),
        (there / "out", "cannot be written: Not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path / "no model", tmp_path / "no images", out)
    assert there.read_text() == "mine"


def test_result_is_told_where_the_file_cannot_be_written_in_the_end(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", ("cat", "dog"))
    images = write_images(tmp_path / "images", {"cat": 3, "dog": 1})
    folder = tmp_path / "out"
    folder.mkdir()
    score = evaluation.Evaluation.score

    def score_and_lose_the_folder(*arguments, **options):
        result = score(*arguments, **options)
        folder.rmdir()
        return result

    monkeypatch.setattr(evaluation.Evaluation, "score", score_and_lose_the_folder)
    with pytest.raises(RunFailed, match=r"cannot be written: No such.*; the result is") as failed:
        evaluate(model, images, folder / "a.jsonl")
    result = json.loads(str(failed.value).partition("the result is ")[2])
    assert (result["top1"], result["examples"]) == (75, 4)


def test_evaluation_that_fails_writes_no_predictions(tmp_path):
    images = write_images(tmp_path / "images", {"cat": 3})
    (images / "cat" / "3.png").write_text("no image")
    with pytest.raises(UserError, match=r"cat/3\.png: cannot decode"):
        evaluate(tiny_model.write(tmp_path / "model"), images, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "model"}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One image for each class: top-1 gets 1 of 1000 right, top-5 5."""
    return write_images(tmp_path_factory.mktemp("imagenet"), dict.fromkeys(IMAGENET_WNIDS, 1))


def card(top1: float, top5: float, examples: int = 1000) -> dict[str, Any]:
    return {"top1": top1, "top5": top5, "examples": examples, "source": "somebody"}


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[Any, str, str]]:
    """Returns a function that runs the command in this process, which has compiled the step."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("mbv2_jax.main", run_name="__main__")
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


def test_result_is_compared_with_what_was_published(tmp_path, imagenet, run):
    right = write_model(tmp_path / "right", IMAGENET_NAMES, published=card(0.06, 0.54))
    status, out, err = run(*arguments(right, imagenet))
    assert status == 0, err
    assert "published by somebody: top1 0.06, top5 0.54" in err
    *comparison, result = out.splitlines()
    assert comparison == [
        "top1: expected 0.06, got 0.10, difference +0.04",
        "top5: expected 0.54, got 0.50, difference -0.04",
    ]
    result = json.loads(result)
    assert (result["top1"], result["top5"], result["examples"]) == (0.1, 0.5, 1000)

    wrong = write_model(tmp_path / "wrong", IMAGENET_NAMES, published=card(0.16, 0.5))
    status, out, err = run(*arguments(wrong, imagenet))
    assert status == 1
    assert out.splitlines()[0] == "top1: expected 0.16, got 0.10, difference -0.06"
    assert json.loads(out.splitlines()[-1]) == result
    assert err.splitlines()[-1] == "failed: the result is not within 0.05 of the expected figures"

    status, out, err = run(*arguments(wrong, imagenet, "--expect=none"))
    assert (status, json.loads(out), "published" in err) == (0, result, False)


def test_published_figures_of_other_data_are_only_shown(tmp_path, run):
    model = write_model(tmp_path / "model", IMAGENET_NAMES, published=card(71.86, 90.42, 50_000))
    images = write_images(tmp_path / "images", {"n01440764": 1, "n01484850": 1})
    status, out, err = run(*arguments(model, images))
    assert status == 0, err
    assert json.loads(out)["top1"] == 50  # a single line
    assert (
        "published by somebody: top1 71.86, top5 90.42; not compared, since they are for "
        "50,000 images, this result for 2"
    ) in err


def published(names=IMAGENET_NAMES, examples=1000, found=range(1000), overrides=None, tta=False):
    description = describe(tuple(names), card(1.0, 2.0))
    saved = model_dir.SavedModel({}, {}, description, pathlib.Path("model"))
    aligned = Aligned(range(examples), tuple(found))
    return evaluation.published(saved, aligned, overrides or {}, tta)


def test_only_an_evaluation_like_the_published_one_is_compared():
    assert published() == ({"top1": 1.0, "top5": 2.0}, "somebody", "")
    # The model's own values, and fields that do not change a result.
    same = {"data.image_size": tiny_model.SIZE, "batch_size": 8, "data.source": "folder:x"}
    assert published(overrides=same).unlike == ""
    assert published(["background", *IMAGENET_NAMES], found=range(1, 1001)).unlike == ""
    assert published(examples=999).unlike == "they are for 1,000 images, this result for 999"
    assert "the data has 999 classes" in published(found=range(999)).unlike
    assert "not known to be ImageNet's" in published([str(i) for i in range(1000)]).unlike
    assert published(tta=True).unlike == "they are without --tta"
    for name, value in (
        ("data.eval_transforms", "resize_edge(232)|center_crop(size)"),
        ("data.image_size", 64),
        ("data.mean", (0.0, 0.0, 0.0)),
        ("data.std", (1.0, 1.0, 1.0)),
        ("model.bn_epsilon", 1e-3),
    ):
        assert published(overrides={name: value}).unlike == f"they are without --config.{name}"
    half = {"model.dtype": "bfloat16"}
    assert published(overrides=half).unlike == "they are without --config.model.dtype=bfloat16"
    assert published(overrides={"model.dtype": "float32"}).unlike == ""


def test_nothing_is_said_where_nothing_was_published():
    saved = model_dir.SavedModel({}, {}, tiny_model.DESCRIPTION, pathlib.Path("model"))
    aligned = Aligned(range(6), tuple(range(6)))
    assert evaluation.published(saved, aligned, {}, False) is None
