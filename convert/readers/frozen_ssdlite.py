"""The heads of TensorFlow's SSDLite in a frozen graph: the fields that its operators show."""

import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mbv2_jax.errors import UserError, listed

from .graph_nodes import Node, along_height, before, epsilons, floats, integers

_HEAD = re.compile(
    r"(.*/)?BoxPredictor_(?P<map>\d{1,2})/(Class|BoxEncoding)Predictor(_depthwise)?/.+"
)
_EXTRA = re.compile(r"(.*/)?MobilenetV2/layer_\d+_(?P<part>[12])_Conv2d_[^/]+/.+")
_LOGITS = re.compile(r"(.*/)?BoxPredictor_0/ClassPredictor/weights")
# The maps of the backbone, by the names of the nodes that end their layers.
_MAP = re.compile(
    r"(.*/)?MobilenetV2/(expanded_conv(_(?P<number>\d{1,4}))?"
    r"/((?P<expansion>expansion_output|expand/Relu6)|output)|(?P<last>Conv_1/Relu6))"
)
_ROOTS = re.compile(r"(.*/)?MultipleGridAnchorGenerator/Sqrt(_(?P<number>\d{1,4}))?")
_ACTIVATIONS = ("Elu", "LeakyRelu", "Relu", "Selu", "Softplus", "Tanh")
_CODES = (10, 10, 5, 5)  # TensorFlow's scales of y, x, height and width; coding.SCALES' inverses
# Ratios of width to height, and shares of the size: see tasks/detection/anchors.py.
_FIRST_RATIOS = [1, 2, 0.5]
_RATIOS = [1, 2, 0.5, 3, 0.3333, 1]


def find(path: pathlib.Path, nodes: Mapping[str, Node], epsilon: float | None) -> dict[str, Any]:
    """Returns the fields that the operators of the heads show, by their names in a config.

    It is {} where there are no such heads; "model.taps" is among the fields where it is known.

    Args:
      path: the file, for messages.
      nodes: the graph's.
      epsilon: of the backbone's BatchNorm; None where it is not known.

    Raises:
      UserError: an operator is another one than that of the heads here.
    """
    if not any(_LOGITS.fullmatch(name) for name in nodes):
        return {}
    layers = [n for n in nodes.values() if _HEAD.fullmatch(n.name) or _EXTRA.fullmatch(n.name)]
    _check_layers(path, nodes, layers, epsilon)
    return {
        **_taps(path, layers),
        **_images(path, nodes),
        **_scores(path, nodes),
        **_suppression(path, nodes),
        **_anchor_sizes(path, nodes),
    }


def _check_layers(
    path: pathlib.Path, nodes: Mapping[str, Node], layers: Iterable[Node], epsilon: float | None
) -> None:
    """Refuses layers with another activation, epsilon, padding or stride."""
    norms = []
    for node in layers:
        if node.op in _ACTIVATIONS:
            place = listed([node.name])
            raise UserError(f"{path} has the activation {node.op} at {place}, not Relu6")
        if node.op.startswith("FusedBatchNorm"):
            norms.append(node)
        if node.op in ("Conv2D", "DepthwiseConv2dNative"):
            extra = _EXTRA.fullmatch(node.name)
            halves = extra is not None and extra["part"] == "2" and node.op != "Conv2D"
            stride, padding = along_height(node, "strides"), node.attribute("padding", 2).content
            if stride != 1 + halves or bytes(padding) != b"SAME":
                place, kind = listed([node.name]), bytes(padding).decode(errors="replace")
                raise UserError(
                    f"{path} has stride {stride} and padding {kind!a} at {place}, not "
                    f"{1 + halves} and 'SAME'"
                )
    if (found := epsilons(norms)) not in ([], [epsilon]):
        raise UserError(f"{path} has heads whose BatchNorm has epsilon {found}, not {epsilon}")
    for place, wanted in zip(("", "_1", "_2", "_3"), _CODES, strict=True):
        _check_constant(path, nodes, f"Postprocessor/Decode/truediv{place}/y", wanted)
    _check_constant(path, nodes, "Postprocessor/scale_logits/y", 1)


def _check_constant(
    path: pathlib.Path, nodes: Mapping[str, Node], name: str, wanted: float
) -> None:
    """Refuses another value of a constant, if the graph has it."""
    if name in nodes and (value := _number(nodes, name)) != wanted:
        raise UserError(f"{path} has {value} at {name}, and all networks here {wanted}")


def _taps(path: pathlib.Path, layers: Iterable[Node]) -> dict[str, Any]:
    """Returns the maps of the backbone that the heads read."""
    # Imported here, since it imports jax, which takes seconds.
    from mbv2_jax.models.mobilenet_v2 import blocks
    from mbv2_jax.spec import Backbone

    names = [block.name for block in blocks(Backbone())]
    taps: dict[int, str] = {}
    for node in layers:
        head = _HEAD.fullmatch(node.name)
        if head is None or node.op != "DepthwiseConv2dNative" or not node.inputs:
            continue
        source = node.inputs[0]
        if _EXTRA.fullmatch(source):
            continue
        layer = _MAP.fullmatch(source)
        number = int(layer["number"] or 0) if layer else len(names)
        if layer is None or number >= len(names):
            place = listed([source])
            raise UserError(f"{path} has a head on {place}, which is no map of the network here")
        tap = names[number] + ("/expand" if layer["expansion"] else "")
        tap = "last" if layer["last"] else tap
        if taps.setdefault(int(head["map"]), tap) != tap:
            raise UserError(f"{path} has two heads of map {head['map']} on different maps")
    return {"model.taps": tuple(taps[i] for i in sorted(taps))} if taps else {}


def _images(path: pathlib.Path, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Returns the side of the images, and their mean and standard deviation."""
    found: dict[str, Any] = {}
    for node in nodes.values():
        size = nodes.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if node.op != "ResizeBilinear" or "Preprocessor/" not in node.name or size is None:
            continue
        if size.op == "Const":
            height, width = integers(size)
            if height != width:
                raise UserError(
                    f"{path} takes images of {width}x{height}, and networks here squares"
                )
            found["data.image_size"] = height
    factor, shift = (_number(nodes, f"Preprocessor/{name}") for name in ("mul/x", "sub/y"))
    if factor and shift is not None:  # factor * pixel - shift
        found["data.mean"] = (round(shift / factor, 4),) * 3  # of factors with 24 bits
        found["data.std"] = (round(1 / factor, 4),) * 3
    return found


def _scores(path: pathlib.Path, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Returns how logits become scores."""
    node = nodes.get("Postprocessor/convert_scores")
    if node is None:
        return {}
    if node.op not in ("Sigmoid", "Softmax"):
        raise UserError(f"{path} has {node.op} at {node.name}, not Sigmoid or Softmax")
    return {"model.scores": node.op.lower()}


def _suppression(path: pathlib.Path, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Returns the limits of non-maximum suppression, which are the same for all classes."""
    steps = [node for node in nodes.values() if node.op.startswith("NonMaxSuppression")]
    scopes = {_scope(node) for node in steps}
    inside = [node for node in nodes.values() if _scope(node) in scopes]
    # Earlier programs leave out low scores before.
    filters = [n for n in inside if n.op == "Greater" and "/FilterGreaterThan" in n.name]
    of_class = {node.inputs[2] for node in steps if len(node.inputs) > 2}
    whole = [n for n in inside if n.op == "Minimum" and n.name not in of_class]
    limits = [nodes[name] for node in whole for name in node.inputs if name in nodes]
    found: dict[str, set[float | None]] = {
        "nms_iou": {_number(nodes, node.inputs[3]) for node in steps if len(node.inputs) > 3},
        "score_threshold": {
            *(_number(nodes, node.inputs[4]) for node in steps if len(node.inputs) > 4),
            *(_number(nodes, node.inputs[1]) for node in filters if len(node.inputs) > 1),
        },
        "max_detections": {integers(node)[0] for node in limits if node.op == "Const"},
    }
    for name, values in found.items():
        values.discard(None)
        if len(values) > 1:
            raise UserError(f"{path} has several values of {name}: {listed(map(str, values), 3)}")
    return {f"model.{name}": values.pop() for name, values in found.items() if values}


def _scope(node: Node) -> str:
    """Returns the beginning of a node's name up to the non-maximum suppression of one image."""
    return node.name.rpartition("MultiClassNonMaxSuppression/")[0]


def _anchor_sizes(path: pathlib.Path, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Returns the sizes of the anchors, where the graph makes them.

    Raises:
      UserError: they have other ratios or sizes than the table here.
    """
    tables = _tables(nodes)
    sizes = [scales[len(ratios) == 3] for ratios, scales in tables]
    if sizes:  # the last anchor is the geometric mean of its size and the one that would follow
        sizes.append(round(tables[-1][1][-1] ** 2 / sizes[-1], 4))
    for number, ((ratios, scales), size) in enumerate(zip(tables, sizes, strict=False)):
        if number == 0 and len(ratios) == 3:
            known, own = _FIRST_RATIOS, [size / 2, size, size]
        else:
            known, own = _RATIOS, [*[size] * 5, math.sqrt(size * sizes[number + 1])]
        if ratios != known or not np.allclose(scales, own, rtol=0, atol=1e-4):
            raise UserError(
                f"{path} has anchors of ratios {ratios} and sizes {scales} on map {number}, which "
                "no table here has"
            )
    return {"model.anchor_sizes": tuple(sizes)} if sizes else {}


def _tables(nodes: Mapping[str, Node]) -> list[tuple[list[float], list[float]]]:
    """Returns the ratios and the sizes of the anchors of each map, in order."""
    found = {}
    for node in nodes.values():
        if node.op != "RealDiv" or len(node.inputs) != 2:
            continue
        scales, root = (nodes.get(name) for name in node.inputs)
        ratios = None if root is None else before(root, nodes)
        name = _ROOTS.fullmatch(node.inputs[1])
        if name and ratios and scales and ratios.op == scales.op == "Const":
            found[int(name["number"] or 0)] = floats(ratios), floats(scales)
    return [found[number] for number in sorted(found)]


def _number(nodes: Mapping[str, Node], name: str) -> float | None:
    """Returns the number in a constant; None where there is no such constant."""
    node = nodes.get(name)
    return next(iter(floats(node)), 0.0) if node is not None and node.op == "Const" else None
