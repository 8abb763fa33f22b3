"""ONNX's operations as those of MIL, Core ML's own language, as far as `export.onnx` writes them.

A function takes the values of a node's inputs, variables of MIL or numpy arrays, and the node's
attributes. It returns the result, or a list of results.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from coremltools.converters.mil import Builder

Value = Any  # a variable of MIL, or a numpy array


def _convolution(
    x: Value,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: list[int],
    group: int,
    kernel_shape: list[int],
) -> Value:
    del kernel_shape
    top, left, bottom, right = pads
    options = {} if bias is None else {"bias": bias}
    return Builder.conv(
        x=x,
        weight=weight,
        strides=strides,
        pad_type="custom",
        pad=[top, bottom, left, right],
        dilations=dilations,
        groups=group,
        **options,
    )


def _gemm(x: Value, weights: np.ndarray, bias: np.ndarray | None = None) -> Value:
    options = {} if bias is None else {"bias": bias}
    return Builder.linear(x=x, weight=np.ascontiguousarray(weights.T), **options)


def _clip(x: Value, low: np.ndarray | None = None, high: np.ndarray | None = None) -> Value:
    if low is not None and high is not None and (float(low), float(high)) == (0, 6):
        return Builder.relu6(x=x)
    if low is not None:
        x = Builder.maximum(x=x, y=low)
    return x if high is None else Builder.minimum(x=x, y=high)


def _pool(x: Value) -> Value:
    return Builder.reduce_mean(x=x, axes=[2, 3], keep_dims=True)


def _sum(x: Value, axes: np.ndarray, *, keepdims: int) -> Value:
    return Builder.reduce_sum(x=x, axes=axes.astype(np.int32), keep_dims=bool(keepdims))


def _most(x: Value, *, axes: list[int], keepdims: int) -> Value:
    return Builder.reduce_max(x=x, axes=axes, keep_dims=bool(keepdims))


def _flatten(x: Value) -> Value:
    return Builder.reshape(x=x, shape=[x.shape[0], -1])


def _cast(x: Value, *, to: int) -> Value:
    if to != onnx.TensorProto.FLOAT:  # of pixels, which Core ML hands over as floats
        raise ValueError("only casts to float32 are known")
    return x


def _resize(
    x: Value, roi: None, scales: np.ndarray, *, mode: str, coordinate_transformation_mode: str
) -> Value:
    del roi, mode  # "linear"
    height, width = (
        int(np.floor(side * scale)) for side, scale in zip(x.shape[2:], scales[2:], strict=True)
    )
    modes = {"align_corners": "STRICT_ALIGN_CORNERS", "half_pixel": "UNALIGN_CORNERS"}
    return Builder.resize_bilinear(
        x=x,
        target_size_height=height,
        target_size_width=width,
        sampling_mode=modes[coordinate_transformation_mode],
    )


def _slice(
    x: Value, starts: np.ndarray, ends: np.ndarray, axes: np.ndarray, steps: np.ndarray
) -> Value:
    begin, end, stride = [0] * len(x.shape), list(x.shape), [1] * len(x.shape)
    for start, limit, axis, step in zip(starts, ends, axes, steps, strict=True):
        begin[axis], end[axis], stride[axis] = int(start), int(limit), int(step)
    return Builder.slice_by_index(x=x, begin=begin, end=end, stride=stride)


def _split(x: Value, sizes: np.ndarray, *, axis: int) -> Value:
    return Builder.split(x=x, split_sizes=sizes.astype(np.int32), axis=axis)


def _expand(x: Value, sizes: np.ndarray) -> Value:
    sides = zip(x.shape, sizes, strict=True)
    return Builder.tile(x=x, reps=[int(size) if side == 1 else 1 for side, size in sides])


def _reshape(x: Value, sizes: np.ndarray) -> Value:
    shape = [x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(sizes)]
    return Builder.reshape(x=x, shape=shape)


def _binary(operation: Callable[..., Value]) -> Callable[..., Value]:
    return lambda x, y: operation(x=x, y=y)


def _unary(operation: Callable[..., Value]) -> Callable[..., Value]:
    return lambda x: operation(x=x)


OPERATIONS: Mapping[str, Callable[..., Value]] = {
    "Add": _binary(Builder.add),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *parts, axis: Builder.concat(values=parts, axis=axis),
    "Conv": _convolution,
    "Div": _binary(Builder.real_div),
    "Exp": _unary(Builder.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _pool,
    "Identity": _unary(Builder.identity),
    "Max": _binary(Builder.maximum),
    "Min": _binary(Builder.minimum),
    "Mul": _binary(Builder.mul),
    "ReduceMax": _most,
    "ReduceSum": _sum,
    "Relu": _unary(Builder.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": _unary(Builder.sigmoid),
    "Slice": _slice,
    "Softmax": lambda x, axis: Builder.softmax(x=x, axis=axis),
    "Split": _split,
    "Sub": _binary(Builder.sub),
    "Transpose": lambda x, perm: Builder.transpose(x=x, perm=perm),
}
