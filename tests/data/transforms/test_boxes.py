"""SSD's random changes of size and place: image, boxes, masks and frame move together."""

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data.sample import Boxes, Frame, Sample
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UserError

WIDTH, HEIGHT = 60, 40
FILL = (123, 116, 103)


def operation(spec: str):
    return make_transform(f"{spec}|resize(4)", 4).operations[0]


def sample(*corners: tuple[float, float, float, float]) -> Sample:
    """Returns a picture whose R and G are the column and the row of each pixel."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    count = len(corners)
    boxes = Boxes(
        np.array(corners, np.float32).reshape(-1, 4),
        np.arange(count, dtype=np.int32),
        np.zeros(count, bool),
        np.zeros(count, bool),
        np.array([(x1 - x0) * (y1 - y0) / 2 for x0, y0, x1, y1 in corners], np.float32),
    )
    mask = Image.fromarray((x % 7).astype(np.uint8))
    frame = Frame.whole(WIDTH, HEIGHT)
    return Sample(Image.fromarray(pixels), "x", {"boxes": boxes, "mask": mask}, frame)


def place(result: Sample) -> tuple[int, int]:
    """Returns the place of the picture's left upper pixel, by the frame."""
    assert result.frame is not None
    left, top, _, _ = result.frame.extent
    return round(-left), round(-top)


def test_expand_moves_everything():
    given = sample((10, 5, 30, 25))
    for seed in range(20):
        result = operation("expand(probability=1.0)")(given, np.random.default_rng(seed))
        pixels, mask = np.asarray(result.image), np.asarray(result.targets["mask"])
        left, top = place(result)
        inside = np.s_[top : top + HEIGHT, left : left + WIDTH]
        assert np.array_equal(pixels[inside], np.asarray(given.image))
        assert np.array_equal(mask[inside], np.asarray(given.targets["mask"]))
        assert (mask == 255).sum() == mask.size - WIDTH * HEIGHT
        assert np.all(pixels[mask == 255] == FILL)
        boxes = result.targets["boxes"]
        assert boxes.corners.tolist() == [[left + 10, top + 5, left + 30, top + 25]]
        assert boxes.area.tolist() == [200]
        assert WIDTH <= result.image.width <= 4 * WIDTH


def test_probability_of_expand():
    given = sample()
    for probability, share in ((0.0, 0), (1.0, 1), (0.3, 0.3)):
        expand = operation(f"expand(probability={probability})")
        rng = np.random.default_rng(0)
        found = np.mean([expand(given, rng) is not given for _ in range(1000)])
        assert abs(found - share) < 0.05  # three standard errors of 1000 draws are 0.043


def test_a_crop_keeps_the_boxes_whose_centre_it_holds():
    given = sample((0, 0, 20, 20), (25, 10, 45, 30), (40, 20, 60, 40))
    centres = np.array([[10, 10], [35, 20], [50, 30]])
    kept = np.zeros(3, int)
    for seed in range(100):
        result = operation("min_iou_crop((), 0.3)")(given, np.random.default_rng(seed))
        left, top = (-value for value in place(result))
        width, height = result.image.size
        start, stop = np.array([left, top]), np.array([left + width, top + height])
        part = np.s_[top : top + height, left : left + width]
        assert np.array_equal(np.asarray(result.image), np.asarray(given.image)[part])
        boxes = result.targets["boxes"]
        holds = np.all((start < centres) & (centres < stop), axis=1)
        assert boxes.labels.tolist() == np.flatnonzero(holds).tolist()
        assert len(boxes)
        expected = given.targets["boxes"].corners[holds].reshape(-1, 2, 2)
        assert np.array_equal(boxes.corners.reshape(-1, 2, 2), expected.clip(start, stop) - start)
        kept[holds] += 1
    assert kept.max() < 100  # each was left out at times


@pytest.mark.parametrize("least", [0.5, 0.9])
def test_a_crop_overlaps_every_box_enough(least):
    """The smallest IoU is that of the box in the corner, here 0.25 with the whole picture."""
    given = sample((0, 0, 30, 20), (0, 0, 60, 40))
    corners = given.targets["boxes"].corners
    modes = {1: 0, least: 0, 0: 0}
    for seed in range(200):
        result = operation(f"min_iou_crop(({least},))")(given, np.random.default_rng(seed))
        if result is given:
            modes[1] += 1
            continue
        left, top = (-value for value in place(result))
        width, height = result.image.size
        low = np.maximum(corners[:, :2], [left, top])
        high = np.minimum(corners[:, 2:], [left + width, top + height])
        shared = (high - low).clip(0).prod(1)
        iou = shared / ((corners[:, 2:] - corners[:, :2]).prod(1) + width * height - shared)
        modes[least if iou.min() >= least else 0] += 1
    # No crop satisfies both boxes at 0.9, or at 0.5: these draws are repeated.
    assert modes[1] > 60 and modes[0] > 60
    assert modes[least] == 0


def test_a_picture_without_boxes_is_cropped():
    sizes = {
        operation("min_iou_crop()")(sample(), np.random.default_rng(seed)).image.size
        for seed in range(30)
    }
    assert len(sizes) > 15


def test_the_crops_sides_are_at_least_a_share_and_not_too_long():
    for seed in range(200):
        result = operation("min_iou_crop((), 0.5)")(sample(), np.random.default_rng(seed))
        width, height = result.image.size
        assert width >= 30 and height >= 20
        # The sides are cut to whole pixels, by up to one each.
        assert (height + 1) / max(1, width - 1) >= 0.5 and (width + 1) / (height - 1) >= 0.5


def test_samples_without_boxes_are_moved_too():
    """Images for classification have no boxes."""
    given = Sample(Image.new("RGB", (30, 20)), "x", {"label": 3})
    rng = np.random.default_rng(3)
    transform = make_transform("expand()|min_iou_crop()|ssd_distortion()|resize(8)", 8)
    result = transform(given, rng)
    assert result.targets == {"label": 3}
    assert result.image.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("expand(0.5, 2)", "low=0.5 must be 1 or more"),
        ("expand(4, 1)", r"\(low, high\)=\(4, 1\)"),
        ("expand(probability=2)", "probability=2 must be a number from 0 to 1"),
        ("expand(fill=(0, 0))", r"fill=\(0, 0\) must be \(R, G, B\)"),
        ("min_iou_crop((0.5, 1.0))", r"min_ious=\(0.5, 1.0\) must be numbers from 0 to below 1"),
        ("min_iou_crop(0.5)", "min_ious=0.5 must be numbers"),
        ("min_iou_crop(smallest=3)", "smallest=3 must be a number from 0 to 1"),
        ("min_iou_crop(attempts=0)", "attempts=0 must be a whole number, 1 or more"),
        ("ssd_distortion(300)", "brightness_delta=300 must be a number from 0 to 255"),
        ("ssd_distortion(hue_delta='x')", "hue_delta='x' must be a number from 0 to 180"),
    ],
)
def test_impossible_arguments_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        make_transform(f"{spec}|resize(4)", 4)
