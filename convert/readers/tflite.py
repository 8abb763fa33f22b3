"""TFLite's files (.tflite), read without TensorFlow: operators in order -> {"LAYER/ARRAY": array}.

The names in such files are those of the program that wrote them. What tells the layers is the
network's structure: from the input, the trunk is followed from one convolution to the next, and
each has to be the one of MobileNetV2 that comes next. BatchNorm is folded into the convolutions;
its arrays are made up, so that it changes nothing.
"""

import pathlib
import types
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mbv2_jax.errors import listed

from ..layouts import LAYOUTS
from . import archive, strides, tflite_deeplab, tflite_ssdlite
from .contents import Contents, Dense, damage_named, no_averages
from .tflite_graph import Graph, Operator
from .tflite_walk import QUANTIZING, Unit, Walk, pools_globally

_LAYOUT = LAYOUTS["tflite"]
_AFFINE = ("MUL", "ADD", "SUB", "DIV")
_CASTS = (*QUANTIZING, "CAST", "TRANSPOSE")
_FLATTENING = (*QUANTIZING, "RESHAPE", "SQUEEZE")
_LONGEST_LABELS = 1 << 20  # bytes; ImageNet's have 10,000
_SCORES = {"SOFTMAX": "softmax", "LOGISTIC": "sigmoid"}


class _Entrance(NamedTuple):
    """The part of a graph before its first convolution.

    Attributes:
      tensor: the number of the convolution's input.
      operators: those before it.
      stated, guesses: as in `Contents`.
    """

    tensor: int
    operators: list[Operator]
    stated: dict[str, Any]
    guesses: tuple[str, ...]


class _Trunk(NamedTuple):
    """The backbone in a graph.

    Attributes:
      units: the convolutions by our names of the layers.
      operators: all of the backbone's.
      maps: the numbers of the tensors of its maps, by the names of `mobilenet_v2.feature_info`, in
        the network's order.
    """

    units: dict[str, Unit]
    operators: list[Operator]
    maps: dict[str, int]

    @property
    def output(self) -> int:
        """The number of the last tensor."""
        return next(reversed(self.maps.values()))


class _Head(NamedTuple):
    """The part of a graph after the backbone.

    Attributes:
      tensors: its weights.
      dense: as `Contents.head`.
      stated, guesses, obstacles, rates: as in `Contents`.
    """

    tensors: dict[str, np.ndarray]
    dense: tuple[Dense, ...] | None = None
    stated: Mapping[str, Any] = types.MappingProxyType({})
    guesses: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()
    rates: tuple[int, ...] = ()


def read(path: pathlib.Path, ema: bool | None) -> Contents:
    """Reads the weights in a .tflite file, and the facts that its graph and its labels tell.

    Weights of 16 and of 8 bits become float32.

    Args:
      path: the file.
      ema: True is refused: such a file holds one set of weights.

    Raises:
      UserError: the file is damaged, or its graph does not begin with MobileNetV2's layers.
    """
    if ema:
        raise no_averages(path)
    with damage_named(path):
        walk = Walk(Graph(path, path.read_bytes()))
        entrance = _entrance(walk)
        trunk = _trunk(walk, entrance.tensor)
        tensors = _folded(trunk.units, _LAYOUT.backbone.bn_epsilon)
        head = _after(walk, trunk, entrance.operators)
        stated = entrance.stated | _strides(walk, trunk.units) | _padding(walk, trunk.units)
        return Contents(
            tensors | head.tensors,
            class_names=_labels(path),
            guesses=(*entrance.guesses, *head.guesses),
            stated={**stated, **head.stated},
            head=head.dense,
            obstacles=head.obstacles,
            rates=head.rates,
            folded=True,
        )


def _entrance(walk: Walk) -> _Entrance:
    """Follows the input to the first convolution, and returns the normalisation on the way."""
    graph = walk.graph
    if len(graph.inputs) != 1:
        raise walk.refusal(f"it takes {len(graph.inputs)} inputs, and not images alone")
    (tensor,) = graph.inputs
    limits = graph.tensors[tensor].range
    factor, shift = np.ones(3), np.zeros(3)  # the network sees factor * input + shift
    operators: list[Operator] = []
    # A RESHAPE is around the normalisation of whole rows of pixels.
    while following := walk.follow(tensor, (*_CASTS, "RESHAPE", *_AFFINE)):
        (operator,) = following
        if operator.kind in _AFFINE:
            factor, shift = _applied(walk, operator, tensor, factor, shift)
        operators.append(operator)
        tensor = operator.outputs[0]
    stated, guesses = _normalization(factor, shift)
    if limits and not stated and max(abs(limits[0] + 1), abs(limits[1] - 1)) > 0.1:
        low, high = limits
        guesses = (f"the 8-bit input stands for numbers from {low:.2f} to {high:.2f}",)
    shape = graph.tensors[tensor].shape
    if len(shape) == 4 and shape[1] == shape[2] > 1:
        stated["data.image_size"] = shape[1]
    return _Entrance(tensor, operators, stated, guesses)


def _applied(
    walk: Walk, operator: Operator, tensor: int, factor: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns factor and shift after an operator of arithmetic on the images."""
    swapped = operator.inputs[0] != tensor
    constant = walk.graph.constant(operator.inputs[0 if swapped else 1])
    scales = operator.kind in ("MUL", "DIV")
    if constant is not None and constant.size > 3 and constant.size % 3 == 0:
        pixels = constant.reshape(-1, 3)  # a row of them
        constant = pixels[0] if (pixels == pixels[0]).all() else constant
    if (
        constant is None
        or constant.size not in (1, 3)
        or not np.isfinite(constant).all()
        or (scales and not constant.all())
        or (swapped and operator.kind in ("SUB", "DIV"))
        or walk.activation(operator) != "linear"
    ):
        raise walk.refusal(f"{walk.name(operator)} is not a normalisation of the images")
    value = np.broadcast_to(constant.ravel().astype(float), 3)
    if operator.kind == "ADD":
        return factor, shift + value
    if operator.kind == "SUB":
        return factor, shift - value
    scale = value if operator.kind == "MUL" else 1 / value
    return factor * scale, shift * scale


def _normalization(factor: np.ndarray, shift: np.ndarray) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the mean and the standard deviation, and the assumption about their unit."""
    if (factor == 1).all() and (shift == 0).all():
        return {}, ()
    mean, std = -shift / factor, 1 / factor
    guesses: tuple[str, ...] = ()
    # Of pixels, such a std would make numbers of more than 100; but it may be in the weights.
    if (std < 2).all() and (abs(mean) < 2).all():
        mean, std = 255 * mean, 255 * std
        guesses = ("the graph normalises pixels from 0 to 1; here they are from 0 to 255",)
    # Rounded, because the file holds factors of 24 bits.
    stated = {
        "data.mean": tuple(round(float(value), 4) for value in mean),
        "data.std": tuple(round(float(value), 4) for value in std),
    }
    return stated, guesses


def _trunk(walk: Walk, tensor: int) -> _Trunk:
    """Follows the network's layers from the first convolution on."""
    # Imported here, since it imports jax, which takes seconds.
    from mbv2_jax.models.mobilenet_v2 import blocks

    units = {"stem": _expected(walk, tensor, "stem", 3)}
    additions: list[Operator] = []
    tensor = units["stem"].output
    maps: dict[str, int] = {}
    for block in blocks(_LAYOUT.backbone):
        before, inputs = tensor, units[next(reversed(units))].channels
        for part in ("expand", "depthwise", "project")[block.expansion == 1 :]:
            layer = f"{block.name}/{part}"
            channels = units[next(reversed(units))].channels
            units[layer] = _expected(walk, tensor, layer, channels)
            tensor = units[layer].output
        same = units[layer].channels == inputs
        if same and units[f"{block.name}/depthwise"].step.stride == 1:
            additions.append(_addition(walk, block.name, before, tensor))
            (tensor,) = additions[-1].outputs
        if block.expansion != 1:
            maps[f"{block.name}/expand"] = units[f"{block.name}/expand"].output
        maps[block.name] = tensor
    if last := _last(walk, tensor, units[layer].channels):
        units["last"] = last
        maps["last"] = last.output
    convolutions = [operator for unit in units.values() for operator in unit.operators]
    return _Trunk(units, [*convolutions, *additions], maps)


def _last(walk: Walk, tensor: int, channels: int) -> Unit | None:
    """Returns the last convolution of the network, after the blocks; None where a head follows."""
    from mbv2_jax.models.mobilenet_v2 import LAST_CHANNELS

    unit = walk.unit(tensor, ("CONV_2D",))
    if unit is None or unit.channels < LAST_CHANNELS or not unit.is_relu6:
        return None
    return unit if unit.kernel.shape[1:] == (1, 1, channels) else None


def _addition(walk: Walk, block: str, before: int, after: int) -> Operator:
    """Returns the operator that adds the input of a block to its output."""
    for operator in walk.readers(after):
        adds = operator.kind == "ADD" and set(operator.inputs) == {before, after}
        if adds and walk.activation(operator) == "linear":
            return operator
    raise walk.refusal(f"the input of {block} is not added to its output")


def _expected(walk: Walk, tensor: int, layer: str, channels: int) -> Unit:
    """Returns the convolution after a tensor, which has to be the one of a layer.

    Args:
      walk: the graph.
      tensor: the number of the layer's input.
      layer: our name, such as "layer2_0/expand".
      channels: of the input.
    """
    depthwise, linear = layer.endswith("/depthwise"), layer.endswith("/project")
    unit = walk.unit(tensor, ("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D",))
    if unit is None:
        found = walk.follow(tensor, None)
        follows = walk.name(found[0]) if found else "nothing"
        raise walk.refusal(f"where {layer} should be, there is {follows}")
    shape, side = unit.kernel.shape, 3 if depthwise or layer == "stem" else 1
    if shape != ((1, 3, 3, channels) if depthwise else (shape[0], side, side, channels)):
        raise walk.refusal(
            f"{layer} should be a {side}x{side} convolution of {channels} channels, and its "
            f"kernel is {shape}"
        )
    if not (unit.activation == "linear" if linear else unit.is_relu6):
        wanted = "none" if linear else "relu6"
        raise walk.refusal(f"the activation after {layer} is {unit.activation}, not {wanted}")
    return unit


def _folded(units: Mapping[str, Unit], epsilon: float) -> dict[str, np.ndarray]:
    """Returns the arrays of convolutions by the layout's names, with those of BatchNorm."""
    tensors: dict[str, np.ndarray] = {}
    for layer, unit in units.items():
        tensors |= {
            f"{layer}/kernel": unit.kernel,
            f"{layer}/norm/scale": np.ones_like(unit.bias),
            f"{layer}/norm/bias": unit.bias,
            f"{layer}/norm/mean": np.zeros_like(unit.bias),
            # With epsilon it is 1, in float32 exactly.
            f"{layer}/norm/var": np.full_like(unit.bias, 1 - epsilon),
        }
    return tensors


def _strides(walk: Walk, units: Mapping[str, Unit]) -> dict[str, Any]:
    """Returns the fields of the strides and dilations."""
    steps = [unit.step for layer, unit in units.items() if layer.endswith("/depthwise")]
    others = [unit for layer, unit in units.items() if not layer.endswith("/depthwise")]
    found = strides.fields(others[0].step.stride, steps)
    if found is None or any(unit.step != (1, 1) for unit in others[1:]):
        raise walk.refusal(
            "no network here has its strides and dilations: "
            + ", ".join(f"{step.stride} and {step.dilation}" for step in steps)
        )
    return found


def _padding(walk: Walk, units: Mapping[str, Unit]) -> dict[str, Any]:
    """Returns the padding, where the convolutions tell it."""
    found = {unit.padding: layer for layer, unit in units.items() if unit.padding}
    if len(found) > 1 or not found.keys() <= {"same", "torch"}:
        places = ", ".join(f"{padding} at {layer}" for padding, layer in found.items())
        raise walk.refusal(f"no network here pads as it does: {places}")
    return {"model.padding": next(iter(found))} if found else {}


def _after(walk: Walk, trunk: _Trunk, before: Sequence[Operator]) -> _Head:
    """Returns what follows the backbone.

    If it is neither a chain of dense layers nor the head of Mobile DeepLabv3 or SSDLite, the arrays
    have the names of their tensors.
    """
    known = {operator.place for operator in (*before, *trunk.operators)}
    rest = [op for op in _working(walk) if op.place not in known]

    def are_all(operators: Sequence[Operator]) -> bool:
        return {op.place for op in rest} <= {op.place for op in operators}

    chain, operators = _chain(walk, trunk.output)
    if are_all(operators):
        arrays: dict[str, np.ndarray] = {}
        for dense, unit in chain.items():
            kernel = unit.kernel.reshape(len(unit.kernel), -1)
            arrays |= {f"{dense.name}/kernel": kernel, f"{dense.name}/bias": unit.bias}
        return _Head(arrays, tuple(chain))
    deeplab = tflite_deeplab.find(walk, trunk.output)
    if deeplab is not None and are_all(deeplab.operators):
        return _segmenting(deeplab)
    ssdlite = tflite_ssdlite.find(walk, trunk.maps)
    if ssdlite is not None and are_all(ssdlite.operators):
        return _detecting(walk, trunk, ssdlite)
    kinds = listed(dict.fromkeys(operator.kind for operator in rest), 8, ", ")
    obstacle = f"a head of the operators {kinds}"
    return _Head(dict(_constants(walk, rest)), obstacles=(obstacle,))


def _segmenting(deeplab: tflite_deeplab.DeepLab) -> _Head:
    """Returns the head of Mobile DeepLabv3."""
    # Imported here, since it imports jax, which takes seconds.
    from mbv2_jax.models.deeplabv3 import EPSILON, LOGITS

    units = dict(deeplab.units)
    logits = units.pop(LOGITS)
    arrays = {f"{LOGITS}/kernel": logits.kernel, f"{LOGITS}/bias": logits.bias}
    return _Head(_folded(units, EPSILON) | arrays, stated=deeplab.stated, rates=deeplab.rates)


def _detecting(walk: Walk, trunk: _Trunk, ssdlite: tflite_ssdlite.SSDLite) -> _Head:
    """Returns the heads of SSDLite."""
    last = {
        name: unit
        for name, unit in ssdlite.units.items()
        if name.startswith(("class_logits", "box_codes"))
    }
    arrays: dict[str, np.ndarray] = {}
    for name, unit in last.items():
        arrays |= {f"{name}/kernel": unit.kernel, f"{name}/bias": unit.bias}
    others = {name: unit for name, unit in ssdlite.units.items() if name not in last}
    stated = ssdlite.stated | _padding(walk, {**trunk.units, **others})
    folded = _folded(others, _LAYOUT.backbone.bn_epsilon)
    return _Head(folded | arrays, stated=stated, guesses=ssdlite.guesses)


def _chain(walk: Walk, tensor: int) -> tuple[dict[Dense, Unit], list[Operator]]:
    """Returns the dense layers after the global pooling, and all the operators up to them."""
    operators = walk.follow(tensor, ("MEAN", "AVERAGE_POOL_2D"), QUANTIZING)
    if not operators or not pools_globally(walk.graph, operators[-1]):
        return {}, []
    units: list[Unit] = []
    activations: list[str] = []
    (tensor,) = operators[-1].outputs
    while unit := walk.unit(tensor, ("FULLY_CONNECTED", "CONV_2D"), _FLATTENING):
        if unit.kernel.size != unit.kernel.shape[0] * unit.kernel.shape[-1]:
            break  # not a 1x1 convolution
        operators += unit.operators
        units.append(unit)
        activations.append(unit.activation)
        tensor = unit.output
    while following := walk.follow(tensor, (*_FLATTENING, *_SCORES)):
        (operator,) = following
        if operator.kind in _SCORES:
            if activations[-1:] != ["linear"]:
                break  # not of logits
            activations[-1] = _SCORES[operator.kind]
        operators.append(operator)
        (tensor,) = operator.outputs
    names = [*(f"hidden{index}" for index in range(1, len(units))), "classifier"]
    layers = map(Dense, names, activations)
    return dict(zip(layers, units, strict=True)), operators


def _working(walk: Walk) -> Iterator[Operator]:
    """Yields the operators that compute with images, and not with constants or shapes alone."""
    graph = walk.graph
    results: set[int] = set(graph.inputs)
    for operator in graph.operators:
        if results.isdisjoint(operator.inputs):
            continue
        results.update(operator.outputs)
        types = {graph.tensors[out].dtype for out in operator.outputs}
        if not types <= {np.int32, np.int64}:
            yield operator


def _constants(walk: Walk, operators: Sequence[Operator]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the weights of operators by the names of their tensors."""
    seen: set[str] = set()
    for index in dict.fromkeys(index for operator in operators for index in operator.inputs):
        array = walk.graph.constant(index)
        if array is None or np.issubdtype(array.dtype, np.integer):
            continue
        name = walk.graph.tensors[index].name or f"tensor {index}"
        if name in seen:
            name = f"{name} (tensor {index})"
        seen.add(name)
        yield name, array


def _labels(path: pathlib.Path) -> tuple[str, ...]:
    """Returns the class names in the zip archive that may be appended to the file."""
    if not zipfile.is_zipfile(path):
        return ()
    with archive.open_archive(path) as found:
        texts = [name for name in found.names if name.endswith(".txt")]
        if len(texts) != 1:
            return ()
        lines = found.read(texts[0], _LONGEST_LABELS).decode("utf-8").splitlines()
    labels = tuple(line.strip() for line in lines if line.strip())
    return labels if all(label.isprintable() for label in labels) else ()
