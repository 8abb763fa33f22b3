"""SSDLite in TFLite's files, beside LiteRT's interpreter of the same files."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from mbv2_jax.convert import importer
from mbv2_jax.errors import UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.spec import Backbone
from mbv2_jax.tasks.detection.anchors import AnchorTable
from tests.support import tflite_files
from tests.support.tflite_files import Network

SIZE, CLASSES = 96, 5
BACKBONE = Backbone(width=0.35, padding="same")
TABLE = AnchorTable("tensorflow", (0.25, 0.4, 0.6, 0.9, 1.0))
TAPS = ("layer6_0/expand", "last")
SIDES = (6, 3, 2, 1)  # of the maps


def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)


def anchors(table: AnchorTable = TABLE) -> np.ndarray:
    """Returns the anchors of all maps in shares of the image's sides, (A, 4)."""
    parts = [table.boxes(i, (side, side), (1, 1)) for i, side in enumerate(SIDES)]
    return np.concatenate(parts)


def detector(
    *taps: str, scores: str = "LOGISTIC", table: AnchorTable = TABLE
) -> tuple[Network, list[int]]:
    network = Network(BACKBONE, SIZE)
    network.build()
    return network, network.detector(CLASSES, table, *taps, scores=scores)


def load(path: pathlib.Path, content: bytes) -> importer.Imported:
    path.write_bytes(content)
    return importer.load(path)


def outputs(saved: SavedModel, x: np.ndarray) -> tuple[Any, Any]:
    """Returns the network's outputs with the maps joined, and the detections."""
    task = saved.task()
    network = task.network(saved.spec.backbone, saved.spec.mode)
    found = jax.jit(network.apply)(saved.variables(), x)
    joined = [np.concatenate(parts, 1) for parts in found[:3]]
    return joined, jax.tree.map(np.asarray, task.postprocess(found))


@pytest.mark.parametrize("scores", ["LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("taps", [TAPS, ("layer5_2", "last")])
def test_the_fields_of_heads_alone(taps, scores, tmp_path):
    """The anchors are assumed, where the file ends before its boxes are decoded."""
    usual = AnchorTable("tensorflow", (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0))
    network, (codes, classes) = detector(*taps, scores=scores, table=usual)
    content = network.content(codes, classes)
    imported = load(tmp_path / "net.tflite", content)
    spec = imported.saved.spec
    assert (spec.head.taps, spec.head.num_classes) == (taps, CLASSES)
    assert spec.head.scores == ("sigmoid" if scores == "LOGISTIC" else "softmax")
    assert spec.head.extra_channels == (32,) * 4 and spec.head.anchor_sizes == usual.sizes
    assert spec.backbone.padding == "same"
    (assumed,) = (line for line in imported.warnings if "it is assumed" in line)
    assert "model.anchor_sizes" in assumed and "model.scores" not in assumed


def test_codes_and_scores(tmp_path):
    """The background is the first class there and the last here; codes are y, x, height, width."""
    network, (codes, classes) = detector(*TAPS)
    boxes = network.suppression(codes, classes, anchors())
    saved = load(tmp_path / "net.tflite", network.content(*boxes)).saved
    (logits, ours, _), _ = outputs(saved, images())
    their_codes, their_scores = tflite_files.run_all(network.content(codes, classes), images())
    # Both round at 1e-7; 60 layers enlarge that.
    largest = abs(their_codes).max()
    np.testing.assert_allclose(ours[..., [1, 0, 3, 2]], their_codes, rtol=0, atol=1e-4 * largest)
    scores = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(
        np.roll(scores, 1, -1), their_scores, rtol=0, atol=1e-4 * abs(logits).max()
    )


def test_detections_are_those_of_the_files_own_suppression(tmp_path):
    network, (codes, classes) = detector(*TAPS)
    content = network.content(*network.suppression(codes, classes, anchors()))
    imported = load(tmp_path / "net.tflite", content)
    head = imported.saved.spec.head
    assert head.anchor_sizes == TABLE.sizes
    assert (head.nms_iou, head.score_threshold, head.max_detections) == (0.5, 0.3, 20)
    assert not any("use_regular_nms" in line for line in imported.warnings)
    _, found = outputs(imported.saved, images())
    boxes, labels, scores, counts = tflite_files.run_all(content, images())
    assert (counts > 5).all()
    for i, count in enumerate(counts.ravel().astype(int)):
        np.testing.assert_array_equal(found["labels"][i, :count], labels[i, :count])
        assert (found["labels"][i, count:] < 0).all()
        np.testing.assert_allclose(found["scores"][i, :count], scores[i, :count], atol=1e-4)
        theirs = boxes[i, :count][:, [1, 0, 3, 2]].clip(0, 1) * SIZE
        np.testing.assert_allclose(found["boxes"][i, :count], theirs, atol=0.05)


def test_suppression_of_all_classes_together(tmp_path):
    """There is none here, and a line says so."""
    network, (codes, classes) = detector(*TAPS)
    boxes = network.suppression(codes, classes, anchors(), use_regular_nms=False)
    imported = load(tmp_path / "net.tflite", network.content(*boxes))
    assert any("here each class is suppressed by itself" in line for line in imported.warnings)


@pytest.mark.parametrize(
    ("table", "options", "says"),
    [
        (AnchorTable("mmdet", TABLE.sizes), {}, "anchors that no table here has"),
        (AnchorTable("tensorflow", (0.25, 0.4, 0.6, 0.9, 1.0)), {"x_scale": 5.0}, "the scales"),
        (TABLE, {"num_classes": 4}, "4 classes"),
    ],
)
def test_a_suppression_that_no_network_here_has(table, options, says, tmp_path):
    network, (codes, classes) = detector(*TAPS)
    boxes = network.suppression(codes, classes, anchors(table), **options)
    with pytest.raises(UserError, match=says):
        load(tmp_path / "net.tflite", network.content(*boxes))


def test_a_head_that_is_missing(tmp_path):
    """The backbone converts without the others."""
    network = Network(BACKBONE, SIZE)
    last = network.build()
    heads = [network.conv(network.depthwise(m, 1, 1), 12, 1, 0) for m in (last, last)]
    with pytest.raises(UserError, match="a head of the operators DEPTHWISE_CONV_2D, CONV_2D"):
        load(tmp_path / "net.tflite", network.content(*heads))
    saved = importer.load(tmp_path / "net.tflite", features_only=True).saved
    assert saved.features_only
