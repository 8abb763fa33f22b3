"""The layers that operators of a .tflite file compute, and those that are computed in 8 bits."""

from collections.abc import Collection, Sequence

from flax.traverse_util import flatten_dict

from mbv2_jax.errors import RunFailed, UserError, nearest
from mbv2_jax.export.litert.flatbuffer import CONVOLUTIONS, Operator
from mbv2_jax.export.program import Program

# Operators without weights that follow a layer in 8 bits. Those that decode a detector's boxes and
# scores are not among them: 256 steps are too few for coordinates, and for exp.
_FOLLOWING = frozenset(
    ("ADD", "BROADCAST_TO", "CONCATENATION", "MEAN", "PAD", "RESHAPE", "RESIZE_BILINEAR", "SUM")
)
# The JAX operations by which an operator is known to be a layer's: of convolutions the spreading of
# their bias, since their own name may be in that of the operator before; of dense layers their own.
_OF_LAYER = ("broadcast_in_dim", "dot_general")
_FEW_WEIGHTS = 10_000  # see `in_16_bits`
_NORMALISING = frozenset(("SUB", "MUL"))  # pixels, before the first layer


def names(program: Program) -> list[str]:
    """Returns the names of a program's layers, such as "layer2_0/expand/conv"."""
    return sorted({"/".join(path[:-1]) for path in flatten_dict(program.params)})


def starting_with(prefixes: Sequence[str], program: Program) -> frozenset[str]:
    """Returns the layers whose names start with one of some prefixes.

    Raises:
      UserError: no layer does with one of them.
    """
    known = names(program)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in known):
            parts = sorted({name.split("/")[0] for name in known})
            raise UserError(
                f"--keep-float={prefix}: no layer has such a name; {nearest(prefix, parts)}"
            )
    return frozenset(name for name in known if name.startswith(tuple(prefixes)))


def by_operator(operators: Sequence[Operator], program: Program) -> dict[Operator, str]:
    """Returns the layers of a program that operators compute.

    The converter names an operator after the JAX operations that it fused. The last one has the
    name of the file's output instead.

    Raises:
      RunFailed: an operator for a layer is not found.
    """
    missing = set(names(program))
    found = {}
    convolutions = [op for op in operators if op.kind in CONVOLUTIONS]
    for operator in convolutions:
        for name in missing:
            if any(f"/{name}/{part}" in operator.name for part in _OF_LAYER):
                found[operator] = name
                missing.remove(name)
                break
    last = [op for op in convolutions if op.last and op not in found]
    if len(missing) == len(last) == 1:
        found[last[0]] = missing.pop()
    if missing:
        raise RunFailed(
            f"the operators of {', '.join(sorted(missing))} are not in the .tflite file"
        )
    return found


def in_16_bits(operators: Sequence[Operator], program: Program) -> list[Operator]:
    """Returns the operators of layers whose weights are rounded to 16-bit floats.

    Layers of few weights, the depthwise and the first ones, are not among them: they take 3 % of
    the file, and rounding them makes two thirds of the differences.
    """
    sizes = {
        "/".join(path[:-1]): array.size
        for path, array in flatten_dict(program.params).items()
        if path[-1] == "kernel"
    }
    layers = by_operator(operators, program)
    return [operator for operator, name in layers.items() if sizes[name] >= _FEW_WEIGHTS]


def in_8_bits(
    operators: Sequence[Operator], program: Program, kept: Collection[str], integer_input: bool
) -> list[Operator]:
    """Returns the operators that are computed in 8 bits.

    These are the layers and what follows them, up to a detector's decoding.

    Args:
      operators: of the file in floats.
      program: of the file.
      kept: the names of layers that stay in floats; operators that read their results do too.
      integer_input: whether the images are 8-bit numbers; their normalisation is then in 8 bits.
    """
    layers = by_operator(operators, program)
    first = next(place for place, op in enumerate(operators) if op in layers)
    narrow = set()  # tensors of 8-bit numbers
    if integer_input:
        narrow |= set(operators[0].inputs)
    chosen = []
    for place, operator in enumerate(operators):
        if operator in layers:
            is_narrow = layers[operator] not in kept
        else:
            kinds = _FOLLOWING if place > first else _FOLLOWING | _NORMALISING
            read = set(operator.inputs)
            is_narrow = operator.kind in kinds and bool(read) and read <= narrow
        if is_narrow:
            narrow |= set(operator.outputs)
            chosen.append(operator)
    return chosen
