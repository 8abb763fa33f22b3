"""Augmentation against torchvision and timm; TensorFlow's crop against its source code."""

import importlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mbv2_jax.data.decoding import decode
from mbv2_jax.data.transforms import augment, image_ops, timm_augment
from mbv2_jax.data.transforms.pipeline import make_transform
from tests.support import peers
from tests.support.pictures import assert_same, draw_pictures
from tests.support.samples import change


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return draw_pictures()


INTERPOLATIONS = ("nearest", "bilinear")  # torchvision's default, and its recipes' choice
BINS = 31  # torchvision's default


@pytest.fixture(scope="module")
def torchvision_policies():
    peers.torchvision()
    return importlib.import_module("torchvision.transforms.autoaugment")


@pytest.fixture(scope="module")
def timm_policies():
    peers.timm()
    return importlib.import_module("timm.data.auto_augment")


@pytest.fixture(scope="module")
def photos(check_data) -> list[Image.Image]:
    """Returns 20 photos of ImageNet, resized to sides of 176 to 224 pixels."""
    paths = sorted((check_data / "data" / "imagenet_val20").glob("*.JPEG"))
    assert len(paths) == 20
    sides = itertools.product((176, 193, 210, 224), (177, 184, 192, 201, 224))
    return [decode(path.read_bytes()).resize(size) for path, size in zip(paths, sides, strict=True)]


def torchvision_spaces(module, size: tuple[int, int], bins: int):
    """Yields (our table, torchvision's space) of each policy for an image of (width, height)."""
    usual = augment.usual_table(*size)
    yield usual, module.RandAugment()._augmentation_space(bins, size[::-1])
    yield (
        {name: usual.get(name) for name in [*usual, "Invert"] if name != "Identity"},
        module.AutoAugment()._augmentation_space(bins, size[::-1]),
    )
    yield augment.WIDE_TABLE, module.TrivialAugmentWide()._augmentation_space(bins)


@pytest.mark.parametrize("bins", [2, 10, 11, 31, 64])
@pytest.mark.parametrize("size", [(224, 224), (176, 176), (500, 375), (1, 333)])
def test_tables_are_torchvisions(torchvision_policies, bins, size):
    """Names, signs and magnitudes are equal, to the last bit."""
    for table, space in torchvision_spaces(torchvision_policies, size, bins):
        assert sorted(table) == sorted(space)
        for name, (magnitudes, signed) in space.items():
            assert signed == (name in augment.SIGNED)
            highest = table[name]
            if highest is None:
                assert magnitudes.ndim == 0
                continue
            ours = [augment.magnitude_of(name, highest, i, bins) for i in range(bins)]
            assert ours == magnitudes.tolist(), (name, size)


def assert_operations_are_torchvisions(module, images: list[Image.Image]) -> None:
    """Compares every operation of the policies, at every magnitude bin and with both signs."""
    arguments: dict[tuple[str, float | None], None] = {}
    for number, image in enumerate(images):
        arguments.clear()
        interpolations = INTERPOLATIONS[
            : 2 if number < 5 else 1
        ]  # the second, which is slow, for a few
        for bins in (10, BINS):
            for table, space in torchvision_spaces(module, image.size, bins):
                for name, (_, signed) in space.items():
                    if (highest := table[name]) is None:
                        arguments[name, None] = None
                        continue
                    for index in range(bins):
                        value = augment.magnitude_of(name, highest, index, bins)
                        for sign in (1, -1) if signed else (1,):
                            arguments[name, sign * value] = None
        for name, argument in arguments:
            for how in interpolations if name in augment.GEOMETRIC else INTERPOLATIONS[:1]:
                ours = augment.apply(name, image, argument, how)
                theirs = module._apply_op(
                    image, name, argument or 0.0, module.InterpolationMode(how), None
                )
                assert_same(ours, theirs, (name, argument, how, image.size))


def test_every_operation_at_every_magnitude_is_torchvisions_on_photos(torchvision_policies, photos):
    assert_operations_are_torchvisions(torchvision_policies, photos)


def test_every_operation_at_every_magnitude_is_torchvisions(torchvision_policies, pictures):
    assert_operations_are_torchvisions(torchvision_policies, pictures)


def draw_from(rng: np.random.Generator, patch: pytest.MonkeyPatch) -> None:
    """Makes torch's random functions draw from `rng`, as NumPy's corresponding functions do."""

    def randint(low, high=None, size=None, dtype=None):
        if size is None:
            low, high, size = 0, low, high
        return torch.from_numpy(rng.integers(low, high, size=size))

    patch.setattr(torch, "randint", randint)
    patch.setattr(torch, "rand", lambda size: torch.from_numpy(rng.random(size)))
    patch.setattr(torch, "randperm", lambda n: torch.from_numpy(rng.permutation(n)))
    patch.setattr(
        torch.Tensor, "uniform_", lambda self, low, high: self.fill_(rng.uniform(low, high))
    )


POLICIES = [
    ("auto_augment()", "AutoAugment", {"policy": "imagenet"}),
    ("auto_augment('cifar10')", "AutoAugment", {"policy": "cifar10"}),
    ("auto_augment('svhn')", "AutoAugment", {"policy": "svhn"}),
    ("rand_augment()", "RandAugment", {}),
    (
        "rand_augment(3, 12, num_magnitude_bins=20)",
        "RandAugment",
        {"num_ops": 3, "magnitude": 12, "num_magnitude_bins": 20},
    ),
    ("trivial_augment_wide()", "TrivialAugmentWide", {}),
    ("trivial_augment_wide(7)", "TrivialAugmentWide", {"num_magnitude_bins": 7}),
    # as torchvision's own recipes have them
    ("auto_augment(interpolation='bilinear')", "AutoAugment", {"interpolation": "bilinear"}),
    ("rand_augment(interpolation='bilinear')", "RandAugment", {"interpolation": "bilinear"}),
    (
        "trivial_augment_wide(interpolation='bilinear')",
        "TrivialAugmentWide",
        {"interpolation": "bilinear"},
    ),
]


@pytest.mark.parametrize(("spec", "name", "arguments"), POLICIES, ids=[p[0] for p in POLICIES])
def test_policies_are_torchvisions_draw_by_draw(
    torchvision_policies, pictures, monkeypatch, spec, name, arguments
):
    """torchvision's own code, given our random numbers, makes the same images."""
    arguments = dict(arguments)
    if "policy" in arguments:
        arguments["policy"] = torchvision_policies.AutoAugmentPolicy(arguments["policy"])
    if "interpolation" in arguments:
        arguments["interpolation"] = torchvision_policies.InterpolationMode(
            arguments["interpolation"]
        )
    theirs = getattr(torchvision_policies, name)(**arguments)
    ours = make_transform(f"{spec}|resize(9)", 9).operations[0]
    for seed in range(300):
        image = pictures[seed % len(pictures)]
        with monkeypatch.context() as patch:
            draw_from(np.random.default_rng(seed), patch)
            expected = theirs(image)
        assert_same(change(ours, image, np.random.default_rng(seed)), expected, seed)


JITTERS = [
    {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4},  # ImageNet recipes'
    {"brightness": 2, "contrast": (0.2, 0.7), "saturation": (0, 3.5), "hue": 0.5},
    {"hue": (-0.3, -0.1)},
    {"contrast": (1.0, 1.0), "saturation": 0.3},
    {},
]


@pytest.mark.parametrize("arguments", JITTERS, ids=str)
def test_color_jitter_is_torchvisions_draw_by_draw(pictures, monkeypatch, arguments):
    peers.torchvision()
    from torchvision.transforms import ColorJitter

    theirs, ours = ColorJitter(**arguments), augment.ColorJitter(**arguments)
    for seed in range(100):
        image = pictures[seed % len(pictures)]
        with monkeypatch.context() as patch:
            draw_from(np.random.default_rng(seed), patch)
            expected = theirs(image)
        assert_same(change(ours, image, np.random.default_rng(seed)), expected, seed)


def test_adjustments_are_torchvisions_on_photos(photos):
    peers.torchvision()
    from torchvision.transforms import functional

    for image in photos:
        for factor in (0.0, 0.31, 1.0, 1.7):
            for name in ("brightness", "contrast", "saturation"):
                expected = getattr(functional, f"adjust_{name}")(image, factor)
                assert_same(getattr(image_ops, name)(image, factor), expected, (name, factor))
        for turn in (-0.5, -0.123, 0.0, 0.001, 0.37, 0.5):
            expected = functional.adjust_hue(image, turn)
            assert_same(image_ops.hue(image, turn), expected, turn)


@pytest.mark.parametrize("size", [(224, 224), (40, 90), (3, 3), (1, 1)])
def test_erased_boxes_are_torchvisions_draw_by_draw(monkeypatch, size):
    peers.torchvision()
    from torchvision.transforms import RandomErasing

    width, height = size
    ours = augment.RandomErasing()
    image = torch.zeros(3, height, width)
    found = 0
    for seed in range(300):
        with monkeypatch.context() as patch:
            draw_from(np.random.default_rng(seed), patch)
            top, left, box_height, box_width, value = RandomErasing.get_params(
                image, (0.02, 0.33), (0.3, 3.3), [0.0]
            )
        box = ours.box(width, height, np.random.default_rng(seed))
        if value is image:  # torchvision found none
            assert box is None
        else:
            found += 1
            assert box == (left, top, box_width, box_height)
    assert found >= (0 if size == (1, 1) else 250)


def test_erasing_is_torchvisions_after_normalisation(pictures, monkeypatch):
    peers.torchvision()
    from torchvision.transforms import Normalize, RandomErasing
    from torchvision.transforms.functional import pil_to_tensor

    normalize = Normalize(augment.MEAN.tolist(), augment.STD.tolist())
    ours = augment.RandomErasing(prob=0.7)
    erased = 0
    for seed in range(100):
        image = pictures[seed % len(pictures)]
        before = normalize(pil_to_tensor(image).float())
        with monkeypatch.context() as patch:
            draw_from(np.random.default_rng(seed), patch)
            expected = RandomErasing(p=0.7)(before)
        result = change(ours, image, np.random.default_rng(seed))
        actual = normalize(pil_to_tensor(result).float())
        inside = (expected != before).any(0)
        assert torch.equal(actual[:, ~inside], expected[:, ~inside])
        # The mean is rounded to an integer: (104 - 103.53) / 57.375 = 0.0082 for blue.
        assert (actual - expected).abs().max() < 0.0083
        erased += bool(inside.any())
    assert 50 < erased < 90  # 0.7 of 100, less those for which a tiny picture has no room


def test_erasing_with_noise_is_timms_clipped():
    """timm's "pixel" is a normal number for each value of normalised pixels."""
    image = Image.new("RGB", (200, 150), (1, 2, 3))
    ours = augment.RandomErasing(prob=1.0, mode="noise")
    values = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        rng.random()  # whether to erase at all
        box = ours.box(200, 150, rng)
        assert box is not None
        left, top, width, height = box
        inside = np.zeros((150, 200), bool)
        inside[top : top + height, left : left + width] = True
        result = np.asarray(change(ours, image, np.random.default_rng(seed)))
        assert (result[~inside] == (1, 2, 3)).all()
        values.append(result[inside])
    pixels = np.concatenate(values)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for channel in range(3):
        # Shares at or below a value: the normal distribution's, with its tails on 0 and 255.
        for value in (0, 65, 100, 182, 254):
            expected = normal_cdf((value + 0.5 - mean[channel]) / std[channel])
            share = (pixels[:, channel] <= value).mean()
            # Five standard deviations of a share of so many independent draws.
            assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / len(pixels))
        clipped = np.isin(pixels[:, channel], (0, 255)).mean()
        # The docstring's 2.9, 2.9 and 4.0 %, and the values that are rounded to 0 and to 255.
        assert clipped == pytest.approx((0.029, 0.029, 0.040)[channel], abs=0.003)


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


# timm's tables.
TIMM_SETS = {False: "_RAND_TRANSFORMS", True: "_RAND_INCREASING_TRANSFORMS"}


def timm_hparams() -> dict:
    """Returns timm's parameters for a size of 224 and ImageNet's mean."""
    return {"translate_const": 100, "img_mean": (124, 116, 104)}


class TimmDraws:
    """Stands in for Python's `random` in timm."""

    def __init__(self, rng: np.random.Generator):
        self.random, self.gauss = rng.random, rng.normal
        self.choice = lambda options: options[rng.integers(len(options))]


class NumpyDraws:
    """Stands in for `numpy.random` in timm."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def choice(self, options: list, number: int, replace: bool, p: None) -> list:
        assert replace and p is None
        return [options[index] for index in self.rng.integers(len(options), size=number)]


@pytest.fixture
def draw_timm_from(timm_policies, monkeypatch):
    """Makes timm draw from a NumPy generator, and posterize to 0 bits as with older Pillows."""
    posterize = ImageOps.posterize
    black = SimpleNamespace(
        posterize=lambda image, bits: (
            posterize(image, bits) if bits else Image.new("RGB", image.size)
        )
    )
    for name in ("autocontrast", "equalize", "invert", "solarize"):
        setattr(black, name, getattr(ImageOps, name))

    def draw(rng: np.random.Generator) -> None:
        monkeypatch.setattr(timm_policies, "ImageOps", black)
        monkeypatch.setattr(timm_policies, "random", TimmDraws(rng))
        monkeypatch.setattr(timm_policies, "np", SimpleNamespace(random=NumpyDraws(rng)))

    return draw


@pytest.mark.parametrize("increasing", [False, True])
def test_timm_operations_are_timms_at_all_levels(
    timm_policies, draw_timm_from, pictures, increasing
):
    """Names, and pixels at whole and half levels, are equal."""
    names = getattr(timm_policies, TIMM_SETS[increasing])
    steps = timm_augment.INCREASING_STEPS if increasing else timm_augment.STEPS
    assert [name.removesuffix("Increasing") for name in names] == list(steps)
    for name, (ours_name, step) in zip(names, steps.items(), strict=True):
        for level in np.arange(0, 10.01, 0.5).tolist():
            theirs = timm_policies.AugmentOp(name, 1.0, level, timm_hparams())
            for seed, image in enumerate(pictures):
                draw_timm_from(np.random.default_rng(seed))
                ours = timm_augment._apply(step, image, level / 10, np.random.default_rng(seed))
                assert_same(ours, theirs(image), (ours_name, level, seed))


def test_timm_operations_are_timms_on_photos(timm_policies, draw_timm_from, photos):
    for increasing, names in TIMM_SETS.items():
        steps = timm_augment.INCREASING_STEPS if increasing else timm_augment.STEPS
        for name, step in zip(getattr(timm_policies, names), steps.values(), strict=True):
            theirs = timm_policies.AugmentOp(name, 1.0, 9, timm_hparams())
            for seed, image in enumerate(photos):
                draw_timm_from(np.random.default_rng(seed))
                ours = timm_augment._apply(step, image, 0.9, np.random.default_rng(seed))
                assert_same(ours, theirs(image), (name, seed))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("timm_rand_augment()", "rand-m9-mstd0.5"),
        ("timm_rand_augment(9, increasing=True)", "rand-m9-mstd0.5-inc1"),
        ("timm_rand_augment(7, 3, 0, prob=1.0)", "rand-m7-n3-p1.0-mstd0"),
        ("timm_rand_augment(magnitude=1, magnitude_std=5.0, prob=0.9)", "rand-m1-mstd5.0-p0.9"),
    ],
)
def test_timm_rand_augment_is_timms_draw_by_draw(
    timm_policies, draw_timm_from, pictures, spec, name
):
    theirs = timm_policies.rand_augment_transform(name, timm_hparams())
    ours = make_transform(f"{spec}|resize(9)", 9).operations[0]
    for seed in range(300):
        image = pictures[seed % len(pictures)]
        draw_timm_from(np.random.default_rng(seed))
        assert_same(change(ours, image, np.random.default_rng(seed)), theirs(image), seed)
