"""Operations for segmentation against mmsegmentation's and mmcv's own, given the same draws.

Masks and pixels are equal exactly with `backend="pillow"`; colours that went through OpenCV's HSV,
to one level.
"""

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data.sample import Sample
from mbv2_jax.data.transforms.pipeline import make_transform
from tests.support import peers

SIZES = [(97, 64), (61, 130), (80, 80)]  # (width, height)


@pytest.fixture(scope="module")
def mmseg():
    peers.mmseg()
    import mmseg.datasets.transforms

    return mmseg.datasets.transforms


@pytest.fixture(scope="module")
def mmcv(mmseg):
    import mmcv.transforms

    return mmcv.transforms


def sample(width: int, height: int) -> Sample:
    """Returns a picture of noise on waves, and a mask of blobs, some ignored."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / (5 + k)) + np.cos(y / (7 + k)) for k in range(3)], -1)
    pixels = (128 + 50 * waves + rng.normal(0, 12, (height, width, 3))).clip(0, 255)
    blobs = rng.integers(-4, 5, (4, 5)).clip(0).astype(np.uint8)  # class 0 has half of them
    mask = np.asarray(Image.fromarray(blobs).resize((width, height), 0)).copy()
    mask[mask == 4] = 255
    return Sample(Image.fromarray(pixels.astype(np.uint8)), "x", {"mask": Image.fromarray(mask)})


def results(given: Sample) -> dict:
    """Returns the dict that mmseg's transforms change; pixels in B, G, R."""
    mask = np.asarray(given.targets["mask"])
    return {
        "img": np.asarray(given.image)[..., ::-1],
        "gt_seg_map": mask,
        "seg_fields": ["gt_seg_map"],
    }


def assert_equal(ours: Sample, theirs: dict) -> None:
    np.testing.assert_array_equal(np.asarray(ours.image)[..., ::-1], theirs["img"])
    np.testing.assert_array_equal(np.asarray(ours.targets["mask"]), theirs["gt_seg_map"])


def operation(spec: str):
    return make_transform(f"{spec}|resize(4)", 4).operations[0]


@pytest.fixture
def draws(monkeypatch):
    """Returns a function that makes numpy's global draws those of a generator of ours."""

    def use(seed: int) -> np.random.Generator:
        rng = np.random.default_rng(seed)
        monkeypatch.setattr(np.random, "randint", rng.integers)
        monkeypatch.setattr(np.random, "uniform", rng.uniform)
        monkeypatch.setattr(np.random, "random_sample", rng.random)
        return rng

    return use


def scaled(mmcv, draws, given: dict, seed: int) -> dict:
    """Returns mmcv's Resize by the factor that its RandomResize draws of (0.5, 2.0)."""
    draws(seed)
    scale, _ = mmcv.RandomResize._random_sample_ratio((10**9, 1), (0.5, 2.0))
    factor = scale / 10**9
    return mmcv.Resize(scale_factor=factor, backend="pillow")(given)


@pytest.mark.parametrize("size", SIZES)
def test_random_scale(mmcv, draws, size):
    given = sample(*size)
    for seed in range(30):
        theirs = scaled(mmcv, draws, results(given), seed)
        ours = operation("random_scale(0.5, 2.0)")(given, np.random.default_rng(seed))
        assert_equal(ours, theirs)


@pytest.mark.parametrize("size", [*SIZES, (41, 33)])
def test_fit_and_pad(mmcv, size):
    """mmcv's Resize enlarges, too: a picture that fits is not given to it."""
    given = sample(*size)
    theirs = results(given)
    if max(size) > 50:
        theirs = mmcv.Resize(scale=(50, 50), keep_ratio=True, backend="pillow")(theirs)
    pad_val = {"img": (10, 20, 30), "seg": 255}  # B, G, R
    theirs = mmcv.Pad(size=(60, 50), pad_val=pad_val)(theirs)
    ours = make_transform("fit(50)|pad((50, 60), fill=(30, 20, 10))", 1)
    assert_equal(ours(given, np.random.default_rng(0)), theirs)


@pytest.mark.parametrize("ratio", [1.0, 0.4])
@pytest.mark.parametrize("size", SIZES)
def test_random_crop(mmseg, draws, size, ratio):
    given = sample(*size)
    peer = mmseg.RandomCrop((40, 48), cat_max_ratio=ratio)
    ours = operation(f"random_crop((40, 48), cat_max_ratio={ratio})")
    different = 0
    for seed in range(40):
        draws(seed)
        theirs = peer(results(given))
        assert_equal(ours(given, np.random.default_rng(seed)), theirs)
        first = operation("random_crop((40, 48))")(given, np.random.default_rng(seed))
        different += not np.array_equal(np.asarray(first.image)[..., ::-1], theirs["img"])
    assert (different > 0) == (ratio < 1)  # the ratio had something to do


def peer_draws(monkeypatch, mmseg, rng: np.random.Generator) -> None:
    """Replaces the draws of mmseg's PhotoMetricDistortion by those of a generator."""
    module = __import__(mmseg.PhotoMetricDistortion.__module__, fromlist=["random"])
    monkeypatch.setattr(module.random, "randint", rng.integers)
    monkeypatch.setattr(module.random, "uniform", rng.uniform)


def test_photometric_distortion(mmseg, monkeypatch):
    # OpenCV truncates where it uses vectors of 16 values or more, and rounds in the rest of a row.
    given = sample(128, 64)
    peer = mmseg.PhotoMetricDistortion()
    ours = operation("photometric_distortion()")
    changed = 0
    for seed in range(200):
        peer_draws(monkeypatch, mmseg, np.random.default_rng(seed))
        theirs = peer(results(given))["img"][..., ::-1].astype(int)
        found = np.asarray(ours(given, np.random.default_rng(seed)).image).astype(int)
        changed += not np.array_equal(theirs, np.asarray(given.image))
        # Equal on an x86-64. In float32 the last bit, in which a processor without fused
        # multiply-add differs, decides whether 42 becomes 41.
        assert np.abs(found - theirs).max() <= 1
        assert np.mean(found != theirs) < 1e-3
    assert changed > 150


@pytest.mark.parametrize("size", SIZES)
def test_the_pipeline_of_a_recipe(mmseg, mmcv, draws, size):
    """Scale, pad, crop, flip: the same draws give the same image and mask."""
    given = sample(*size)
    ours = make_transform(
        "random_scale(0.5, 2.0)|pad(64)|random_crop(64, cat_max_ratio=0.75)|random_flip(0.5)", 64
    )
    pad = mmcv.Pad(size=(64, 64), pad_val={"img": (128, 128, 128), "seg": 255})
    crop = mmseg.RandomCrop((64, 64), cat_max_ratio=0.75)
    flip = mmcv.RandomFlip(prob=1.0)
    flips = 0
    for seed in range(60):
        rng = draws(seed)
        factor = rng.random() * 1.5 + 0.5
        theirs = mmcv.Resize(scale_factor=factor, backend="pillow")(results(given))
        theirs = crop(pad(theirs))
        if rng.random() < 0.5:
            theirs, flips = flip(theirs), flips + 1
        assert_equal(ours(given, np.random.default_rng(seed)), theirs)
    assert 15 < flips < 45
