"""ImageNet's class names and WordNet ids against those that the peers ship."""

import pathlib
import random

import pytest

from mbv2_jax.data import classes
from mbv2_jax.data.classes import IMAGENET_NAMES, IMAGENET_WNIDS
from tests.support import peers


def categories() -> tuple[str, ...]:
    """torchvision has its own wording, of one or two words a class."""
    peers.torchvision()
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return tuple(_IMAGENET_CATEGORIES)


def mmpretrain_names() -> tuple[str, ...]:
    peers.mmpretrain()
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    return tuple(IMAGENET_CATEGORIES)


def test_wordnet_ids_are_timms():
    peers.torchvision()  # which timm imports
    import timm

    assert timm.__file__ is not None
    file = pathlib.Path(timm.__file__).parent / "data/_info/imagenet_synsets.txt"
    assert tuple(file.read_text().split()) == IMAGENET_WNIDS
    assert len(set(IMAGENET_WNIDS)) == 1000
    assert sorted(IMAGENET_WNIDS) == list(IMAGENET_WNIDS)


def test_names_are_mmpretrains():
    assert mmpretrain_names() == IMAGENET_NAMES


def test_names_and_ids_belong_together():
    # timm has WordNet lemmas by id, which do not depend on positions.
    peers.torchvision()
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    theirs = [info.label_name_to_description(wnid, detailed=False) for wnid in IMAGENET_WNIDS]
    same = sum(
        a.split(",")[0].lower() == b.split(",")[0].lower()
        for a, b in zip(theirs, IMAGENET_NAMES, strict=True)
    )
    # WordNet 3 renamed some: its 'great white shark' comes first as 'white shark', for instance.
    assert same > 950


@pytest.mark.parametrize("names", [mmpretrain_names, categories, lambda: IMAGENET_WNIDS])
def test_imagenet_is_recognised_in_anyones_wording(names):
    assert classes.imagenet_offset(names()) == 0
    assert classes.imagenet_offset(list(names())) == 0
    assert classes.imagenet_offset(("background", *names())) == 1


def test_names_of_a_published_checkpoint_are_recognised(check_data):
    import torch

    file = torch.load(check_data / "weights/mm_mobilenet_v2.pth", weights_only=True)
    assert classes.imagenet_offset(file["meta"]["CLASSES"]) == 0


def test_other_classes_are_not_imagenet():
    names = categories()
    shuffled = random.Random(0).sample(names, 1000)
    # With the background last, or a class missing or twice, later numbers would be other classes.
    for other in (shuffled, (*names, "background"), names[1:], (*names[:500], *names[499:999]), ()):
        assert classes.imagenet_offset(other) is None
