"""Folders as on the Hugging Face Hub: timm and transformers open ours, and theirs convert."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from mbv2_jax import model_dir
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.model_json import Description
from mbv2_jax.spec import Backbone, Preprocessing, TrainingMode
from mbv2_jax.tasks.classification.settings import Head
from tests.support import peers, tiny_model
from tests.support.convert_command import make_run, refused

# "crane" is the name of two of ImageNet's classes.
CLASSES = ("cat", "crane", "crane", "dog", "gnu")
# Relative to the largest logit. float64 rounds at 1e-16, which 53 layers enlarge to 2e-13. Another
# padding or epsilon gives 1e-4 and more.
TOLERANCE = 1e-11
# Of images: the peers divide by 255 in float32 before they subtract the mean and divide by the
# standard deviation of 0.2, and so round at 6e-8 / 0.2 several times.
PIXEL_TOLERANCE = 2e-6

CONVENTIONS = [Backbone(0.5), Backbone(1.4, padding="same", bn_epsilon=1e-3)]
MODE = TrainingMode(dropout=0.3)
# transformers rounds half a pixel of a crop's margin down, timm and we round it to the even number;
# the margins of these crops of `photo` are whole, or are rounded down by everyone.
PREPROCESSING = [
    Preprocessing(160, "resize_edge(181)|center_crop(size)", (127.5, 120.0, 110.0), (127.5,) * 3),
    Preprocessing(192, "resize_edge(220, interpolation='bicubic')|center_crop(size)"),
    Preprocessing(96, "resize(112)|center_crop(size)"),
    Preprocessing(96, "resize(96, interpolation='bicubic')"),
]


@pytest.fixture
def run(monkeypatch, capsys):
    run = make_run(monkeypatch, capsys)

    def quiet(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # the peers' progress bars
        return run(*arguments)

    return quiet


def write(
    folder: pathlib.Path,
    backbone: Backbone = CONVENTIONS[0],
    preprocessing: Preprocessing = PREPROCESSING[0],
    mode: TrainingMode = MODE,
) -> pathlib.Path:
    """Writes a model directory with the arrays of a torchvision network."""
    net = peers.torchvision().models.mobilenet_v2(
        width_mult=backbone.width, num_classes=len(CLASSES)
    )
    peers.randomize(net, seed=1)
    spec = dataclasses.replace(
        tiny_model.SPEC,
        backbone=backbone,
        head=Head(len(CLASSES)),
        preprocessing=preprocessing,
        mode=mode,
    )
    arrays = peers.parameters(net), peers.statistics(net)
    model_dir.write(folder, *arrays, Description(spec, CLASSES))
    return folder


def photo() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((347, 251), Image.Resampling.BICUBIC)


def images() -> np.ndarray:
    """Returns images of an even height and an odd width, where paddings differ the most."""
    return np.random.default_rng(0).standard_normal((2, 64, 75, 3))


def logits_here(saved: SavedModel) -> np.ndarray:
    with jax.enable_x64(True):
        network = saved.task().network(saved.spec.backbone, TrainingMode(dtype="float64"))
        return np.asarray(network.apply(jax.tree.map(np.float64, saved.variables()), images()))


def assert_same_logits(saved: SavedModel, peer: torch.nn.Module) -> None:
    with torch.no_grad():
        theirs = peer.double().eval()(peers.nchw(images()))
    theirs = getattr(theirs, "logits", theirs).numpy()
    peer.float()
    ours = logits_here(saved)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * abs(theirs).max())


def assert_same_pixels(saved: SavedModel, theirs: torch.Tensor) -> None:
    images = saved.spec.preprocessing
    ours = images.normalize(images.prepare(photo()))
    np.testing.assert_allclose(ours, theirs.numpy().transpose(1, 2, 0), atol=PIXEL_TOLERANCE)


def without_our_description(folder: pathlib.Path) -> None:
    """Rewrites the weights as another program would, without model.json in their metadata."""
    safetensors = pytest.importorskip("safetensors.torch")
    file = folder / "model.safetensors"
    safetensors.save_file(safetensors.load_file(file), file, {"format": "pt"})


def facts(saved: SavedModel) -> dict[str, Any]:
    """Returns what a folder says about a model."""
    return saved.spec.values() | {"classes": saved.classes}


# ---- timm ----


def open_in_timm(folder: pathlib.Path) -> tuple[torch.nn.Module, Any]:
    """Returns the network that timm makes of a folder, and its evaluation transform."""
    timm = peers.timm()
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(network)
    return network, timm.data.create_transform(**config)


@pytest.mark.parametrize("backbone", CONVENTIONS, ids=str)
def test_timm_opens_our_folder(backbone, run, tmp_path):
    mode = TrainingMode(dropout=0.3, bn_momentum=0.99)
    folder = write(tmp_path / "m", backbone, mode=mode)
    code, out, _ = run(folder, "--to=timm", f"--output={tmp_path / 'hub'}")
    assert code == 0
    network, _ = open_in_timm(tmp_path / "hub")
    assert_same_logits(model_dir.read(folder), network)
    assert network.drop_rate == 0.3
    norm = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert (norm.eps, norm.momentum) == (backbone.bn_epsilon, pytest.approx(0.01))
    assert network.pretrained_cfg["label_names"] == list(CLASSES)
    names: dict[str, Any] = {"timm": peers.timm()}
    exec(out.partition("load it with")[2].splitlines()[0].strip(), names)
    assert torch.equal(names["model"].conv_stem.weight, network.conv_stem.weight)


@pytest.mark.parametrize("preprocessing", PREPROCESSING, ids=lambda p: p.eval_transforms)
def test_timm_prepares_images_as_our_folder_says(preprocessing, run, tmp_path):
    folder = write(tmp_path / "m", preprocessing=preprocessing)
    assert run(folder, "--to=timm", f"--output={tmp_path / 'hub'}")[0] == 0
    _, transform = open_in_timm(tmp_path / "hub")
    assert_same_pixels(model_dir.read(folder), transform(photo()))


@pytest.mark.parametrize("backbone", CONVENTIONS, ids=str)
def test_our_folder_for_timm_is_read_back(backbone, run, tmp_path):
    folder = write(tmp_path / "m", backbone)
    assert run(folder, "--to=timm", f"--output={tmp_path / 'hub'}")[0] == 0
    for name in ("whole", "by its config"):
        code, _, err = run(tmp_path / "hub", f"--output={tmp_path / name}")
        assert (code, err) == (0, "")
        original, again = model_dir.read(folder), model_dir.read(tmp_path / name)
        assert facts(again) == facts(original)
        jax.tree.map(np.testing.assert_array_equal, again.variables(), original.variables())
        without_our_description(tmp_path / "hub")


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_timm_is_read(safe, run, tmp_path):
    timm = peers.timm()
    network = timm.create_model(
        "mobilenetv2_035", num_classes=3, pad_type="same", bn_eps=1e-3, bn_momentum=0.02
    )
    peers.randomize(network, seed=2)
    timm.models.save_for_hf(
        network,
        tmp_path / "hub",
        model_config={
            "label_names": {"0": "n0", "1": "n1", "2": "n2"},
            "label_descriptions": {"n0": "tench, fish", "n1": "cock", "n2": "hen"},
        },
        data_config={
            "input_size": (3, 128, 128),
            "crop_pct": 0.95,
            "interpolation": "bilinear",
            "mean": (0.5, 0.4, 0.3),
            "std": (0.5, 0.25, 0.2),
        },
        safe_serialization=safe,
    )
    code, _, err = run(tmp_path / "hub", f"--output={tmp_path / 'm'}")
    assert code == 0
    assert "data." not in err  # nothing is assumed
    saved = model_dir.read(tmp_path / "m")
    assert saved.classes == ("tench, fish", "cock", "hen")
    assert saved.spec.mode.bn_momentum == 0.98
    assert saved.spec.preprocessing == Preprocessing(
        128,
        "resize_edge(134)|center_crop(size)",
        mean=(127.5, 102.0, 76.5),
        std=(127.5, 63.75, 51.0),
    )
    assert_same_logits(saved, network)
    opened, transform = open_in_timm(tmp_path / "hub")
    assert_same_logits(saved, opened)
    assert_same_pixels(saved, transform(photo()))


def test_the_crops_of_timm_are_read(run, tmp_path):
    timm = peers.timm()
    network = timm.create_model("mobilenetv2_035", num_classes=3)
    for number, config in enumerate(
        (
            {"crop_mode": "squash", "crop_pct": 1.0},
            {"crop_mode": "squash", "crop_pct": 0.9, "interpolation": "bilinear"},
            {},
        )
    ):
        folder = tmp_path / str(number)
        timm.models.save_for_hf(network, folder, data_config=config, safe_serialization=True)
        _, transform = open_in_timm(folder)
        assert_same_pixels(model_dir.read(folder), transform(photo()))


def test_another_network_or_crop_of_timm_is_refused(run, tmp_path):
    timm = peers.timm()
    for arguments, data, named in (
        ({"act_layer": "relu"}, {}, "act_layer 'relu'"),
        ({"global_pool": "max"}, {}, "global_pool 'max'"),
        ({"output_stride": 16}, {}, "output_stride 16"),
        ({}, {"crop_mode": "border"}, "crop_mode 'border'"),
        ({}, {"interpolation": "lanczos"}, "interpolation 'lanczos'"),
        ({}, {"input_size": (3, 96, 128)}, "input_size [3, 96, 128]"),
    ):
        network = timm.create_model("mobilenetv2_035", num_classes=3, **arguments)
        timm.models.save_for_hf(
            network, tmp_path / "hub", data_config=data, safe_serialization=True
        )
        assert named in refused(run(tmp_path / "hub", f"--output={tmp_path / 'm'}"))


# ---- transformers ----


def open_in_transformers(folder: pathlib.Path) -> tuple[Any, Any]:
    """Returns the network and the image processor that transformers makes of a folder."""
    transformers = peers.transformers()
    network, loaded = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(loaded.values()), loaded
    # Its other backend resizes with torch, which differs from Pillow by up to one pixel value.
    return network, transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("backbone", CONVENTIONS, ids=str)
def test_transformers_opens_our_folder(backbone, run, tmp_path):
    folder = write(tmp_path / "m", backbone)
    code, out, _ = run(folder, "--to=transformers", f"--output={tmp_path / 'hub'}")
    assert code == 0
    network, _ = open_in_transformers(tmp_path / "hub")
    assert_same_logits(model_dir.read(folder), network)
    assert network.dropout.p == 0.3
    assert tuple(network.config.id2label[i] for i in range(len(CLASSES))) == CLASSES
    assert network.config.label2id["gnu"] == 4
    names: dict[str, Any] = {"transformers": peers.transformers()}
    exec(out.partition("load it with")[2].splitlines()[0].strip(), names)
    assert torch.equal(names["model"].classifier.weight, network.classifier.weight)


@pytest.mark.parametrize("preprocessing", PREPROCESSING, ids=lambda p: p.eval_transforms)
def test_transformers_prepares_images_as_our_folder_says(preprocessing, run, tmp_path):
    folder = write(tmp_path / "m", preprocessing=preprocessing)
    assert run(folder, "--to=transformers", f"--output={tmp_path / 'hub'}")[0] == 0
    _, processor = open_in_transformers(tmp_path / "hub")
    theirs = processor(photo(), return_tensors="pt")["pixel_values"][0]
    assert_same_pixels(model_dir.read(folder), theirs)


@pytest.mark.parametrize("backbone", CONVENTIONS, ids=str)
def test_our_folder_for_transformers_is_read_back(backbone, run, tmp_path):
    # transformers' files do not hold the momentum of BatchNorm; its own is 0.997.
    mode = TrainingMode(dropout=0.3, bn_momentum=0.997)
    folder = write(tmp_path / "m", backbone, mode=mode)
    assert run(folder, "--to=transformers", f"--output={tmp_path / 'hub'}")[0] == 0
    network, processor = open_in_transformers(tmp_path / "hub")
    network.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    for source in ("hub", "theirs"):
        code, _, err = run(tmp_path / source, f"--output={tmp_path / source}-again")
        assert (code, err) == (0, "")
        original, again = model_dir.read(folder), model_dir.read(tmp_path / f"{source}-again")
        assert facts(again) == facts(original)
        jax.tree.map(np.testing.assert_array_equal, again.variables(), original.variables())


def test_a_folder_of_transformers_is_read(run, tmp_path):
    transformers = peers.transformers()
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.35,
        tf_padding=False,
        layer_norm_eps=1e-4,
        classifier_dropout_prob=0.4,
        id2label={0: "cat", 1: "dog", 2: "eel"},
    )
    network = transformers.MobileNetV2ForImageClassification(config)
    peers.randomize(network, seed=3)
    network.save_pretrained(tmp_path / "hub")
    transformers.MobileNetV2ImageProcessor(
        size={"shortest_edge": 152}, crop_size={"height": 128, "width": 128}, resample=3
    ).save_pretrained(tmp_path / "hub")
    code, _, err = run(tmp_path / "hub", f"--output={tmp_path / 'm'}")
    assert (code, err) == (0, "")
    saved = model_dir.read(tmp_path / "m")
    assert saved.classes == ("cat", "dog", "eel")
    assert saved.spec.mode.dropout == 0.4
    assert_same_logits(saved, network)
    _, processor = open_in_transformers(tmp_path / "hub")
    theirs = processor(photo(), return_tensors="pt")["pixel_values"][0]
    assert_same_pixels(saved, theirs)


# ---- both ----


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_a_backbone_alone(to, run, tmp_path):
    saved = model_dir.read(write(tmp_path / "m"))
    params = {name: value for name, value in saved.params.items() if name != "classifier"}
    spec = dataclasses.replace(saved.spec, head=None)
    shutil.rmtree(tmp_path / "m")
    model_dir.write(tmp_path / "m", params, saved.batch_stats, Description(spec, ()))
    code, out, _ = run(tmp_path / "m", f"--to={to}", f"--output={tmp_path / 'hub'}")
    assert code == 0
    names: dict[str, Any] = {"timm": peers.timm(), "transformers": peers.transformers()}
    exec(out.partition("load it with")[2].splitlines()[0].strip(), names)
    stem = params["stem"]["conv"]["kernel"].transpose(3, 2, 0, 1)
    assert any(
        parameter.shape == stem.shape and np.array_equal(parameter.detach().numpy(), stem)
        for parameter in names["model"].parameters()
    )
    assert not any(name.startswith("classifier") for name in names["model"].state_dict())
    assert run(tmp_path / "hub", f"--output={tmp_path / 'again'}")[0] == 0
    assert model_dir.read(tmp_path / "again").features_only
