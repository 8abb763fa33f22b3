"""Objects in batches, and detections in pictures."""

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data.sample import Boxes, Frame, Sample
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import UserError
from mbv2_jax.tasks.detection.settings import Head, Settings
from mbv2_jax.tasks.detection.task import Detection
from mbv2_jax.training.settings import make_config
from tests.support import boxed


def make_boxes(corners: list[list[float]], **flags: list[bool]) -> Boxes:
    count = len(corners)
    off = np.zeros(count, bool)
    return Boxes(
        np.array(corners, np.float32),
        np.arange(count, dtype=np.int32),
        np.array(flags.get("crowd", off)),
        np.array(flags.get("difficult", off)),
        np.ones(count, np.float32),
    )


def test_crowds_difficult_objects_and_those_without_area_are_left_out():
    boxes = make_boxes(
        [[1, 2, 3, 4], [0, 0, 9, 9], [0, 0, 8, 8], [5, 5, 5, 9]],
        crowd=[False, True, False, False],
        difficult=[False, False, True, False],
    )
    sample = Sample(np.zeros((16, 16, 3), np.uint8), "it", {"boxes": boxes}, Frame.whole(32, 16))
    batch = Detection(Head(4, max_boxes=2)).collate([sample])
    np.testing.assert_array_equal(batch["boxes"], [[[1, 2, 3, 4], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(batch["labels"], [[0, -1]])
    np.testing.assert_array_equal(batch["frame"], [[0, 0, 32, 16, 32, 16]])


def test_a_box_outside_its_picture_ends_at_a_resize():
    boxes = make_boxes([[400, 300, 500, 400], [-20, 10, 20, 20]])
    transform = pipeline.make_transform("resize(size)", 32)
    sample = Sample(Image.new("RGB", (64, 64)), "it", {"boxes": boxes})
    found = transform(sample, np.random.default_rng(0)).targets["boxes"]
    np.testing.assert_array_equal(found.labels, [1])
    np.testing.assert_array_equal(found.corners, [[0, 5, 10, 10]])


def test_too_many_objects_are_refused_at_the_start(tmp_path):
    line = "0 0.5 0.5 0.2 0.2\n"
    boxed.write_yolo(
        tmp_path / "images" / "train",
        tmp_path / "labels" / "train",
        {"few": line, "many": line * 5},
    )
    (tmp_path / "classes.txt").write_text("cat\n")
    source = boxed.opened(f"yolo:{tmp_path}")
    config = make_config("detection").to_dict()
    settings = {f"model.{name}": value for name, value in config["model"].items()} | {
        name: getattr(Settings(), name) for name in Settings.__dataclass_fields__
    }
    settings["model.max_boxes"] = 4
    with pytest.raises(UserError, match=r"many\..*has 5 objects, .*room for 4.*max_boxes=5"):
        Detection.for_training(settings, source)


def test_detections_in_the_padding_are_none():
    # A picture of 120 x 40 in an image of 64 x 64: fitted to 64 x 21.3, and padded below.
    frame = Frame((120, 40), (0.0, 0.0, 120.0, 120.0))
    outputs = {
        "boxes": np.array([[[8, 4, 32, 40], [8, 30, 32, 60], [0, 0, 64, 64]]], np.float32),
        "scores": np.array([[0.9, 0.8, 0.7]], np.float32),
        "labels": np.array([[1, 1, 0]], np.int32),
        "size": np.array([[64, 64]], np.float32),
        "finite": np.array([True]),
    }
    (found,) = Detection(Head(2), ("cat", "dog")).decode(outputs, [frame])
    np.testing.assert_array_equal(found["boxes"], [[15, 7.5, 60, 40], [0, 0, 120, 40]])
    np.testing.assert_array_equal(found["labels"], [1, 0])
    assert found["classes"] == ["dog", "cat"]
