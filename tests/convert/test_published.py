"""The table of published weights."""

import re

import pytest

from mbv2_jax.convert.published import PUBLISHED, identify

# The figure and its images; the paper prints the first, and 22.1 mAP for SSDLite on other images.
OTHERS = {
    "deeplabv3_voc": ("mIoU", 75.32, 1449, 513),
    "mmdet_ssdlite_coco": ("mAP", 21.3, 5000, 320),
    "tf_ssdlite_coco": ("mAP", 22.0, 8059, 300),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name):
    figure, value, examples, size = OTHERS[name]
    weights = PUBLISHED[name]
    assert weights.address.startswith("https://")
    assert (weights.card()[figure], weights.card()["examples"]) == (value, examples)
    assert weights.preprocessing.image_size == size
    # mmdet's names hold the SHA-256, and TensorFlow's none.
    assert bool(weights.sha256) == weights.file.endswith(f"-{weights.sha256}.pth")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in OTHERS])
def test_classifiers_are_plausible(name):
    weights = PUBLISHED[name]
    assert weights.address.startswith("https://")
    assert weights.address.endswith(f"/{weights.file}")
    assert 45 < weights.figures["top1"] < weights.figures["top5"] < 95
    if name.startswith("tf-slim"):  # whose names hold no SHA-256
        assert weights.file == f"mobilenet_v2{name.removeprefix('tf-slim')}.tgz"
        assert weights.sha256 == ""
        return
    assert re.fullmatch(r"[0-9a-f]{8}", weights.sha256)
    assert weights.file.endswith(f"-{weights.sha256}.pth")
    assert identify(weights.sha256 + "0" * 56) == weights


def test_unknown_files_are_not_identified():
    assert identify("0" * 64) is None
