"""NonMaxSuppression behind a detector: one more output, the choice among its boxes."""

import numpy as np

from mbv2_jax.errors import UserError
from mbv2_jax.export.onnx.graph import Graph, Tensor
from mbv2_jax.export.program import Program
from mbv2_jax.tasks.detection.settings import Head

SELECTED = "selected"
_CHOSEN = "K"  # the number of choices: the name of the output's first axis


def add(graph: Graph, program: Program) -> None:
    """Adds an output "selected" to a graph with "boxes" (N, A, 4) and "scores" (N, A, classes).

    It is (K, 3) int64: the image, the class and the anchor of each detection, by image, then by
    class, the best first. Detections are those of `Detection.postprocess`, but for its limits:
    `max_detections` is here the number of an image and a class, and all boxes are candidates.

    Raises:
      UserError: the model's head is not that of mbv2_jax's own detectors.
    """
    head = program.saved.spec.head
    if not isinstance(head, Head):
        raise UserError(f"--nms is for the detectors of mbv2_jax, and {program.saved.path} is none")
    graph.scope = "nms"
    boxes, scores = graph.result("boxes"), graph.result("scores")
    height, width = program.size
    low = graph.like(boxes, "Relu", [boxes.name])
    corner = np.array([width, height, width, height], boxes.dtype)
    inside = graph.like(boxes, "Min", [low.name, graph.constant(corner)])
    compared = inside if head.clip_first else boxes
    counted = _inside_image(graph, inside, scores)
    images, anchors, classes = scores.shape
    by_class = graph.node(
        "Transpose", [counted.name], (images, classes, anchors), scores.dtype, perm=(0, 2, 1)
    )
    most = graph.constant(np.array([head.max_detections], np.int64))
    limits = [
        graph.constant(np.array([value], np.float32))
        for value in (head.nms_iou, head.score_threshold)
    ]
    # ONNX has y before x, which does not change what boxes share.
    selected = graph.node(
        "NonMaxSuppression", [compared.name, by_class.name, most, *limits], (1, 3), np.int64
    )
    graph.output(SELECTED, selected, first=_CHOSEN)


def _inside_image(graph: Graph, inside: Tensor, scores: Tensor) -> Tensor:
    """Returns scores that are 0 for boxes of which nothing is inside the image."""
    images, anchors, _ = inside.shape
    halves = [(images, anchors, 2)] * 2
    sizes = graph.constant(np.array([2, 2], np.int64))
    low, high = graph.several("Split", [inside.name, sizes], halves, inside.dtype, axis=2)
    sides = graph.like(low, "Sub", [high.name, low.name])
    one = (images, anchors, 1)
    least = graph.node("ReduceMin", [sides.name], one, inside.dtype, axes=[2], keepdims=1)
    zero = graph.constant(inside.dtype.type(0))
    there = graph.node("Greater", [least.name, zero], one, np.bool_)
    return graph.like(scores, "Where", [there.name, scores.name, zero])
