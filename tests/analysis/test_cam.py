"""`python -m mbv2_jax.analysis cam`: files and refusals; the maps are tested in tests/parity/."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from mbv2_jax import model_dir
from mbv2_jax.analysis import cam, model_commands
from mbv2_jax.errors import UserError
from mbv2_jax.models import mobilenet_v2
from mbv2_jax.tasks.classification.task import Classification
from tests.support import tiny_model

SIZE = 96  # the last map is 3 x 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The tiny model for larger images, with and without its classifier, and three photos."""
    folder = tmp_path_factory.mktemp("cam")
    tiny_model.write_images(folder, ["one.png", "more/two.png", "more/three.jpg"])
    arrays = tiny_model.variables()
    params = dict(arrays["params"])
    preprocessing = dataclasses.replace(
        tiny_model.SPEC.preprocessing, image_size=SIZE, eval_transforms="resize(size)"
    )
    spec = dataclasses.replace(tiny_model.SPEC, preprocessing=preprocessing)
    described = dataclasses.replace(tiny_model.DESCRIPTION, spec=spec)
    model_dir.write(folder / "large", params, arrays["batch_stats"], described)
    del params["classifier"]
    spec = dataclasses.replace(spec, head=None)
    described = dataclasses.replace(described, spec=spec, classes=())
    model_dir.write(folder / "backbone", params, arrays["batch_stats"], described)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Runs the command in the folder; returns its lines."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["analysis", "cam", *arguments])
        model_commands.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_each_photo_gets_a_picture_and_none_is_overwritten(run, folder, tmp_path):
    arguments = ("one.png", "more", "--checkpoint=large", f"--out={tmp_path}", "--class=fox")
    lines = run(*arguments)
    assert [line.split(":")[0] for line in lines] == [
        str(tmp_path / name) for name in ("one.png", "three.jpg", "two.png")
    ]
    assert all("fox" in line and line.endswith("%") for line in lines)
    before = (tmp_path / "one.png").read_bytes()
    run(*arguments)
    assert (tmp_path / "one.png").read_bytes() == before
    assert (tmp_path / "one-2.png").is_file()
    # The crop and, beside it, the same with its map.
    picture = Image.open(tmp_path / "one.png")
    assert picture.size == (2 * cam.SIDE + cam.GAP, cam.SIDE + cam.TEXT)


def test_bad_photos_do_not_stop_the_others(run, capsys, tmp_path):
    with pytest.raises(UserError, match="1 of 2 images could not be read"):
        run("text.png", "one.png", "--checkpoint=large", f"--out={tmp_path}")
    assert "error: text.png" in capsys.readouterr().err
    assert (tmp_path / "one.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--checkpoint=large"], ["no image"]),
        (["one.png"], ["--checkpoint=PATH is missing"]),
        (["one.png", "--checkpoint=large", "--layer=layer8"], ["'layer8'", "'layer7'"]),
        (["one.png", "--checkpoint=large", "--layer=layer1_0/expand"], ["'layer1_0/expand'"]),
        (["one.png", "--checkpoint=large", "--class=foxx"], ["'foxx'", "'fox'", "0 to 5"]),
        (["one.png", "--checkpoint=large", "--class=6"], ["'6'", "0 to 5"]),
        (["one.png", "--checkpoint=backbone"], ["no classifier, only features"]),
        # Of 32 px, the last map is 1 x 1, layer5's 2 x 2 and layer3's 4 x 4.
        (["one.png", "--checkpoint=model"], ["single pixel", "32 x 32", "--layer=layer3"]),
        (["one.png", "--checkpoint=large", "--method=eigen"], ["method", "grad"]),
        (["empty", "--checkpoint=large"], ["no image files in empty"]),
        (["gone.png", "--checkpoint=large"], ["1 of 1 images could not be read"]),
        (["more", "--checkpoint=large", "--out=more/cam"], ["--out=more/cam lies in more"]),
    ],
)
def test_mistakes_are_one_line(run, folder, tmp_path, arguments, parts):
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError) as error:
        run(f"--out={tmp_path / 'out'}", *arguments)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert not list(tmp_path.glob("out/*"))


def test_a_task_without_classes_is_refused(run, monkeypatch):
    monkeypatch.setattr(Classification, "classifies", False)
    with pytest.raises(UserError, match="gives an image no class"):
        run("one.png", "--checkpoint=large")


def test_stages_are_layers_too():
    assert cam.endpoint("layer3", tiny_model.SPEC) == "layer3_2"
    for name in mobilenet_v2.feature_info(tiny_model.SPEC.backbone):
        assert cam.endpoint(name, tiny_model.SPEC) == name


def test_a_tiny_photo_is_enlarged():
    photo = np.zeros((10, 20, 3), np.uint8)
    picture = cam.draw(photo, np.zeros((10, 20), np.float32), "cat", "Grad-CAM of last")
    assert picture.size == (2 * 320 + cam.GAP, 160 + cam.TEXT)
