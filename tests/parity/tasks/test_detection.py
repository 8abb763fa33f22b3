"""Pascal VOC's average precision of boxes, against mmdet's."""

import numpy as np
from numpy.typing import NDArray

from mbv2_jax.data.sample import Boxes
from mbv2_jax.tasks.detection import voc
from mbv2_jax.tasks.detection.objects import Found
from tests.support import peers

CLASSES = 4


def test_voc_s_average_precision_is_mmdet_s():
    peers.mmdet()
    from mmdet.evaluation import eval_map

    rng = np.random.default_rng(0)
    truths, found = zip(*(random_picture(rng) for _ in range(30)), strict=True)
    ours = voc.average_precision(truths, found, CLASSES + 1)
    mean, of_classes = eval_map(
        [by_class(each) for each in found],
        [annotation(each) for each in truths],
        iou_thr=0.5,
        eval_mode="area",
        use_legacy_coordinate=False,
        logger="silent",
    )
    assert [each["num_gts"] for each in of_classes][CLASSES] == 0 and np.isnan(ours[CLASSES])
    # mmdet's precisions and recalls are float32.
    theirs = [each["ap"] for each in of_classes[:CLASSES]]
    np.testing.assert_allclose(ours[:CLASSES], theirs, atol=1e-6)
    np.testing.assert_allclose(np.nanmean(ours), mean, atol=1e-6)
    assert 0.2 < mean < 0.8


def random_picture(rng: np.random.Generator) -> tuple[Boxes, Found]:
    """Returns objects, a third of them difficult, and detections near them and elsewhere."""
    corners = random_corners(rng, int(rng.integers(0, 9)))
    count = len(corners)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    none, difficult = np.zeros(count, bool), rng.random(count) < 1 / 3
    truth = Boxes(corners, labels, none, difficult, (corners[:, 2:] - corners[:, :2]).prod(1))
    chosen = rng.integers(0, max(1, count), 3 * count)
    near = corners[chosen] + rng.normal(0, 3, (len(chosen), 4))
    guesses = np.concatenate([labels[chosen], rng.integers(0, CLASSES + 1, 5)])
    boxes = np.concatenate([near, random_corners(rng, 5)]).astype(np.float32)
    scores = np.sort(rng.random(len(boxes)))[::-1].astype(np.float32)
    return truth, Found(boxes, scores, guesses.astype(np.int32))


def random_corners(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    start = rng.uniform(0, 60, (count, 2))
    return np.concatenate([start, start + rng.uniform(10, 50, (count, 2))], 1)


def by_class(found: Found) -> list[np.ndarray]:
    """Returns the detections of a picture as mmdet's: for each class x0, y0, x1, y1, score."""
    rows = np.concatenate([found.corners, found.scores[:, None]], 1)
    return [rows[found.labels == label] for label in range(CLASSES + 1)]


def annotation(truth: Boxes) -> dict[str, np.ndarray]:
    """Returns the objects of a picture as mmdet's."""
    corners = truth.corners.astype(np.float32)
    return {
        "bboxes": corners[~truth.difficult],
        "labels": truth.labels[~truth.difficult],
        "bboxes_ignore": corners[truth.difficult],
        "labels_ignore": truth.labels[truth.difficult],
    }
