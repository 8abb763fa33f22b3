"""Core ML's programs on any machine: MIL's operators, by torch's and numpy's.

What each operator computes is in Apple's reference of MIL, and not taken from `export/coreml`.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.frontend.milproto.load import load
from torch.nn import functional


def run(package: pathlib.Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the results of a package's operators by name, for images (N, 3, H, W) of floats."""
    model = ct.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, file_weights_dir=model.weights_dir)
    values: dict[str, Any] = {"images": torch.tensor(images, dtype=torch.float32)}
    for operation in program.functions["main"].operations:
        if operation.op_type == "const":
            values[operation.outputs[0].name] = operation.outputs[0].val
        elif operation.op_type != "classify":
            inputs = {name: _read(values, given) for name, given in operation.inputs.items()}
            results = OPERATORS[operation.op_type](**inputs)
            results = results if isinstance(results, (list, tuple)) else [results]
            names = [output.name for output in operation.outputs]
            values |= dict(zip(names, results, strict=True))
    return {name: value.numpy() for name, value in values.items() if torch.is_tensor(value)}


def _read(values: Mapping[str, Any], given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return [values[part.name] for part in given]
    return values[given.name]


def _tensor(value: Any) -> torch.Tensor:
    return value if torch.is_tensor(value) else torch.as_tensor(np.asarray(value))


def _conv(
    x: Any,
    weight: Any,
    strides: Any,
    pad: Any,
    dilations: Any,
    groups: Any,
    bias: Any = None,
    pad_type: str = "custom",
) -> torch.Tensor:
    assert pad_type == "custom"
    top, bottom, left, right = (int(side) for side in pad)
    return functional.conv2d(
        functional.pad(x, (left, right, top, bottom)),
        _tensor(weight),
        None if bias is None else _tensor(bias),
        tuple(map(int, strides)),
        0,
        tuple(map(int, dilations)),
        int(groups),
    )


def _resize(
    x: Any, target_size_height: int, target_size_width: int, sampling_mode: str
) -> torch.Tensor:
    corners = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}[sampling_mode]
    size = (int(target_size_height), int(target_size_width))
    return functional.interpolate(x, size, mode="bilinear", align_corners=corners)


def _slice(x: Any, begin: Any, end: Any, stride: Any, **masks: Any) -> torch.Tensor:
    assert not any(np.any(mask) for mask in masks.values())
    return x[tuple(slice(*map(int, bounds)) for bounds in zip(begin, end, stride, strict=True))]


def _cast(x: Any, dtype: str) -> torch.Tensor:
    return x.to({"fp16": torch.float16, "fp32": torch.float32}[dtype])


def _of_two(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, y: function(_tensor(x), _tensor(y))


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "add": _of_two(torch.add),
    "cast": _cast,
    "concat": lambda values, axis, interleave=False: torch.cat(values, int(axis)),
    "conv": _conv,
    "exp": lambda x: x.exp(),
    "identity": lambda x: x,
    "linear": lambda x, weight, bias: functional.linear(x, _tensor(weight), _tensor(bias)),
    "maximum": _of_two(torch.maximum),
    "minimum": _of_two(torch.minimum),
    "mul": _of_two(torch.mul),
    "real_div": _of_two(torch.div),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(tuple(map(int, axes)), bool(keep_dims)),
    "relu": lambda x: x.relu(),
    "relu6": lambda x: functional.relu6(x),
    "reshape": lambda x, shape: x.reshape(tuple(map(int, shape))),
    "resize_bilinear": _resize,
    "sigmoid": lambda x: x.sigmoid(),
    "slice_by_index": _slice,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "split": lambda x, split_sizes, axis: x.split(tuple(map(int, split_sizes)), int(axis)),
    "sub": _of_two(torch.sub),
    "tile": lambda x, reps: x.repeat(tuple(map(int, reps))),
    "transpose": lambda x, perm: x.permute(tuple(map(int, perm))),
}
