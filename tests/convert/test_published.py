"""The table of published weights."""

import re

import pytest

from mbv2_jax.convert.published import PUBLISHED, identify


@pytest.mark.parametrize("name", PUBLISHED)
def test_entries_are_plausible(name):
    weights = PUBLISHED[name]
    assert weights.address.startswith("https://")
    assert weights.address.endswith(f"/{weights.file}")
    if name == "deeplabv3_voc":
        assert weights.card()["mIoU"] == 75.32  # at output stride 16, which the paper prints too
        assert weights.card()["examples"] == 1449  # VOC 2012's validation images
        assert (weights.sha256, weights.preprocessing.image_size) == ("", 513)
        return
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
