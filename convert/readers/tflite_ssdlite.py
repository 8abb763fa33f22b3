"""The heads of SSDLite in a .tflite file, told by the order of its operators.

TensorFlow's object_detection writes such files: two heads on each map, each a depthwise 3x3, a 1x1
and a RESHAPE; one CONCATENATION of the boxes' codes and one of the classes' logits; LOGISTIC; and
an operator of its own, TFLite_Detection_PostProcess, which holds the anchors and the limits of
non-maximum suppression.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flatbuffers import flexbuffers

from mbv2_jax.errors import listed

from .strides import Step
from .tflite_graph import Operator
from .tflite_walk import QUANTIZING, Unit, Walk

_RESHAPING = ("RESHAPE", "SQUEEZE", *QUANTIZING)
_SCORES = {"LOGISTIC": "sigmoid", "SOFTMAX": "softmax"}
_SUPPRESSION = "TFLite_Detection_PostProcess"
# The scales of TensorFlow's codes: coding.SCALES' inverses.
_SCALES = {"y_scale": 10.0, "x_scale": 10.0, "h_scale": 5.0, "w_scale": 5.0}
_MOST_MAPS = 20  # the paper's network has 6


class SSDLite(NamedTuple):
    """The extra maps and the heads in a graph.

    Attributes:
      units: the convolutions by our names of the layers.
      operators: all of them, and those that follow.
      stated, guesses: as in `Contents`.
    """

    units: dict[str, Unit]
    operators: list[Operator]
    stated: dict[str, Any]
    guesses: tuple[str, ...]


class _Head(NamedTuple):
    """A head on a map.

    Attributes:
      units: its depthwise convolution, and the 1x1 after it.
      operators: the others up to its concatenation, which is the last.
      place: its place in the concatenation.
    """

    units: tuple[Unit, Unit]
    operators: list[Operator]
    place: int


class _End(NamedTuple):
    """The operators after the concatenation of the heads of all maps.

    Attributes:
      operators: from the concatenation to the results.
      scores: the activation among them, see `_SCORES`; "" without one.
      output: the number of the last tensor.
    """

    operators: list[Operator]
    scores: str
    output: int


def find(walk: Walk, maps: Mapping[str, int]) -> SSDLite | None:
    """Returns the layers after the backbone; None where they are of another network.

    Args:
      walk: the graph.
      maps: the number of the tensor of each map of the backbone, by our names, in the network's
        order; the extra maps are made from the last.

    Raises:
      UserError: they are SSDLite's, with anchors or codes that no network here has.
    """
    extra = dict(_extra_maps(walk, list(maps.values())[-1]))
    tensors = dict(maps)
    tensors |= {name: unit.output for name, unit in extra.items() if name.endswith("_pointwise")}
    heads = {name: found for name, tensor in tensors.items() if (found := _heads(walk, tensor))}
    columns = list(zip(*heads.values(), strict=True)) if heads else []
    if len(columns) != 2 or not all(map(_are_in_order, columns)):
        return None
    ends = [_end(walk, column[0].operators[-1]) for column in columns]
    sizes = [walk.graph.tensors[end.output].shape[-1] for end in ends]
    if sizes[0] == 4 and not ends[0].scores:
        codes, classes = 0, 1
    elif sizes[1] == 4 and not ends[1].scores:
        codes, classes = 1, 0
    else:
        return None
    units = dict(extra)
    for i, found in enumerate(heads.values()):
        units[f"box_depthwise{i}"], units[f"box_codes{i}"] = found[codes].units
        units[f"class_depthwise{i}"], units[f"class_logits{i}"] = found[classes].units
    operators = [op for unit in units.values() for op in unit.operators]
    operators += [op for found in heads.values() for head in found for op in head.operators]
    operators += [op for end in ends for op in end.operators]
    stated: dict[str, Any] = {"model.taps": tuple(name for name in heads if name not in extra)}
    if ends[classes].scores:
        stated["model.scores"] = ends[classes].scores
    shapes = [walk.graph.tensors[tensors[name]].shape[1:3] for name in heads]
    suppression = walk.follow(ends[codes].output, ("CUSTOM",))
    if not suppression:
        return SSDLite(units, operators, stated, ())
    limits, guesses = _suppression(walk, suppression[0], [end.output for end in ends], codes)
    stated |= limits
    stated["model.anchor_sizes"] = _anchor_sizes(walk, suppression[0], shapes)
    return SSDLite(units, [*operators, *suppression], stated, guesses)


def _extra_maps(walk: Walk, tensor: int) -> Iterator[tuple[str, Unit]]:
    """Yields the layers of the maps that are made from the backbone's last one."""
    for i in range(_MOST_MAPS):
        reduce = [unit for unit in walk.branches(tensor, ("CONV_2D",)) if _is_pointwise(unit)]
        if len(reduce) != 1:
            return
        depthwise = walk.unit(reduce[0].output, ("DEPTHWISE_CONV_2D",), QUANTIZING)
        if depthwise is None or depthwise.step != Step(2, 1) or not _is_3x3(depthwise):
            return
        pointwise = walk.unit(depthwise.output, ("CONV_2D",), QUANTIZING)
        units = (*reduce, depthwise, pointwise)
        if pointwise is None or not _is_pointwise(pointwise):
            return
        if not all(unit is not None and unit.is_relu6 for unit in units):
            return
        yield f"extra{i}_reduce", reduce[0]
        yield f"extra{i}_depthwise", depthwise
        yield f"extra{i}_pointwise", pointwise
        tensor = pointwise.output


def _heads(walk: Walk, tensor: int) -> list[_Head]:
    """Returns the heads on a map, in the order of their concatenations in the graph."""
    found = []
    for depthwise in walk.branches(tensor, ("DEPTHWISE_CONV_2D",)):
        last = walk.unit(depthwise.output, ("CONV_2D",), QUANTIZING)
        if last is None or not _is_pointwise(last) or last.activation != "linear":
            continue
        way = walk.follow(last.output, ("CONCATENATION",), _RESHAPING)
        if len(way) < 2 or not any(op.kind == "RESHAPE" for op in way):
            continue
        if depthwise.step != Step(1, 1) or not _is_3x3(depthwise) or not depthwise.is_relu6:
            continue
        place = way[-1].inputs.index(way[-2].outputs[0])
        found.append(_Head((depthwise, last), way, place))
    return sorted(found, key=lambda head: head.operators[-1].place)


def _are_in_order(column: Sequence[_Head]) -> bool:
    """Returns whether the heads of the maps, in their order, are all of one concatenation."""
    concatenation = column[0].operators[-1]
    return [(head.operators[-1].place, head.place) for head in column] == [
        (concatenation.place, i) for i in range(len(concatenation.inputs))
    ]


def _end(walk: Walk, concatenation: Operator) -> _End:
    """Returns the operators from a concatenation to the result, or to the one that suppresses."""
    operators, scores = [concatenation], ""
    (tensor,) = concatenation.outputs
    while following := walk.follow(tensor, (*_RESHAPING, *(() if scores else _SCORES))):
        (operator,) = following
        scores = _SCORES.get(operator.kind, scores)
        operators.append(operator)
        (tensor,) = operator.outputs
    return _End(operators, scores, tensor)


def _suppression(
    walk: Walk, operator: Operator, given: Sequence[int], codes: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the limits of an operator that decodes and suppresses, and an assumption about it."""
    if operator.custom != _SUPPRESSION or operator.inputs[:2] != (given[codes], given[1 - codes]):
        raise walk.refusal(f"the operator {listed([operator.custom])} follows its heads")
    options = flexbuffers.GetRoot(operator.custom_options).AsMap
    scales = {name: options[name].AsFloat for name in _SCALES}
    classes = walk.graph.tensors[given[1 - codes]].shape[-1]
    if scales != _SCALES or options["num_classes"].AsInt != classes - 1:
        raise walk.refusal(
            f"{_SUPPRESSION} has the scales {tuple(scales.values())} and "
            f"{options['num_classes'].AsInt} classes, not {tuple(_SCALES.values())} and "
            f"{classes - 1}"
        )
    limits = {
        # As decimals of 24 bits.
        "model.score_threshold": float(str(np.float32(options["nms_score_threshold"].AsFloat))),
        "model.nms_iou": float(str(np.float32(options["nms_iou_threshold"].AsFloat))),
        "model.max_detections": options["max_detections"].AsInt,
    }
    names = [key.AsKey for key in options.Keys]
    if "use_regular_nms" in names and options["use_regular_nms"].AsBool:
        return limits, ()
    return limits, (
        "the file suppresses boxes of all classes together (use_regular_nms is off); here each "
        "class is suppressed by itself",
    )


def _anchor_sizes(
    walk: Walk, operator: Operator, shapes: Sequence[tuple[int, ...]]
) -> tuple[float, ...]:
    """Returns the sizes of the anchors that an operator holds.

    Raises:
      UserError: no table here has such anchors.
    """
    # Imported here, since it imports jax, which takes seconds.
    from mbv2_jax.tasks.detection.anchors import AnchorTable

    theirs = walk.graph.constant(operator.inputs[2])  # (A, 4): centre y and x, height, width
    unknown = walk.refusal(f"{_SUPPRESSION} has anchors that no table here has")
    counts = [height * width * (6 if i else 3) for i, (height, width) in enumerate(shapes)]
    if theirs is None or theirs.shape != (sum(counts), 4):
        raise unknown
    starts = [0, *itertools.accumulate(counts)]
    # The first anchor of a position is a square of the map's size, and of half of it on map 0; the
    # last is one between its size and the next.
    sizes = [float(theirs[start, 2]) * (1 if i else 2) for i, start in enumerate(starts[:-1])]
    sizes.append(float(theirs[-1, 2]) ** 2 / sizes[-1])
    rounded = tuple(round(size, 4) for size in sizes)
    if not all(size > 0 and math.isfinite(size) for size in rounded):
        raise unknown
    table = AnchorTable("tensorflow", rounded)
    for i, shape in enumerate(shapes):
        x0, y0, x1, y1 = table.boxes(i, (shape[0], shape[1]), (1, 1)).T
        ours = np.stack([(y0 + y1) / 2, (x0 + x1) / 2, y1 - y0, x1 - x0], 1)
        if not np.allclose(ours, theirs[starts[i] : starts[i + 1]], rtol=0, atol=1e-3):
            raise unknown
    return rounded


def _is_pointwise(unit: Unit) -> bool:
    """Returns whether a convolution is 1x1."""
    return unit.kernel.shape[1:3] == (1, 1) and unit.step == Step(1, 1) and not unit.padding


def _is_3x3(unit: Unit) -> bool:
    """Returns whether a convolution is 3x3."""
    return unit.kernel.shape[1:3] == (3, 3)
