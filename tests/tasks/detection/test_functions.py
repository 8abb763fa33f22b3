"""Anchors, codes, matching, mining, losses and suppression, by hand and beside mmdet's records."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax.models.ssdlite import Outputs
from mbv2_jax.tasks.detection import coding, losses, matching, nms
from mbv2_jax.tasks.detection.anchors import AnchorTable
from mbv2_jax.tasks.detection.losses import Mining, Targets
from mbv2_jax.tasks.detection.nms import Candidates
from mbv2_jax.tasks.detection.settings import Head
from mbv2_jax.tasks.detection.task import Detection

MMDET = AnchorTable("mmdet", Head().anchor_sizes)
TENSORFLOW = AnchorTable("tensorflow", (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0))
MAPS = (20, 10, 5, 3, 2, 1)  # sides at 320 pixels


# ---- Anchors ----


def test_first_anchors_of_mmdet():
    # FACTS of mmdet 3.3.0's config: stride 16, sizes 48 and 100; centres at half a stride.
    found = MMDET.boxes(0, (20, 20), (320, 320))
    np.testing.assert_array_equal(found[0], [-16, -16, 32, 32])
    between = math.sqrt(48 * 100) / 2
    np.testing.assert_allclose(found[1], [8 - between] * 2 + [8 + between] * 2, rtol=1e-6)
    # Ratio 2 of width to height, of the same area.
    width, height = found[2, 2] - found[2, 0], found[2, 3] - found[2, 1]
    assert width / height == pytest.approx(2) and width * height == pytest.approx(48**2)
    # Then the next position to the right, and rows after that.
    np.testing.assert_array_equal(found[6], [0, -16, 48, 32])
    np.testing.assert_array_equal(found[20 * 6], [-16, 0, 32, 48])
    # 320 / 3 pixels are rounded up.
    np.testing.assert_array_equal(MMDET.boxes(3, (3, 3), (320, 320))[6 * 8, :2], [166.5, 166.5])


def test_anchors_of_a_rectangle_are_as_wide_as_it():
    found = MMDET.boxes(0, (10, 20), (160, 320))
    np.testing.assert_array_equal(found[0], [8 - 24, 8 - 12, 8 + 24, 8 + 12])


def test_first_anchors_of_tensorflow():
    found = TENSORFLOW.boxes(0, (2, 2), (100, 100)) / 100
    assert TENSORFLOW.counts == (3, 6, 6, 6, 6, 6)
    centre, half = 0.25, 0.05  # (0 + .5) / 2, and half of scale 0.1
    np.testing.assert_allclose(found[0], [centre - half] * 2 + [centre + half] * 2, rtol=1e-6)
    wide, high = 0.2 * math.sqrt(2) / 2, 0.2 / math.sqrt(2) / 2
    np.testing.assert_allclose(
        found[1], [centre - wide, centre - high, centre + wide, centre + high], atol=1e-7
    )


def test_anchors_equal_the_records(check_data):
    mmdet = np.load(check_data / "golden/ssdlite_mmdet/golden.npz")["anchors_xyxy"]
    ours = np.concatenate([MMDET.boxes(i, (n, n), (320, 320)) for i, n in enumerate(MAPS)])
    np.testing.assert_array_equal(ours, mmdet)
    tensorflow = np.load(check_data / "golden/ssdlite_tf/anchors_yxhw_300.npy")
    maps = enumerate((19, *MAPS[1:]))
    boxes = np.concatenate([TENSORFLOW.boxes(i, (n, n), (300, 300)) for i, n in maps]) / 300
    size = boxes[:, 2:] - boxes[:, :2]
    found = np.concatenate([(boxes[:, :2] + size / 2)[:, ::-1], size[:, ::-1]], 1)
    # Shares of the image, reckoned in another order in float32.
    np.testing.assert_allclose(found, tensorflow, atol=1e-6)


# ---- Codes ----


def test_codes_of_a_box_by_hand():
    anchor = jnp.array([10.0, 20.0, 50.0, 40.0])  # centre (30, 30), 40 x 20
    box = jnp.array([24.0, 18.0, 44.0, 58.0])  # centre (34, 38), 20 x 40
    codes = coding.encode(box, anchor)
    wanted: Any = [4 / 40 / 0.1, 8 / 20 / 0.1, math.log(0.5) / 0.2, math.log(2) / 0.2]
    np.testing.assert_allclose(codes, wanted, rtol=1e-6)
    np.testing.assert_allclose(coding.decode(codes, anchor), box, rtol=1e-6)


def test_decoded_boxes_stay_finite():
    found = coding.decode(jnp.array([0.0, 0.0, 1e9, -1e9]), jnp.array([0.0, 0.0, 16.0, 16.0]))
    size = found[2:] - found[:2]
    np.testing.assert_allclose(size, [1000, 16 * 16 / 1000], rtol=1e-4)


# ---- Matching ----


def test_iou_by_hand():
    boxes = jnp.array([[0.0, 0, 10, 10], [5, 5, 15, 15], [3, 3, 3, 3]])
    found = matching.iou(boxes, boxes)
    np.testing.assert_allclose(
        found, [[1.0, 25 / 175, 0.0], [25 / 175, 1.0, 0.0], [0.0, 0.0, 0.0]], rtol=1e-6
    )


def test_every_object_gets_an_anchor_and_the_last_one_wins():
    anchors = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, 18], [50, 50, 60, 60], [90, 90, 99, 99]])
    boxes = jnp.array([[0.0, 0, 10, 10], [52, 52, 55, 55], [53, 53, 56, 56], [0, 0, 1, 1]])
    valid = jnp.array([True, True, True, False])
    found = matching.match(anchors, boxes, valid)
    # Anchor 1 overlaps object 0 by 10 / 18; anchor 2 is the best of objects 1 and 2, by 9 / 100;
    # the padding is no object.
    np.testing.assert_array_equal(found, [0, 0, 2, matching.NO_OBJECT])


def test_no_objects_match_nothing():
    anchors = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, 18]])
    found = matching.match(anchors, jnp.zeros((3, 4)), jnp.zeros(3, bool))
    np.testing.assert_array_equal(found, [matching.NO_OBJECT] * 2)


@pytest.mark.parametrize(
    ("count", "taken"),
    [(0, []), (1, [4]), (2, [1, 4]), (3, [1, 2, 4]), (4, [1, 2, 4, 5]), (9, [0, 1, 2, 4, 5])],
)
def test_hardest_negatives(count, taken):
    # Of equal losses the first; the largest is not a candidate.
    values = jnp.array([0.1, 2.0, 1.0, 9.0, 3.0, 1.0])
    found = matching.hardest(values, jnp.arange(6) != 3, jnp.int32(count))
    np.testing.assert_array_equal(np.flatnonzero(found), taken)


# ---- Losses ----


def two_anchors(scores: str, mining: Mining, label: int) -> tuple[Any, Any]:
    """Returns the losses of an image with a positive (or none) and three other anchors."""
    logits = jnp.log(jnp.array([[[1.0, 2, 5], [1, 1, 2], [3, 1, 4], [1, 1, 98]]]))
    codes = jnp.array([[[0.5, -3.0, 0, 0]] * 4])
    labels = jnp.array([[label, 2, 2, 2]])
    wanted = Targets(labels, jnp.zeros((1, 4, 4)))
    found = losses.losses(logits, codes, wanted, scores, mining)
    return found, logits[0]


def test_softmax_losses_by_hand():
    found, _ = two_anchors("softmax", Mining(2, 0), label=1)
    # The positive's 2 of 8; of the others the two worst backgrounds: 2 of 4 and 4 of 8, not .98.
    np.testing.assert_allclose(found.classes, [-math.log(2 / 8) - 2 * math.log(1 / 2)], rtol=1e-6)
    # Smooth L1: 0.5 * 0.5 ** 2 and 3 - 0.5.
    np.testing.assert_allclose(found.boxes, [0.125 + 2.5], rtol=1e-6)
    np.testing.assert_array_equal(found.positives, [1])


def test_sigmoid_losses_by_hand():
    found, logits = two_anchors("sigmoid", Mining(1, 0), label=1)
    score = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    entropy = [
        -np.log([1 - s[0], s[1] if i == 0 else 1 - s[1], 1 - s[2] if i == 0 else s[2]]).sum()
        for i, s in enumerate(score)
    ]
    np.testing.assert_allclose(found.classes, [entropy[0] + max(entropy[1:])], rtol=1e-5)


def test_an_image_without_objects():
    found, _ = two_anchors("softmax", Mining(3, 0), label=2)
    np.testing.assert_array_equal(found.classes, [0])
    np.testing.assert_array_equal(found.boxes, [0])
    np.testing.assert_array_equal(found.positives, [1])  # the divisor: mmdet's avg_factor
    # TensorFlow's `min_negatives_per_image`: the three worst backgrounds.
    found, _ = two_anchors("softmax", Mining(3, 3), label=2)
    np.testing.assert_allclose(found.classes, [-math.log(5 / 8) - 2 * math.log(1 / 2)], rtol=1e-6)


def test_gradients_reach_positives_and_mined_negatives_only():
    boxes = np.zeros((1, 3, 4), np.float32)
    boxes[0, 0] = (10, 12, 40, 45)
    anchors = jnp.asarray(np.concatenate([MMDET.boxes(0, (4, 4), (64, 64))])[None])
    wanted = losses.targets(anchors, jnp.asarray(boxes), jnp.array([[0, -1, -1]]), 2)
    rng = np.random.default_rng(0)
    logits, codes = (
        jnp.asarray(rng.standard_normal((1, 96, size)), jnp.float32) for size in (3, 4)
    )

    def total(logits: jax.Array, codes: jax.Array) -> jax.Array:
        found = losses.losses(logits, codes, wanted, "softmax", Mining(3, 0))
        return (found.classes + found.boxes).sum()

    of_logits, of_codes = jax.jit(jax.grad(total, (0, 1)))(logits, codes)
    positive: Any = np.asarray(wanted.labels[0]) < 2
    assert 0 < positive.sum() < 24
    np.testing.assert_array_equal(np.asarray(of_codes[0]).any(1), positive)
    touched: Any = np.asarray(of_logits[0]).any(1)
    assert touched[positive].all() and touched.sum() == 4 * positive.sum()
    assert np.isfinite(of_codes).all() and np.isfinite(of_logits).all()


# ---- Suppression ----


def candidates(*rows: tuple[list[float], float, int]) -> Candidates:
    boxes, scores, labels = zip(*rows, strict=True)
    return Candidates(jnp.array(boxes), jnp.array(scores), jnp.array(labels, jnp.int32))


def test_suppression_by_hand():
    found = nms.suppress(
        candidates(
            ([0.0, 0, 10, 10], 0.5, 0),
            ([0.0, 0, 10, 9], 0.9, 0),  # the best: IoU with the one before 0.9
            ([0.0, 0, 10, 9], 0.8, 1),  # of another class
            ([0.0, 4.5, 10, 13.5], 0.7, 0),  # IoU with the best 45 / 135, not above a third
            ([0.0, 5, 10, 14], 0.7, 0),  # as good, later: IoU with the one before 8.5 / 9.5
            ([0.0, 0, 10, 9], 0.0, 2),  # none
        ),
        threshold=0.34,
        most=5,
    )
    np.testing.assert_array_equal(found.labels, [0, 1, 0, -1, -1])
    np.testing.assert_allclose(found.scores, [0.9, 0.8, 0.7, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(found.boxes[2], [0, 4.5, 10, 13.5])


def test_at_most_so_many_are_chosen():
    rows = [([20.0 * i, 0, 20 * i + 10, 10], 0.5 + i / 100, 0) for i in range(5)]
    found = nms.suppress(candidates(*rows), threshold=0.5, most=2)
    np.testing.assert_allclose(found.scores, [0.54, 0.53], rtol=1e-6)


def heads(probabilities: list[list[float]], boxes: list[list[float]]) -> Outputs:
    """Returns outputs of one map whose scores and boxes are these; the rest is background."""
    scores = np.array(probabilities, np.float32)
    full = np.concatenate([scores, 1 - scores.sum(1, keepdims=True)], 1)
    return Outputs(
        (jnp.log(full)[None],),
        (jnp.zeros((1, len(scores), 4)),),
        (jnp.asarray(boxes)[None],),
        jnp.array([[100.0, 100.0]]),
    )


def detected(head: Head, *rows: tuple[list[float], list[float]]) -> dict[str, np.ndarray]:
    probabilities, boxes = zip(*rows, strict=True)
    task = Detection(head, ("a", "b"))
    found = jax.jit(task.postprocess)(heads(list(probabilities), list(boxes)))
    return {name: np.asarray(value)[0] for name, value in found.items()}


def test_scores_must_be_above_the_threshold():
    found = detected(
        Head(2, score_threshold=0.25),
        ([0.25, 0.0], [0.0, 0, 10, 10]),
        ([0.26, 0.0], [20.0, 0, 30, 10]),
        ([0.1, 0.3], [40.0, 0, 50, 10]),
        ([0.9, 0.0], [60.0, 0, 60, 10]),  # without area
        ([0.9, 0.0], [110.0, 0, 120, 10]),  # outside the image, so without area
        ([0.0, 0.4], [90.0, -5, 120, 10]),  # clipped
    )
    assert (found["labels"] >= 0).sum() == 3
    np.testing.assert_array_equal(found["labels"][:3], [1, 1, 0])
    np.testing.assert_allclose(found["scores"][:4], [0.4, 0.3, 0.26, 0], rtol=1e-5)
    np.testing.assert_array_equal(found["boxes"][0], [90, 0, 100, 10])


def test_fewer_detections_than_there_is_room_for():
    rows = [([0.1 + i / 1000, 0.0], [10.0 * i, 0, 10 * i + 5, 5]) for i in range(8)]
    found = detected(Head(2), *rows)
    assert found["boxes"].shape == (200, 4)
    assert (found["labels"] >= 0).sum() == 8
    assert not found["boxes"][8:].any() and not found["scores"][8:].any()
    found = detected(Head(2, candidates=3), *rows)  # of a map, the best
    np.testing.assert_allclose(found["scores"][:4], [0.107, 0.106, 0.105, 0], rtol=1e-5)


@pytest.mark.parametrize(("clip_first", "count"), [(True, 1), (False, 2)])
def test_boxes_are_clipped_before_or_after_they_are_compared(clip_first, count):
    """Their intersection over union is 0.5 in the image, and a sixth without its edge."""
    rows = [([0.9, 0.0], [-80.0, 0, 20, 10]), ([0.8, 0.0], [0.0, 0, 40, 10])]
    rows += [([0.7, 0.0], [110.0, 0, 120, 10])]  # outside the image
    found = detected(Head(2, nms_iou=0.4, clip_first=clip_first), *rows)
    assert (found["labels"] >= 0).sum() == count
    np.testing.assert_array_equal(
        found["boxes"][:2][:count], [[0, 0, 20, 10], [0, 0, 40, 10]][:count]
    )


def test_a_mirrored_view_finds_the_same():
    # A box at the right of the image, which the mirrored view sees at the left. The codes move it
    # away from the middle: (x - X) / W / 0.1 is 1, and -1 in the mirrored view.
    task = Detection(Head(1, nms_iou=0.9), ("a",))
    right, left = heads([[0.5]], [[60.0, 10, 80, 40]]), heads([[0.5]], [[20.0, 10, 40, 40]])
    code = jnp.array([[[1.0, 0, 0, 0]]])
    merged = task.merge([right._replace(codes=(code,)), left._replace(codes=(-code,))])
    found = jax.jit(task.postprocess)(merged)
    assert (np.asarray(found["labels"]) >= 0).sum() == 1  # both are the same box
    np.testing.assert_allclose(found["boxes"][0, 0], [62, 10, 82, 40], rtol=1e-5)


# ---- mmdet's records of a random network on five COCO pictures ----


@pytest.fixture(scope="module")
def golden(check_data) -> dict[str, np.ndarray]:
    return dict(np.load(check_data / "golden/ssdlite_mmdet/golden.npz"))


def recorded_outputs(golden: dict[str, np.ndarray]) -> Outputs:
    def flat(name: str, size: int) -> tuple[jax.Array, ...]:
        maps = (golden[f"{name}_{i}"].transpose(0, 2, 3, 1) for i in range(6))
        return tuple(jnp.asarray(part.reshape(5, -1, size)) for part in maps)

    anchors = [MMDET.boxes(i, (n, n), (320, 320)) for i, n in enumerate(MAPS)]
    return Outputs(
        flat("cls", 81),
        flat("reg", 4),
        tuple(jnp.broadcast_to(each, (5, *each.shape)) for each in anchors),
        jnp.full((5, 2), 320.0),
    )


def recorded_objects(golden: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    boxes, labels = np.zeros((5, 40, 4), np.float32), np.full((5, 40), -1, np.int32)
    for k in range(5):
        count = len(golden[f"gt_{k}_bboxes"])
        boxes[k, :count], labels[k, :count] = golden[f"gt_{k}_bboxes"], golden[f"gt_{k}_labels"]
    return {"boxes": jnp.asarray(boxes), "labels": jnp.asarray(labels)}


def test_targets_equal_the_records(golden):
    outputs, objects = recorded_outputs(golden), recorded_objects(golden)
    anchors = jnp.concatenate(outputs.anchors, 1)
    wanted = losses.targets(anchors, objects["boxes"], objects["labels"], 80)
    np.testing.assert_array_equal(wanted.labels, golden["target_labels"])
    # Logarithms and quotients up to 16, in float32.
    np.testing.assert_allclose(wanted.codes, golden["target_deltas"], atol=1e-5)
    np.testing.assert_array_equal(
        np.asarray(wanted.labels) < 80, golden["target_delta_weights"].any(2)
    )


def test_losses_equal_the_records(golden):
    task = Detection(Head(80))
    found = jax.jit(task._losses)(recorded_outputs(golden), recorded_objects(golden), Mining())
    count = found.positives.sum()
    assert count == golden["avg_factor"]
    # Sums of up to 300 terms in float32, in another order.
    np.testing.assert_allclose(found.classes / count, golden["loss_cls_eval"], rtol=1e-5)
    np.testing.assert_allclose(found.boxes / count, golden["loss_bbox_eval"], rtol=1e-5)
    loss, parts = jax.jit(task.loss)(recorded_outputs(golden), recorded_objects(golden))
    total = golden["loss_cls_eval"].sum() + golden["loss_bbox_eval"].sum()
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(parts["box_loss"], golden["loss_bbox_eval"].sum(), rtol=1e-5)


def test_detections_equal_the_records(golden):
    task = Detection(Head(80), tuple(map(str, range(80))))
    found = jax.device_get(jax.jit(task.postprocess)(recorded_outputs(golden)))
    for k in range(5):
        # 200 of each, in the same order; softmax and exponentials of float32 round at 1e-7.
        np.testing.assert_array_equal(found["labels"][k], golden[f"det_{k}_labels"])
        np.testing.assert_allclose(found["scores"][k], golden[f"det_{k}_scores"], atol=1e-6)
        np.testing.assert_allclose(found["boxes"][k], golden[f"det_{k}_bboxes"], atol=1e-3)
