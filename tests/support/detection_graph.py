"""Frozen graphs of TensorFlow's object_detection, with the names and orders that it has there."""

import itertools
from typing import Any

import numpy as np

from mbv2_jax.convert import detection_head
from mbv2_jax.convert.layouts import OF_TASK
from mbv2_jax.spec import Backbone
from mbv2_jax.tasks.detection.settings import Head
from tests.support.graph_def import GraphDef

_LAYOUT = OF_TASK["detection"]["tf-slim"]
SUPPRESSION = "Postprocessor/Batch/MultiClassNonMaxSuppression"


def write(variables: dict[str, Any], backbone: Backbone, head: Head) -> GraphDef:
    """Returns a graph of the weights alone.

    Args:
      variables: of our network, with the background last and codes of x, y, width and height.
      backbone, head: the network's; `anchors` is "tensorflow".
    """
    graph = GraphDef()
    positions = _LAYOUT.arrays(backbone) | detection_head.arrays(_LAYOUT, head)
    for name, array in positions.items():
        value: Any = variables
        for key in array.path:
            value = value[key]
        if array.path[1].startswith("class_logits"):  # the background first
            whole = value.reshape(*value.shape[:-1], -1, (head.num_classes or 0) + 1)
            value = np.concatenate([whole[..., -1:], whole[..., :-1]], -1).reshape(value.shape)
        if array.path[1].startswith("box_codes"):  # y, x, height, width
            x, y, width, height = np.moveaxis(value.reshape(*value.shape[:-1], -1, 4), -1, 0)
            value = np.stack([y, x, height, width], -1).reshape(value.shape)
        back = [array.axes.index(axis) for axis in range(len(array.axes))]
        name = f"FeatureExtractor/{name}" if name.startswith("MobilenetV2/") else name
        graph.constant(name, np.ascontiguousarray(value.transpose(back)))
    return graph


def add_operators(graph: GraphDef, taps: tuple[str, ...]) -> None:
    """Adds the operators whose constants are fields of a model, with values of no default.

    Args:
      graph: from `write`.
      taps: the nodes that the first heads read.
    """
    for i, node in enumerate(taps):
        for kind in ("Class", "BoxEncoding"):
            layer = f"BoxPredictor_{i}/{kind}Predictor_depthwise"
            attributes: dict[str, Any] = {"strides": [1, 1, 1, 1], "padding": b"SAME"}
            weights = f"{layer}/depthwise_weights"
            graph.node(f"{layer}/depthwise", "DepthwiseConv2dNative", node, weights, **attributes)
    resize = "Preprocessor/map/while/ResizeImage"
    _constants(graph, {f"{resize}/size": np.array([192, 192], np.int32)})
    graph.node(f"{resize}/ResizeBilinear", "ResizeBilinear", "images", f"{resize}/size")
    graph.node("Postprocessor/convert_scores", "Softmax", "concat_1")
    _constants(
        graph,
        {
            "Preprocessor/mul/x": 1 / 64,
            "Preprocessor/sub/y": 2.0,
            "Postprocessor/scale_logits/y": 1.0,
            "Postprocessor/Decode/truediv/y": 10.0,
            "Postprocessor/Decode/truediv_3/y": 5.0,
            f"{SUPPRESSION}/iou": 0.5,
            f"{SUPPRESSION}/score": 0.125,
            f"{SUPPRESSION}/of_class": np.array(40, np.int32),
            f"{SUPPRESSION}/of_all": np.array(60, np.int32),
        },
    )
    for i in range(3):  # one for each class
        graph.node(f"{SUPPRESSION}/Minimum_{i}", "Minimum", f"{SUPPRESSION}/of_class", "count")
        inputs = ("boxes", "scores", f"Minimum_{i}", "iou", "score")
        names = (f"{SUPPRESSION}/{name}" for name in inputs)
        graph.node(f"{SUPPRESSION}/nms_{i}/NonMaxSuppressionV3", "NonMaxSuppressionV3", *names)
    graph.node(f"{SUPPRESSION}/Minimum_3", "Minimum", f"{SUPPRESSION}/of_all", "count_3")


def add_anchors(graph: GraphDef, sizes: tuple[float, ...], ratio: float = 0.3333) -> None:
    """Adds the operators that make the anchors of maps of some sizes; `ratio` is the fifth."""
    for i, (size, following) in enumerate(itertools.pairwise(sizes)):
        ratios, scales = [1, 2, 0.5], [size / 2, size, size]
        if i:
            ratios, scales = [*ratios, 3, ratio, 1], [*[size] * 5, np.sqrt(size * following)]
        end, scope = f"_{i}" if i else "", "MultipleGridAnchorGenerator"
        _constants(graph, {f"{scope}/Sqrt{end}/x": ratios, f"{scope}/truediv_{14 + i}/x": scales})
        graph.node(f"{scope}/Sqrt{end}", "Sqrt", f"{scope}/Sqrt{end}/x")
        names = f"{scope}/truediv_{14 + i}/x", f"{scope}/Sqrt{end}"
        graph.node(f"{scope}/truediv_{14 + i}", "RealDiv", *names)


def _constants(graph: GraphDef, values: dict[str, Any]) -> None:
    for name, value in values.items():
        array = np.asarray(value)
        whole = np.issubdtype(array.dtype, np.integer) and "Anchor" not in name
        graph.constant(name, array.astype(np.int32 if whole else np.float32))
