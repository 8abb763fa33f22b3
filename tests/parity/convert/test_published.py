"""The table of published weights, beside the publishers' installed packages."""

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.convert.published import PUBLISHED
from mbv2_jax.data.sample import Sample
from mbv2_jax.data.transforms.pipeline import make_transform
from tests.support import peers


def crop(name: str, image: Image.Image) -> np.ndarray:
    """Returns our evaluation crop for published weights: (size, size, 3) uint8."""
    preprocessing = PUBLISHED[name].preprocessing
    transform = make_transform(preprocessing.eval_transforms, preprocessing.image_size)
    return transform(Sample(image, id=""), np.random.default_rng(0)).image


@pytest.fixture(scope="module", params=[(500, 375), (333, 500), (240, 201)], ids=str)
def image(request) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (*request.param, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_mmpretrains_entry():
    peers.mmpretrain()
    from mmpretrain.apis import ModelHub

    theirs = ModelHub.get("mobilenet-v2_8xb32_in1k")
    ours = PUBLISHED["mmpretrain"]
    assert ours.address == theirs.weights
    metrics = theirs.results[0].metrics
    assert tuple(ours.figures.values()) == (metrics["Top 1 Accuracy"], metrics["Top 5 Accuracy"])


@pytest.mark.parametrize(
    ("name", "weights"), [("torchvision", "IMAGENET1K_V1"), ("torchvision_v2", "IMAGENET1K_V2")]
)
def test_torchvisions_entries(name, weights, image):
    theirs = peers.torchvision().models.MobileNet_V2_Weights[weights]
    ours = PUBLISHED[name]
    assert ours.address == theirs.url
    metrics = theirs.meta["_metrics"]["ImageNet-1K"]
    assert tuple(ours.figures.values()) == (metrics["acc@1"], metrics["acc@5"])
    preset = theirs.transforms(mean=(0, 0, 0), std=(1 / 255,) * 3)  # back to pixels
    pixels = peers.nhwc(preset(image)[None])[0]
    # Pillow does both; the difference is the rounding of pixel / 255 / (1 / 255).
    np.testing.assert_allclose(crop(name, image), pixels, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("timm", "mobilenetv2_100.ra_in1k"),
        ("timm_0.5", "mobilenetv2_050.lamb_in1k"),
        ("timm_1.4", "mobilenetv2_140.ra_in1k"),
        ("timm_110d", "mobilenetv2_110d.ra_in1k"),
        ("timm_120d", "mobilenetv2_120d.ra_in1k"),
    ],
)
def test_timms_entries(name, model, image):
    """timm's package has no figures to compare."""
    peers.torchvision()  # timm imports it
    import timm

    theirs = timm.get_pretrained_cfg(model)
    assert PUBLISHED[name].address == theirs.url
    config = timm.data.resolve_data_config(pretrained_cfg=theirs.to_dict())
    transform = timm.data.create_transform(**config | {"mean": (0, 0, 0), "std": (1 / 255,) * 3})
    pixels = peers.nhwc(transform(image)[None])[0]
    np.testing.assert_allclose(crop(name, image), pixels, atol=1e-3)  # as for torchvision


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("d-li14")])
def test_d_li14s_crops(name, image):
    """Its imagenet.py resizes to int(size / 0.875) and crops, with torchvision's transforms."""
    size = PUBLISHED[name].preprocessing.image_size
    peers.torchvision()
    from torchvision.transforms import CenterCrop, Resize

    resize = Resize(int(size / 0.875))
    theirs = CenterCrop(size)(resize(image))
    np.testing.assert_array_equal(crop(name, image), np.asarray(theirs))
