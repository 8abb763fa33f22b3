"""The ranges of activations in a .tflite file, of a network that rounded to 8 bits in training.

Such a network has a running range for each activation that is a tensor of the file: see
`models.layers.Rounding`, by whose names they are found here.
"""

import re
from collections.abc import Mapping, Sequence

from flax.traverse_util import flatten_dict

from mbv2_jax.export.litert import layers
from mbv2_jax.export.litert.flatbuffer import INPUT_TENSOR, Operator
from mbv2_jax.export.litert.precision import Range, input_range, make_range
from mbv2_jax.export.program import Program
from mbv2_jax.models import deeplabv3

# Operators whose results are numbers of their first input.
_PASSING = ("BROADCAST_TO", "PAD", "RESHAPE", "RESIZE_BILINEAR")


def ranges(operators: Sequence[Operator], program: Program) -> dict[str, Range]:
    """Returns the ranges of a file's activations, by the names of tensors.

    Activations that the network did not round, such as a detector's boxes, are not among them; of a
    network that has seen no batch there are none.

    Args:
      operators: of the file in floats.
      program: that the file computes, with the ranges in its statistics.
    """
    known = _rounded(program)
    if all(ends["min"] == ends["max"] for ends in known.values()):
        return {}
    by_layer = layers.by_operator(operators, program)
    names = {INPUT_TENSOR: input_range(program)}
    by_number = dict.fromkeys(operators[0].inputs, names[INPUT_TENSOR])
    for operator in operators:
        found = _of(operator, by_layer.get(operator), by_number, known, program)
        if found is not None:
            names[operator.name] = found
            by_number |= dict.fromkeys(operator.outputs, found)
    return names


def _rounded(program: Program) -> dict[str, Range]:
    """Returns the ranges of a network by name, such as "layer2_1/sum"."""
    flat = flatten_dict(program.saved.batch_stats)
    return {
        "/".join(path[:-1]): make_range(low, flat[*path[:-1], "high"])
        for path, low in flat.items()
        if path[-1] == "low"
    }


def _of(
    operator: Operator,
    layer: str | None,
    by_number: Mapping[int, Range],
    known: Mapping[str, Range],
    program: Program,
) -> Range | None:
    """Returns the range of an operator's result; None where the network did not round it."""
    if layer is not None:
        place = layer.removesuffix("/conv")
        names = [f"{place}/range", f"{place}_range"]
        if deeplabv3.is_of_head(place):  # a branch has the range of what it is concatenated to
            names.append("concatenation_range")
        return next((known[name] for name in names if name in known), None)
    given = by_number.get(operator.inputs[0]) if operator.inputs else None
    if operator.kind in _PASSING:
        return given
    if operator.kind == "ADD" and (block := re.search(r"(layer\d+_\d+)/add", operator.name)):
        return known.get(f"{block[1]}/sum")
    if operator.kind in ("MEAN", "SUM"):  # which the mean of a single pixel is
        return known.get("pooled_range")
    if operator.kind == "CONCATENATION":
        return known.get("concatenation_range")
    if operator.kind == "SUB" and given is not None:  # pixels - mean
        mean = program.saved.spec.preprocessing.mean
        return make_range(-max(mean), 255 - min(mean))
    return None
