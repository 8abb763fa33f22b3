"""The head of TensorFlow's deeplab in a frozen graph: the fields that its operators show."""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mbv2_jax.errors import UserError, listed

from .graph_nodes import Node, along_height, dilation, epsilons

_LAYER = r"(.*/)?(image_pooling|aspp\d{1,2}|concat_projection)"
_DILATED = re.compile(r"(.*/)?aspp(?P<number>[1-9]\d?)/weights")
_POOLING = re.compile(r"(.*/)?image_pooling/weights")
_LOGITS = re.compile(r"(.*/)?logits/semantic/weights")
_OF_LAYER = re.compile(rf"{_LAYER}/(?P<operator>.+)")
_ACTIVATIONS = ("Elu", "LeakyRelu", "Relu6", "Selu", "Sigmoid", "Softplus", "Tanh")


class Head(NamedTuple):
    """The facts about a head.

    Attributes:
      stated, guesses, rates: as in `Contents`.
    """

    stated: dict[str, Any]
    guesses: tuple[str, ...] = ()
    rates: tuple[int, ...] = ()


def find(path: pathlib.Path, nodes: Mapping[str, Node], output_stride: int | None) -> Head:
    """Returns the facts that the operators of a head show; no facts where there is no such head.

    Args:
      path: the file, for messages.
      nodes: the graph's.
      output_stride: of the backbone; None where it is not known.

    Raises:
      UserError: an activation, an epsilon or a resizing is another one than that of the head here.
    """
    if not any(_LOGITS.fullmatch(name) for name in nodes):
        return Head({})
    _check(path, nodes)
    convolutions = dict(_convolutions(nodes))
    stated, guesses = _image_size(nodes, convolutions, output_stride)
    rates = {}
    for name, node in convolutions.items():
        if number := _DILATED.fullmatch(name):
            rates[int(number["number"])] = dilation(node, nodes)
    return Head(
        stated | _align_corners(path, nodes, convolutions),
        guesses,
        tuple(rates[number] for number in sorted(rates)),
    )


def _check(path: pathlib.Path, nodes: Mapping[str, Node]) -> None:
    """Refuses layers of the head with another activation or epsilon."""
    # Imported here, since it imports jax, which takes seconds.
    from mbv2_jax.models.deeplabv3 import EPSILON

    norms = []
    for node in nodes.values():
        if not _OF_LAYER.fullmatch(node.name):
            continue
        if node.op in _ACTIVATIONS:
            place = listed([node.name])
            raise UserError(f"{path} has the activation {node.op} at {place}, not Relu")
        if node.op.startswith("FusedBatchNorm"):
            norms.append(node)
    if (found := epsilons(norms)) not in ([], [EPSILON]):
        raise UserError(f"{path} has a head whose BatchNorm has epsilon {found}, not {EPSILON}")


def _convolutions(nodes: Mapping[str, Node]) -> Iterator[tuple[str, Node]]:
    """Yields the convolutions, each after the name of the constant that holds its weights."""
    for node in nodes.values():
        if node.op == "Conv2D" and len(node.inputs) > 1:
            weights = nodes.get(node.inputs[1])
            if weights is not None and weights.op == "Identity" and weights.inputs:
                weights = nodes.get(weights.inputs[0])
            if weights is not None and weights.op == "Const":
                yield weights.name, node


def _image_size(
    nodes: Mapping[str, Node], convolutions: Mapping[str, Node], output_stride: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the side of the images that the image pooling averages whole, where it is fixed."""
    pooled = [node for name, node in convolutions.items() if _POOLING.fullmatch(name)]
    before = nodes.get(pooled[0].inputs[0]) if len(pooled) == 1 else None
    if before is None or before.op != "AvgPool" or output_stride is None:
        return {}, ()
    # The corners of the map and of the image are upon each other.
    size = (along_height(before, "ksize") - 1) * output_stride + 1
    if size <= 1:
        return {}, ()
    guess = f"the graph takes images of any size; its image pooling is for {size} pixels"
    return {"data.image_size": size}, (guess,)


def _align_corners(
    path: pathlib.Path, nodes: Mapping[str, Node], convolutions: Mapping[str, Node]
) -> dict[str, Any]:
    """Returns how the logits are resized, where the graph does that."""
    logits = [node.name for name, node in convolutions.items() if _LOGITS.fullmatch(name)]
    resizes = [node for node in _after(nodes, logits) if node.op == "ResizeBilinear"]
    # By the attributes of torch's convention, of TensorFlow's old default, and of deeplab.
    found = {(node.flag("align_corners"), node.flag("half_pixel_centers")) for node in resizes}
    if not found:
        return {}
    if found not in ({(True, False)}, {(False, True)}):
        raise UserError(
            f"{path} resizes its logits as no network here does, at "
            f"{listed([node.name for node in resizes], 3, ', ')}: with align_corners or "
            "half_pixel_centers it could be read"
        )
    return {"model.align_corners": found.pop()[0]}


def _after(nodes: Mapping[str, Node], names: list[str]) -> list[Node]:
    """Returns the nodes that read the results of others, directly or not."""
    readers: dict[str, list[Node]] = {}
    for node in nodes.values():
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    found: dict[str, Node] = {}
    names = list(names)
    while names:
        for node in readers.get(names.pop(), ()):
            if node.name not in found:
                found[node.name] = node
                names.append(node.name)
    return list(found.values())
