"""ImageNet's class names in mmpretrain's wording."""

from mbv2_jax.data import labels
from tests.support import peers


def match(theirs, ours):
    return labels.match(theirs, ours, data="the data", model="the model")


def test_imagenets_names_in_mmpretrains_wording_are_the_same_classes():
    peers.mmpretrain()
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    short = [name.partition(",")[0] for name in IMAGENET_CATEGORIES]
    assert short.count("crane") == 2  # and 'maillot': no name would tell them apart
    found, how = match(IMAGENET_CATEGORIES, short)
    assert found == tuple(range(1000))
    assert "another wording" in how
