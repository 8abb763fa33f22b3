"""A folder's images are in the order of torchvision's ImageFolder."""

import pytest

from mbv2_jax.data.sample import Sample
from mbv2_jax.data.sources import open_source
from tests.support import peers
from tests.support.flowers import write_flowers


@pytest.fixture
def flowers(tmp_path):
    return write_flowers(tmp_path)


def test_folder_is_in_the_order_of_torchvision(flowers):
    peers.torchvision()
    from torchvision.datasets import ImageFolder

    expected = ImageFolder(str(flowers / "train"))
    source = open_source(f"folder:{flowers}", "train")
    assert source.class_names == tuple(expected.classes)
    assert len(source) == len(expected.samples) == 9
    for i, (path, label) in enumerate(expected.samples):
        assert source.describe(i) == path
        with open(path, "rb") as file:
            assert source[i] == Sample(file.read(), path, {"label": label})
