"""Augmentation: arguments, images of any size, and the same draws from the same seed."""

import pickle

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data.transforms.operation import Operation
from mbv2_jax.data.transforms.pipeline import OPERATIONS, make_transform
from mbv2_jax.errors import UserError
from tests.support.samples import change, pixels

SPECS = [
    *(f"auto_augment('{policy}')" for policy in ("imagenet", "cifar10", "svhn")),
    "rand_augment(magnitude=30)",
    "trivial_augment_wide()",
    "timm_rand_augment()",
    "timm_rand_augment(10, magnitude_std=3.0, increasing=True, prob=1.0)",
    "color_jitter(0.4, (0.5, 1.5), saturation=0.4, hue=0.1)",
    "photometric_distortion()",
    "photometric_distortion(64, (0.1, 3.0), saturation_range=(0.2, 4.0), hue_delta=90)",
    "ssd_distortion()",
    "ssd_distortion(64, (0.1, 3.0), saturation_range=(0.2, 4.0), hue_delta=180)",
    "random_erasing(1.0)",
    "random_erasing(1.0, (0.02, 0.333333), (0.3, 3.333333), mode='noise')",
]
GEOMETRIC = {
    "random_resized_crop",
    "random_flip",
    "random_crop",
    "resize_edge",
    "center_crop",
    "resize",
    "random_scale",
    "fit",
    "pad",
    "expand",
    "min_iou_crop",
}
INCEPTION = [
    "inception_crop(16)",
    "inception_crop(16, (0.05, 1.0), (0.75, 1.33), 100, 0.1, None)",
]


def operation(spec: str) -> Operation:
    return make_transform(f"{spec}|resize(16)", 16).operations[0]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_every_operation_is_tried_here():
    assert {spec.split("(")[0] for spec in SPECS + INCEPTION} == set(OPERATIONS) - GEOMETRIC


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (65, 43)])
def test_mode_and_size_stay(spec, size):
    tried = operation(spec)
    image = picture(*size)
    before = image.tobytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        result = change(tried, image, rng)
        assert (result.mode, result.size) == ("RGB", size)
    assert image.tobytes() == before  # the caller's image has not changed
    assert tried.output_size((16, 24)) == (16, 24)
    assert tried.output_size(None) is None


@pytest.mark.parametrize("spec", INCEPTION)
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (65, 43)])
def test_inception_crop_of_any_image_is_the_square(spec, size):
    tried = operation(spec)
    rng = np.random.default_rng(0)
    for _ in range(60):
        left, top, width, height = tried.box(*size, rng)  # type: ignore[attr-defined]
        assert left >= 0 and top >= 0 and width >= 1 and height >= 1
        assert left + width <= size[0] and top + height <= size[1]
        assert change(tried, picture(*size), rng).size == (16, 16)
    assert tried.output_size(None) == (16, 16)


@pytest.mark.parametrize("spec", SPECS + INCEPTION)
def test_the_draws_alone_decide_the_pixels(spec):
    """A pickled operation, as in another process, gives the same pixels for the same seeds."""
    tried, image = operation(spec), picture(40, 30)
    copy = pickle.loads(pickle.dumps(tried))
    results = [change(tried, image, np.random.default_rng(seed)).tobytes() for seed in range(20)]
    again = [change(copy, image, np.random.default_rng(seed)).tobytes() for seed in range(20)]
    assert results == again
    assert len(set(results)) > 5
    assert tried.random


def test_operations_without_effect_change_nothing():
    image = picture(40, 30)
    for spec in (
        "color_jitter()",
        "color_jitter(0, (1.0, 1.0), 0.0, (0.0, 0.0))",
        "rand_augment(0)",
        "timm_rand_augment(prob=0.0)",
        "random_erasing(0.0)",
    ):
        tried = operation(spec)
        for seed in range(20):
            assert change(tried, image, np.random.default_rng(seed)).tobytes() == image.tobytes()


def test_erased_pixels_have_the_mean_of_imagenet():
    black = Image.new("RGB", (64, 64))
    erased = np.asarray(change(operation("random_erasing(1.0)"), black, np.random.default_rng(0)))
    assert {tuple(pixel) for pixel in erased.reshape(-1, 3).tolist()} == {
        (0, 0, 0),
        (124, 116, 104),  # 123.675, 116.28, 103.53
    }


def test_a_recipe_reads_as_one_string():
    transform = make_transform(
        "random_resized_crop(size)|random_flip(0.5)|trivial_augment_wide()|random_erasing(0.1)", 24
    )
    assert pixels(transform, picture(50, 40), np.random.default_rng(0)).shape == (24, 24, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("auto_augment('imagnet')", "unknown policy 'imagnet'; did you mean 'imagenet'?"),
        ("auto_augment(3)", "unknown policy 3; known are 'imagenet', 'cifar10', 'svhn'"),
        ("auto_augment([1])", "unknown policy [1]; known are 'imagenet', 'cifar10', 'svhn'"),
        ("rand_augment(-1)", "num_ops=-1 must be a whole number, 0 or more"),
        ("rand_augment(2, 9.5)", "magnitude=9.5 must be a whole number, 0 or more"),
        ("rand_augment(2, 31)", "magnitude=31 must be below num_magnitude_bins, 31"),
        ("trivial_augment_wide(1)", "num_magnitude_bins=1 must be a whole number, 2 or more"),
        ("trivial_augment_wide(True)", "num_magnitude_bins=True must be a whole number, 2 or more"),
        ("timm_rand_augment(11)", "magnitude=11 must be a number from 0 to 10"),
        ("timm_rand_augment('9')", "magnitude='9' must be a number from 0 to 10"),
        ("timm_rand_augment(9, 1.5)", "num_ops=1.5 must be a whole number, 0 or more"),
        ("timm_rand_augment(magnitude_std=-1)", "magnitude_std=-1 must be a number, 0 or more"),
        ("timm_rand_augment(magnitude_std=1e999)", "magnitude_std=inf must be a number, 0 or more"),
        ("timm_rand_augment(increasing=1)", "increasing=1 must be True or False"),
        ("timm_rand_augment(prob=1.5)", "prob=1.5 must be a number from 0 to 1"),
        (
            "color_jitter(-0.4)",
            "brightness=-0.4 must be a number, 0 or more, or (low, high) with 0 <= low <= high",
        ),
        (
            "color_jitter(contrast=(1.5, 0.5))",
            "contrast=(1.5, 0.5) must be a number, 0 or more, or (low, high) with 0 <= low <= high",
        ),
        (
            "color_jitter(saturation='much')",
            "saturation='much' must be a number, 0 or more, or (low, high) with 0 <= low <= high",
        ),
        (
            "color_jitter(hue=0.6)",
            "hue=0.6 must be a number from 0 to 0.5, or (low, high) with -0.5 <= low <= high",
        ),
        ("random_erasing(2)", "prob=2 must be a number from 0 to 1"),
        (
            "random_erasing(0.1, (0.02, 1.5))",
            "area_range=(0.02, 1.5) must be (low, high) with 0 < low <= high <= 1",
        ),
        (
            "random_erasing(0.1, aspect_ratio_range=(0.3, 1e999))",
            "aspect_ratio_range=(0.3, inf) must be (low, high) with 0 < low <= high",
        ),
        ("random_erasing(mode='pixel')", "unknown mode 'pixel'; known are 'mean', 'noise'"),
        (
            "inception_crop()",
            "inception_crop: it needs 'size'; write for example inception_crop(size)",
        ),
        ("inception_crop(0)", "size=0 must be a whole number of pixels, 1 or more"),
        (
            "inception_crop(8, (0.0, 1.0))",
            "area_range=(0.0, 1.0) must be (low, high) with 0 < low <= high <= 1",
        ),
        ("inception_crop(8, max_attempts=0)", "max_attempts=0 must be a whole number, 1 or more"),
        (
            "inception_crop(8, min_object_covered=1.1)",
            "min_object_covered=1.1 must be a number from 0 to 1",
        ),
        (
            "inception_crop(8, center_crop_fraction=0)",
            "center_crop_fraction=0 must be a number above 0, up to 1, or None",
        ),
        ("inception_crop(8, interpolation=[1])", "unknown interpolation [1]; known are"),
        ("inception_crop(8, interpolation='cubic')", "unknown interpolation 'cubic'; did you mean"),
        ("trivialaugment_wide()", "unknown operation 'trivialaugment_wide'; did you mean"),
        ("rand_augment(strength=3)", "rand_augment: it has no argument 'strength'; known are"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_would_be_right(spec, message):
    with pytest.raises(UserError) as error:
        operation(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
