"""`python -m mbv2_jax.analysis cam`: files and refusals; the maps are tested in tests/parity/."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from mbv2_jax import model_dir
from mbv2_jax.analysis import cam, model_commands
from mbv2_jax.errors import UserError
from mbv2_jax.models import mobilenet_v2
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.tasks.classification.settings import Head
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


def test_the_last_layer_of_a_network_without_a_last_convolution_is_layer7():
    backbone = dataclasses.replace(tiny_model.SPEC.backbone, depth=1.2, last_convolution=False)
    spec = dataclasses.replace(tiny_model.SPEC, backbone=backbone)
    assert cam.endpoint("last", spec) == cam.endpoint("layer7", spec) == "layer7_0"
    assert cam.endpoint("layer3", spec) == "layer3_3"  # its four blocks: 3 times 1.2, rounded up


def test_grad_cam_of_hidden_layers_worked_out_by_hand(few_layers):
    module = MobileNetV2(
        num_classes=3, width=0.1, strides=(1,) * 8, last_convolution=False, hidden=(8,)
    )
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    found = cam.grad_cam(
        variables,
        x,
        np.array([0, 2]),
        task=Classification(Head(3, hidden=(8,)), ("a", "b", "c")),
        network=module,
        endpoint="layer7_0",
    )
    features = np.asarray(jax.jit(module.clone(num_classes=None).apply)(variables, x)[0])
    params = jax.device_get(variables["params"])
    inner = features.mean((1, 2)) @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"]
    outer = params["classifier"]["kernel"][:, [0, 2]].T * (inner > 0)  # (2, 8)
    weights = outer @ params["hidden_0"]["kernel"].T  # (2, 32)
    heat = np.maximum(np.einsum("nhwc,nc->nhw", features, weights), 0)
    low, high = heat.min((1, 2), keepdims=True), heat.max((1, 2), keepdims=True)
    assert heat.shape == found.heat.shape  # without strides the map is not resized
    # The same float32 operations, fused otherwise.
    np.testing.assert_allclose(found.heat, (heat - low) / (high - low), rtol=0, atol=1e-3)


def test_a_tiny_photo_is_enlarged():
    photo = np.zeros((10, 20, 3), np.uint8)
    picture = cam.draw(photo, np.zeros((10, 20), np.float32), "cat", "Grad-CAM of last")
    assert picture.size == (2 * 320 + cam.GAP, 160 + cam.TEXT)
