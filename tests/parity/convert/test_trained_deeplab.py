"""A trained DeepLab of TensorFlow, in a .tflite file, gives TFLite's recorded results."""

import pathlib

import numpy as np
import pytest

import mbv2_jax
from mbv2_jax import model_dir
from mbv2_jax.convert import importer
from mbv2_jax.data.classes import VOC_NAMES
from tests.support import run_deeplab
from tests.support.convert_command import make_run

PICTURES = 10


@pytest.fixture
def trained(check_data) -> pathlib.Path:
    return check_data / "golden" / "deeplab_tf" / "deeplabv3_257_mv_gpu.tflite"


@pytest.fixture
def golden(check_data):
    return np.load(check_data / "golden" / "deeplab_tf" / "golden.npz")


def pixels_that_differ(mask: np.ndarray, logits: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
    """Counts the pixels of another class, and those that are not compared.

    Two logits within 1e-3 of each other are as good as equal: float32 decides between them.
    """
    best = np.sort(logits, -1)
    close = best[..., -1] - best[..., -2] <= 1e-3
    return int(((mask != theirs) & ~close).sum()), int(close.sum())


def test_the_command_converts_the_whole_network(trained, golden, tmp_path, monkeypatch, capsys):
    """Its logits, and the classes of each pixel as a user of the predictor gets them."""
    code, out, err = make_run(monkeypatch, capsys)(trained, f"--output={tmp_path / 'm'}")
    assert code == 0, err
    assert "width 0.5, output stride 8, Mobile DeepLabv3 without ASPP, 21 classes" in out
    assert "272 used, 0 ignored" in out
    assert "the file names no classes: VOC's names are used" in err
    saved = model_dir.read(tmp_path / "m")
    assert saved.spec.task == "segmentation"
    assert saved.classes == VOC_NAMES
    assert saved.spec.head.align_corners  # as the graph says
    assert saved.spec.mode.folded_norm  # so that training asks for norm_eval
    images = saved.spec.preprocessing
    assert (images.image_size, images.mean, images.std) == (257, (127.5,) * 3, (127.5,) * 3)

    model = mbv2_jax.init_model(tmp_path / "m")
    uncompared = 0
    for picture in range(PICTURES):
        pixels = golden[f"image_{picture}_u8"]
        theirs = golden[f"logits33_{picture}"]
        x = pixels[None].astype(np.float32) / 127.5 - 1
        ours = run_deeplab.coarse_logits(saved, x)
        assert np.ptp(theirs) > 10
        # Up to 41; float32 rounds at 1e-7 of a map, which 54 layers enlarge.
        np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=1e-3)
        prediction = model.predict(pixels)[0]
        wrong, close = pixels_that_differ(
            prediction["mask"], np.asarray(model(pixels[None]))[0], golden[f"argmax257_{picture}"]
        )
        assert not wrong
        uncompared += close
    # 42 of 660,490 when this was written.
    assert uncompared < 200


def test_the_file_itself_is_a_checkpoint(trained, golden):
    """Every command that opens a model opens the file, as if it had been converted before."""
    model = mbv2_jax.init_model(trained)
    pixels = golden["image_0_u8"]
    prediction = model.predict(pixels)[0]
    theirs = golden["argmax257_0"]
    assert (prediction["mask"] != theirs).mean() < 1e-3
    largest = np.bincount(theirs.ravel()).argmax()
    assert prediction["classes"][0] == VOC_NAMES[largest]


def test_training_needs_norm_eval(trained):
    """Its statistics are made up, since the file has BatchNorm folded into the convolutions."""
    images = np.zeros((2, 33, 33, 3), np.float32)
    module, variables = mbv2_jax.load(trained)
    with pytest.raises(ValueError, match="norm_eval"):
        module.apply(variables, images, train=True, mutable=["batch_stats"])
    module, variables = mbv2_jax.load(trained, norm_eval=True, dropout=0.0)
    trained_on = module.apply(variables, images, train=True)
    # The same operations, perhaps in another order: float32 rounds logits of up to 40 at 4e-6.
    np.testing.assert_allclose(trained_on, module.apply(variables, images), atol=1e-3)


def test_its_backbone_alone(trained):
    """The head is left out, and the network has the sizes of the file."""
    imported = importer.load(trained, features_only=True)
    backbone = imported.saved.spec.backbone
    assert imported.saved.features_only
    assert (backbone.width, backbone.output_stride, backbone.padding) == (0.5, 8, "same")
    assert not backbone.last_convolution
    assert "left out: image_pooling/kernel" in imported.summary["arrays"]


def test_a_new_head_for_other_classes(trained):
    """Keeps all layers but the logits, as a segmentation run that starts from the file does."""
    module, variables = mbv2_jax.load(trained, num_classes=5)
    theirs = model_dir.read(trained).params
    assert variables["params"]["logits"]["kernel"].shape == (1, 1, 256, 5)
    for layer in ("stem", "aspp0", "projection"):
        ours = variables["params"][layer]["conv"]["kernel"]
        np.testing.assert_array_equal(ours, theirs[layer]["conv"]["kernel"])
    assert module.architecture.output_stride == 8
