"""transformers' MobileNetV2ForSemanticSegmentation, read and written."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mbv2_jax import model_dir
from mbv2_jax.convert import importer
from mbv2_jax.ops.resize import resize_bilinear
from mbv2_jax.tasks.segmentation import scores
from tests.support import peers, run_deeplab
from tests.support.convert_command import make_run, refused

# 65 pixels are a map of 9 at output stride 8, 5 at 16 and 3 at 32.
SIZE = 65
NAMES = ("sky", "road", "car", "tree", "void")


def test_a_recorded_state_dict(check_data):
    """Logits and loss are transformers 4.57.6's."""
    folder = check_data / "golden" / "deeplab_hf"
    imported = importer.load(folder / "hf_deeplab_os16.pth")
    saved, golden = imported.saved, np.load(folder / "golden.npz")
    assert "2,113,557 parameters" in imported.summary["network"]  # the paper: 2.11 M
    assert "60 ignored" in imported.summary["arrays"]
    assert "layers that its network does not use" in imported.summary["arrays"]
    assert any("model.output_stride=16" in line for line in imported.warnings)
    x = np.ascontiguousarray(golden["x"].transpose(0, 2, 3, 1))
    logits = run_deeplab.coarse_logits(saved, x)
    theirs = golden["logits"].transpose(0, 2, 3, 1)
    # Of up to 120. In float64 both networks give the same logits to 1e-12, from which the recorded
    # ones, in float32, are 7.3e-4 away, and ours in float32 7.2e-4.
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5 * abs(theirs).max())
    assert theirs.std() > 10
    align = saved.spec.head.align_corners
    whole = resize_bilinear(jnp.asarray(logits), golden["labels"].shape[1:], align_corners=align)
    loss = float(scores.mean_cross_entropy(whole, golden["labels"]))
    assert loss == pytest.approx(float(golden["loss"]), rel=1e-5)


def network(output_stride: int, **config: Any) -> torch.nn.Module:
    """Returns transformers' network with random weights and statistics."""
    transformers = peers.transformers()
    names = dict(enumerate(NAMES))
    model = transformers.MobileNetV2ForSemanticSegmentation(
        transformers.MobileNetV2Config(output_stride=output_stride, id2label=names, **config)
    )
    peers.randomize(model, seed=output_stride)
    with torch.no_grad():
        model.segmentation_head.classifier.convolution.bias.uniform_(-1, 1)
    return model.eval()


def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (2, SIZE, SIZE, 3))


def of_torch(model: torch.nn.Module) -> np.ndarray:
    """Returns the network's logits, (N, h, w, classes) float64."""
    with torch.no_grad():
        return peers.nhwc(model.double()(peers.nchw(images())).logits)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert theirs.std() > 0.1
    # float64 rounds at 1e-16, which 54 layers enlarge; another padding, epsilon or array gives more
    # than 1e-4.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("output_stride", "tf_padding"), [(8, True), (16, True), (32, True), (16, False)]
)
def test_a_folder_and_back(output_stride, tf_padding, tmp_path, monkeypatch, capsys):
    """Its logits are the same here, and again in the folder that is written from our model."""
    run = make_run(monkeypatch, capsys)
    width = {8: 0.5, 16: 1.0, 32: 0.35}[output_stride]
    model = network(output_stride, tf_padding=tf_padding, depth_multiplier=width)
    model.save_pretrained(tmp_path / "theirs")
    code, out, err = run(tmp_path / "theirs", f"--output={tmp_path / 'ours'}")
    assert code == 0, err
    saved = model_dir.read(tmp_path / "ours")
    assert saved.classes == NAMES
    assert not saved.spec.head.align_corners  # as its loss resizes
    backbone = saved.spec.backbone
    assert (backbone.output_stride, backbone.width) == (output_stride, width)
    theirs = of_torch(model)
    assert_same(run_deeplab.coarse_logits(saved, images()), theirs)

    code, out, err = run(tmp_path / "ours", "--to=transformers", f"--output={tmp_path / 'again'}")
    assert code == 0, err
    assert "transformers.AutoModelForSemanticSegmentation.from_pretrained" in out
    opened, report = peers.transformers().AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert type(opened) is type(model)
    assert not any(report.values())
    assert tuple(opened.config.id2label.values()) == NAMES
    assert_same(of_torch(opened.eval()), theirs)
    assert model_dir.read(tmp_path / "again").description.to_json() == {
        **saved.description.to_json(),
        "origin": model_dir.read(tmp_path / "again").description.origin,
    }


def test_a_file_that_is_written(tmp_path, monkeypatch, capsys):
    """The printed line loads it with strict=True."""
    run = make_run(monkeypatch, capsys)
    network(16).save_pretrained(tmp_path / "theirs")
    run(tmp_path / "theirs", f"--output={tmp_path / 'ours'}")
    file = tmp_path / "out.pth"
    code, out, err = run(tmp_path / "ours", "--to=transformers", f"--output={file}")
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("load it with"))
    names: dict[str, Any] = {"transformers": peers.transformers(), "torch": torch}
    exec(line.removeprefix("load it with").strip(), names)
    saved = model_dir.read(tmp_path / "ours")
    assert_same(of_torch(names["model"]), run_deeplab.coarse_logits(saved, images()))


def test_other_frameworks_have_no_such_network(tmp_path, monkeypatch, capsys):
    run = make_run(monkeypatch, capsys)
    network(16).save_pretrained(tmp_path / "theirs")
    run(tmp_path / "theirs", f"--output={tmp_path / 'ours'}")
    outcome = run(tmp_path / "ours", "--to=torchvision", f"--output={tmp_path / 'out.pth'}")
    assert "is a model for segmentation, which --to=torchvision does not write" in refused(outcome)


def change(path: pathlib.Path, **values: Any) -> None:
    """Changes values of a JSON file, or writes it."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


def test_the_config_and_the_processor(tmp_path):
    """The published repository crops 513 pixels after resizing to 545, as a classifier's does."""
    network(16, image_size=513, classifier_dropout_prob=0.3, layer_norm_eps=1e-4).save_pretrained(
        tmp_path
    )
    processor = peers.transformers().MobileNetV2ImageProcessor(
        size={"shortest_edge": 545},
        crop_size={"height": 513, "width": 513},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.5, 0.5],
    )
    processor.save_pretrained(tmp_path)
    imported = importer.load(tmp_path)
    spec = imported.saved.spec
    assert (spec.mode.dropout, spec.backbone.bn_epsilon) == (0.3, 1e-4)
    images = spec.preprocessing
    assert (images.image_size, images.eval_transforms) == (513, "fit(size)|pad(size)")
    assert images.std == (63.75, 127.5, 127.5)
    assert any("cuts out the centre" in line for line in imported.warnings)

    change(tmp_path / "config.json", semantic_loss_ignore_index=0)
    change(tmp_path / "preprocessor_config.json", do_center_crop=False, do_resize=False)
    warnings = importer.load(tmp_path).warnings
    assert not any("cuts out the centre" in line for line in warnings)
    assert any("the label 0 do not count there" in line for line in warnings)
