"""Scenes of digits: the same everywhere, with masks and boxes that fit the pictures."""

import hashlib
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data import digits
from mbv2_jax.data.sources import digit_scenes, open_source, overlap
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UserError
from tests.support.boxed import opened


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray, object]]:
    """Returns the pixels, mask and boxes of a hundred scenes."""
    source = open_source("digit_scenes", "train[:100]")
    found = []
    for index in range(100):
        sample = source[index]
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)))
        found.append((pixels, np.asarray(sample.targets["mask"]), sample.targets["boxes"]))
    return found


def test_scenes_have_two_to_four_digits_of_56_to_84_pixels(scenes):
    counts = [len(boxes) for _, _, boxes in scenes]
    assert set(counts) == {2, 3, 4}
    heights = np.concatenate([boxes.corners[:, 3] - boxes.corners[:, 1] for _, _, boxes in scenes])
    assert heights.min() == 56
    assert heights.max() == 84
    for pixels, mask, boxes in scenes:
        assert (pixels.shape, pixels.dtype) == ((128, 128, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((128, 128), np.uint8)
        assert boxes.corners.min() >= 0 and boxes.corners.max() <= 128


def test_masks_boxes_and_areas_describe_the_same_digits(scenes):
    """Every pixel of a class lies in a box of its label; the areas are those of the mask."""
    covered, alone = 0, 0
    for _, mask, boxes in scenes:
        assert set(boxes.labels) == set(np.unique(mask)) - {0}
        for label in set(boxes.labels.tolist()):
            chosen = boxes.take(boxes.labels == label)
            assert chosen.area.sum() == np.count_nonzero(mask == label)
            inside = np.zeros_like(mask, bool)
            for x0, y0, x1, y1 in chosen.corners.astype(int):
                inside[y0:y1, x0:x1] = True
            assert inside[mask == label].all()
            if len(chosen) == 1:  # a digit that nothing covers reaches its box's edges
                rows, columns = (mask == label).nonzero()
                seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                touches = seen == tuple(chosen.corners[0])
                covered, alone = covered + (not touches), alone + touches
    assert alone > covered > 10  # some are partly covered


def test_digits_stand_out_from_the_ground(scenes):
    for pixels, mask, _ in scenes:
        brightness = pixels.mean(-1)
        assert brightness[mask > 0].mean() - brightness[mask == 0].mean() > 50


def test_every_class_is_in_its_tenth_of_the_digits(scenes):
    labels = np.concatenate([boxes.labels for _, _, boxes in scenes])
    counts = np.bincount(labels, minlength=11)
    assert counts[0] == 0
    assert counts[1:].min() > len(labels) / 25  # of a tenth each, of about 300


def outlines(scene, split: str) -> set[bytes]:
    """Returns the arrays of digits from which a split's source draws."""
    return {image.tobytes() for image in scene._digits[split][0]}


def test_no_handwriting_is_in_both_splits():
    train, test = open_source("digit_scenes", "train"), open_source("digit_scenes", "test")
    assert (len(train), len(test)) == (12_000, 200)
    assert not overlap(train, test)
    assert not outlines(train, "train") & outlines(test, "test")
    held_out = {image.tobytes() for image in digits.load()["test"][0]}
    assert outlines(test, "test") == held_out


def test_scenes_are_the_same_on_every_machine_and_in_every_process():
    """The pixels of some scenes, as they were drawn when this was written."""
    digest = hashlib.sha256()
    for split in ("train[7:9]", "test[:2]"):
        source = pickle.loads(pickle.dumps(open_source("digit_scenes", split)))
        for index in range(2):
            sample = source[index]
            digest.update(np.asarray(Image.open(io.BytesIO(sample.image))).tobytes())
            digest.update(np.asarray(sample.targets["mask"]).tobytes())
            digest.update(sample.targets["boxes"].corners.tobytes())
    assert digest.hexdigest() == (
        "fd444f43902eed28930eb90ea2c01d3f6c361357235d95714c58171d2fd81d2a"
    )


def test_a_part_has_the_scenes_of_the_whole():
    whole = open_source("digit_scenes", "train")
    part = open_source("digit_scenes", "train[90%:]+test[:1]")
    assert len(part) == 1201
    assert part[3].image == whole[10_803].image
    assert part.describe(3) == whole.describe(10_803) == "scene 10803 of digit_scenes[train]"
    assert part.describe(1200) == "scene 0 of digit_scenes[test]"
    assert part[1200].image == open_source("digit_scenes", "test")[0].image
    assert overlap(part, whole)
    with pytest.raises(UserError, match="no split 'val' in digit_scenes"):
        open_source("digit_scenes", "val")
    with pytest.raises(UserError, match=r"unknown dataset 'digit_scene'.*'digit_scenes'"):
        open_source("digit_scene", "train")


def test_boxes_and_masks_move_together():
    source = open_source("digit_scenes", "test[:20]")
    transform = make_transform(
        "random_scale(0.8, 1.2)|pad(size)|random_crop(size)|random_flip()", 96
    )
    for index in range(20):
        moved = transform.from_encoded(source[index], np.random.default_rng(index))
        mask, boxes = np.asarray(moved.targets["mask"]), moved.targets["boxes"]
        inside = np.zeros((96, 96), bool)
        for x0, y0, x1, y1 in boxes.corners:
            inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
        assert inside[(mask > 0) & (mask < len(digit_scenes.CLASS_NAMES))].all()


def test_scenes_for_detection_have_the_ten_digits():
    plain = open_source("digit_scenes", "test[:3]")
    boxed = opened("digit_scenes", "test[:3]")
    assert boxed.class_names == tuple("0123456789")
    assert plain.class_names[1:] == boxed.class_names
    for index in range(3):
        sample, other = plain[index], boxed[index]
        assert sample.image == other.image
        assert list(other.targets) == ["boxes"]
        labels = other.targets["boxes"].labels
        assert np.array_equal(sample.targets["boxes"].labels - 1, labels)
        every = boxed.boxes(index)
        assert every.corners.dtype == every.area.dtype == "float64"
        assert np.array_equal(every.corners, sample.targets["boxes"].corners)
    assert boxed.image_id(2) == "test_2"
    assert boxed.without_empty(128) is boxed
    with pytest.raises(UserError, match="128 x 128 pixels, and not 129"):
        boxed.without_empty(129)
