"""`python -m mbv2_jax.analysis embedding`: the features of a split on a plane."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.analysis import embedding, model_commands
from mbv2_jax.data import sources
from mbv2_jax.errors import UserError
from mbv2_jax.inference import init_model
from tests.support import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The tiny model, and val/ of two classes that it does not know, six photos each."""
    folder = tmp_path_factory.mktemp("embedding")
    tiny_model.write(folder / "model")
    for label, name in enumerate(("ours", "theirs")):
        (folder / "photos" / "val" / name).mkdir(parents=True)
        for i in range(6):
            tiny_model.photo(6 * label + i).save(folder / "photos" / "val" / name / f"{i}.png")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        given = ["--config=finetune_folder", f"--config.data.source=folder:{folder / 'photos'}"]
        monkeypatch.setattr(sys, "argv", ["analysis", "embedding", *given, *arguments])
        model_commands.main()
        return capsys.readouterr().out

    return run


def test_picture_of_classes_that_the_model_does_not_know(run, folder, tmp_path):
    out = run(f"--checkpoint={folder / 'model'}", "--count=10", "--out=plane.png")
    assert out == "plane.png: 10 of 12 images of 2 classes\n"
    assert Image.open(tmp_path / "plane.png").width > 1000


def test_features_are_those_of_the_classifier_in_order(folder):
    predictor = init_model(folder / "model")
    source = sources.open_source(f"folder:{folder / 'photos'}", "val")
    part = embedding.Part(source, np.array([1, 4, 8]))
    features, labels = embedding.pooled(predictor, part, workers=0)
    files = [source.describe(index) for index in (1, 4, 8)]
    # Batches of 32 and of 4 images add up in another order.
    np.testing.assert_allclose(features, predictor.extract_feat(files), rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [0, 0, 1]


def test_neighbours_on_the_plane_are_neighbours_in_the_features():
    rng = np.random.default_rng(0)
    features = np.repeat(50 * np.eye(3, 40), 12, axis=0) + rng.normal(size=(36, 40))
    points, labels = embedding.plane(features, seed=0), np.repeat(range(3), 12)
    apart = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(36)
    assert (labels[apart.argmin(1)] == labels).all()


def test_classes_beyond_twenty_are_grey():
    labels = np.repeat(range(25), 3)
    figure = embedding.draw(np.zeros((75, 2)), labels, [f"class {i}" for i in range(25)], "title")
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == 21 and texts[0] == "5 other classes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint=PATH is missing"),
        (["--checkpoint=x", "--count=4"], "--count=4: give 5 images or more"),
        (["--checkpoint=x", "--out=plane"], "give plane.png"),
        (["--checkpoint=x", "--split=train"], "no split 'train'"),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message):
        run(*arguments)


def test_images_without_a_label_are_refused(run, folder, monkeypatch):
    unlabelled = np.zeros((12, 4)), np.full(12, -1)  # as a dataset's secret test split
    monkeypatch.setattr(embedding, "pooled", lambda *_: unlabelled)
    with pytest.raises(UserError, match="images without a label"):
        run(f"--checkpoint={folder / 'model'}")


def test_without_scikit_learn_its_command_is_named(run, monkeypatch):
    find = importlib.util.find_spec
    absent = lambda name, *others: None if name == "sklearn" else find(name, *others)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(UserError, match=r"pip install '\.\[demo\]'"):
        run("--checkpoint=x")
