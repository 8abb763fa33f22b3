"""Operations for object detection against mmdetection's own, given the same draws.

Boxes are equal exactly; pixels, too, with `backend="pillow"`, and to one level where they went
through OpenCV's HSV.
"""

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data.sample import Boxes, Sample
from mbv2_jax.data.transforms.pipeline import make_transform
from tests.support import peers

SIZES = [(97, 64), (61, 130), (80, 80)]  # (width, height)
MEAN = [123.675, 116.28, 103.53]


@pytest.fixture(scope="module")
def mmdet():
    peers.mmdet()
    import mmdet.datasets.transforms

    return mmdet.datasets.transforms


def sample(size: tuple[int, int], count: int = 4) -> Sample:
    """Returns a picture of noise on waves with random boxes, a mask, and their targets."""
    width, height = size
    rng = np.random.default_rng(width * height + count)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / (5 + k)) + np.cos(y / (7 + k)) for k in range(3)], -1)
    pixels = (110 + 70 * waves + rng.normal(0, 12, (height, width, 3))).clip(0, 255)
    limits = [width, height]
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * limits
    boxes = Boxes(
        corners.reshape(-1, 4).astype(np.float32),
        rng.integers(5, size=count, dtype=np.int32),
        np.arange(count) % 3 == 1,
        np.zeros(count, bool),
        np.ones(count, np.float32),
    )
    mask = Image.fromarray(rng.integers(5, size=(height, width), dtype=np.uint8))
    return Sample(Image.fromarray(pixels.astype(np.uint8)), "x", {"boxes": boxes, "mask": mask})


def results(given: Sample) -> dict:
    """Returns the dict that mmdet's transforms change; pixels in B, G, R."""
    import torch
    from mmdet.structures.bbox import HorizontalBoxes

    boxes = given.targets["boxes"]
    pixels = np.asarray(given.image)[..., ::-1]
    return {
        "img": pixels,
        "img_shape": pixels.shape[:2],
        "gt_bboxes": HorizontalBoxes(torch.from_numpy(boxes.corners.copy())),
        "gt_bboxes_labels": boxes.labels.astype(np.int64),
        "gt_ignore_flags": boxes.crowd,
        "gt_seg_map": np.asarray(given.targets["mask"]),
    }


def assert_same_boxes(ours: Sample, theirs: dict) -> None:
    boxes = ours.targets["boxes"]
    np.testing.assert_array_equal(boxes.corners, theirs["gt_bboxes"].numpy())
    np.testing.assert_array_equal(boxes.labels, theirs["gt_bboxes_labels"])
    np.testing.assert_array_equal(boxes.crowd, theirs["gt_ignore_flags"])


def assert_equal(ours: Sample, theirs: dict) -> None:
    np.testing.assert_array_equal(np.asarray(ours.image)[..., ::-1], theirs["img"])
    assert_same_boxes(ours, theirs)
    np.testing.assert_array_equal(np.asarray(ours.targets["mask"]), theirs["gt_seg_map"])


def operation(spec: str):
    return make_transform(f"{spec}|resize(4)", 4).operations[0]


class Draws:
    """numpy.random's functions that mmdet calls, with the draws of a generator.

    Those of a Generator raise where `low` is above `high`, as it is in MinIoURandomCrop, and choose
    by another draw.
    """

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self._rng.random()

    def randint(self, high: int) -> int:
        return int(self._rng.integers(high))

    def choice(self, values):
        return values[self.randint(len(values))]

    def permutation(self, count: int) -> np.ndarray:
        return self._rng.permutation(count)


@pytest.fixture
def draws(mmdet, monkeypatch):
    """Returns a function that sets the seed of mmdet's draws."""
    module = __import__(mmdet.Expand.__module__, fromlist=["random"])

    def use(seed: int) -> np.random.Generator:
        monkeypatch.setattr(module, "random", Draws(seed))
        return np.random.default_rng(seed)

    return use


@pytest.mark.parametrize("size", SIZES)
def test_expand(mmdet, draws, size):
    """The mean is cut to whole numbers, since the picture's are bytes."""
    given = sample(size)
    peer = mmdet.Expand(mean=MEAN, to_rgb=True, ratio_range=(1, 4), seg_ignore_label=255)
    larger = 0
    for seed in range(40):
        rng = draws(seed)
        theirs = peer(results(given))
        ours = operation("expand()")(given, rng)
        assert_equal(ours, theirs)
        larger += ours.image.size != given.image.size
    assert 10 < larger < 30


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("size", SIZES)
def test_min_iou_crop(mmdet, draws, size, count):
    given = sample(size, count)
    peer = mmdet.MinIoURandomCrop(min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3)
    cropped = dropped = 0
    for seed in range(60):
        rng = draws(seed)
        theirs = peer(results(given))
        ours = operation("min_iou_crop()")(given, rng)
        assert_equal(ours, theirs)
        cropped += ours.image.size != given.image.size
        dropped += len(ours.targets["boxes"]) < count
    assert cropped > 20
    assert (dropped > 0) == (count > 1)


def test_ssd_distortion(mmdet, draws):
    given = sample((128, 64))
    peer = mmdet.PhotoMetricDistortion()
    ours = operation("ssd_distortion()")
    changed = 0
    for seed in range(300):
        rng = draws(seed)
        theirs = peer(results(given))["img"][..., ::-1]
        found = np.asarray(ours(given, rng).image).astype(int)
        # mmdet goes on in float32, and without limits; half a level is lost in the rounding. The
        # rest is for the order of sums.
        assert np.abs(found - theirs.clip(0, 255)).max() < 0.51
        changed += not np.array_equal(found, np.asarray(given.image))
    assert changed > 250


@pytest.mark.parametrize("size", SIZES)
def test_the_pipeline_of_the_recipe(mmdet, draws, size):
    """The boxes of one picture reach beyond it, as some of COCO's do."""
    given = sample(size)
    given.targets["boxes"].corners[0, 2:] = size[0] + 3, size[1] + 2
    ours = make_transform("expand()|min_iou_crop()|resize(size)|random_flip()|ssd_distortion()", 64)
    expand = mmdet.Expand(mean=MEAN, to_rgb=True, ratio_range=(1, 4), seg_ignore_label=255)
    crop = mmdet.MinIoURandomCrop()
    resize = mmdet.Resize(scale=(64, 64), keep_ratio=False, backend="pillow")
    flip, distort = mmdet.RandomFlip(prob=1.0), mmdet.PhotoMetricDistortion()
    flips = 0
    for seed in range(60):
        rng = draws(seed)
        module = __import__(mmdet.Expand.__module__, fromlist=["random"])
        theirs = resize(crop(expand(results(given))))
        if module.random.uniform() < 0.5:
            theirs, flips = flip(theirs), flips + 1
        theirs = distort(theirs)
        found = ours(given, rng)
        # Rounded once, where mmdet multiplies by a factor that it has rounded before.
        boxes = found.targets["boxes"].corners
        np.testing.assert_allclose(boxes, theirs["gt_bboxes"].numpy(), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(found.targets["boxes"].labels, theirs["gt_bboxes_labels"])
        pixels = theirs["img"][..., ::-1].clip(0, 255)
        assert np.abs(found.image - pixels).max() < 0.51
    assert 15 < flips < 45
