"""The head of Mobile DeepLabv3 in a .tflite file, told by the order of its operators."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .tflite_graph import BYTE, INT, Operator
from .tflite_walk import QUANTIZING, Unit, Walk, pools_globally

_ALIGN_CORNERS, _HALF_PIXEL_CENTERS = 2, 3  # options of RESIZE_BILINEAR
_CHANNELS = 3  # the axis of a map
# What may follow the resized logits, and changes no pixel's largest one.
_ANSWERS = (*QUANTIZING, "ARG_MAX", "SOFTMAX", "CAST", "RESHAPE", "SQUEEZE")


class DeepLab(NamedTuple):
    """The head in a graph.

    Attributes:
      units: the convolutions by our names of the layers.
      operators: all of the head's.
      stated, rates: as in `Contents`.
    """

    units: dict[str, Unit]
    operators: list[Operator]
    stated: dict[str, Any]
    rates: tuple[int, ...]


class _Branches(NamedTuple):
    """The parallel layers of the head.

    Attributes:
      units: the convolutions by our names of the layers, in the order of their concatenation.
      operators: all of them, and the concatenation.
    """

    units: dict[str, Unit]
    operators: list[Operator]


def find(walk: Walk, tensor: int) -> DeepLab | None:
    """Returns the head after the backbone's last tensor; None where there is another one.

    Args:
      walk: the graph.
      tensor: the number of the tensor.
    """
    # Imported here, since it imports jax, which takes seconds.
    from mbv2_jax.models.deeplabv3 import LOGITS, PROJECTION

    found = _branches(walk, tensor)
    if found is None:
        return None
    units, operators = dict(found.units), list(found.operators)
    (tensor,) = operators[-1].outputs
    for layer, activation in ((PROJECTION, "relu"), (LOGITS, "linear")):
        unit = walk.unit(tensor, ("CONV_2D",), QUANTIZING)
        if unit is None or not _is_pointwise(unit) or unit.activation != activation:
            return None
        units[layer] = unit
        operators += unit.operators
        tensor = unit.output
    answer = _answer(walk, tensor)
    if answer is None:
        return None
    after, stated = answer
    dilated = [unit for unit in found.units.values() if not _is_pointwise(unit)]
    rates = tuple(unit.step.dilation for unit in dilated)
    return DeepLab(units, [*operators, *after], stated, rates)


def _branches(walk: Walk, tensor: int) -> _Branches | None:
    """Returns the image pooling and the convolutions beside it; None for other layers."""
    from mbv2_jax.models.deeplabv3 import POINTWISE, POOLING

    pooling = _pooling(walk, tensor)
    if pooling is None:
        return None
    pooled, operators = pooling
    concatenation = operators[-1]
    axis = concatenation.options.number(0, INT)
    if axis not in (_CHANNELS, -1) or walk.activation(concatenation) != "linear":
        return None
    inputs = concatenation.inputs
    ordered: dict[int, Unit] = {}
    for unit in walk.branches(tensor, ("CONV_2D",)):
        way = walk.follow(unit.output, ("CONCATENATION",), QUANTIZING)
        if not way or way[-1].place != concatenation.place or unit.activation != "relu":
            return None
        operators = [*unit.operators, *way[:-1], *operators]
        ordered[inputs.index(way[-2].outputs[0] if len(way) > 1 else unit.output)] = unit
    # The pooled map is the first, and the 1x1 convolution the second.
    if sorted(ordered) != list(range(1, len(inputs))) or not _is_pointwise(ordered[1]):
        return None
    units = {POOLING: pooled, POINTWISE: ordered[1]}
    for number in range(2, len(inputs)):
        unit = ordered[number]
        if unit.kernel.shape[1:3] != (3, 3) or unit.step.stride != 1 or unit.padding:
            return None
        units[f"aspp{number - 1}"] = unit
    return _Branches(units, operators)


def _pooling(walk: Walk, tensor: int) -> tuple[Unit, list[Operator]] | None:
    """Returns the layer of the image pooling, and all operators up to the concatenation."""
    operators = walk.follow(tensor, ("MEAN", "AVERAGE_POOL_2D"), QUANTIZING)
    if not operators or not pools_globally(walk.graph, operators[-1]):
        return None
    unit = walk.unit(operators[-1].outputs[0], ("CONV_2D",), QUANTIZING)
    if unit is None or not _is_pointwise(unit) or unit.activation != "relu":
        return None
    # A single pixel is spread over the map, whatever the convention of the resizing.
    way = walk.follow(unit.output, ("CONCATENATION",), ("RESIZE_BILINEAR", *QUANTIZING))
    if not any(operator.kind == "RESIZE_BILINEAR" for operator in way):
        return None
    if way[-1].inputs[0] != way[-2].outputs[0]:
        return None
    return unit, [*operators, *unit.operators, *way]


def _answer(walk: Walk, tensor: int) -> tuple[list[Operator], dict[str, Any]] | None:
    """Returns the operators after the logits, and how those are resized to the image's size.

    It is None where the network here resizes them in another way.
    """
    operators: list[Operator] = []
    resizes: list[Operator] = []
    wanted: Sequence[str] = ("RESIZE_BILINEAR", *QUANTIZING)
    while following := walk.follow(tensor, (*wanted, *_ANSWERS)):
        (operator,) = following
        if operator.kind == "RESIZE_BILINEAR":
            resizes.append(operator)
        elif operator.kind not in QUANTIZING:
            wanted = ()  # no more resizing, which would be of classes
        operators.append(operator)
        (tensor,) = operator.outputs
    shapes = walk.graph.tensors
    changing = [
        resize
        for resize in resizes
        if shapes[resize.inputs[0]].shape[1:3] != shapes[resize.outputs[0]].shape[1:3]
    ]
    if not changing:
        return operators, {}
    (image,) = walk.graph.inputs
    whole = shapes[changing[0].outputs[0]].shape[1:3] == shapes[image].shape[1:3]
    options = changing[0].options
    align = bool(options.number(_ALIGN_CORNERS, BYTE))
    half = bool(options.number(_HALF_PIXEL_CENTERS, BYTE))
    if len(changing) > 1 or not whole or align == half:
        return None
    return operators, {"model.align_corners": align}


def _is_pointwise(unit: Unit) -> bool:
    """Returns whether a convolution is 1x1."""
    return unit.kernel.shape[1:3] == (1, 1) and unit.step == (1, 1) and not unit.padding
