"""JAX's operations as ONNX's, for the operations that the networks have.

A function takes the graph, the jaxpr's equation and the inputs, at least one of which is a tensor.
It returns the results, or None where the operation is used in a way that no network of this package
does.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx

from mbv2_jax.export.onnx.graph import CHANNELS_FIRST, Graph, Tensor, Value
from mbv2_jax.ops.resize import COMPOSITE

Result = Tensor | list[Tensor] | None


def _resize(graph: Graph, equation: Any, x: Tensor) -> Result:
    attributes = {name: leaves[0] for name, leaves, _ in equation.params["attributes"]}
    x = graph.ordered(x, CHANNELS_FIRST)
    shape = _aval(equation).shape
    scales = [_scale(old, new) for old, new in zip(x.shape[1:3], shape[1:3], strict=True)]
    scale = graph.constant(np.array([1, 1, *scales], np.float32))
    return graph.node(
        "Resize",
        [x.name, "", scale],
        shape,
        x.dtype,
        x.order,
        mode="linear",
        coordinate_transformation_mode=(
            "align_corners" if attributes["align_corners"] else "half_pixel"
        ),
    )


def _scale(old: int, new: int) -> np.float32:
    """Returns the least float32 scale that makes `new` pixels of `old`.

    ONNX rounds old * scale down. Its other way to name the result needs the number of images.
    """
    scale = np.float32(new / old)
    return scale if float(scale) * old >= new else np.nextafter(scale, np.float32(np.inf))


def _convolution(graph: Graph, equation: Any, x: Value, kernel: Value) -> Result:
    params = equation.params
    lhs, rhs, out = params["dimension_numbers"]
    pads = np.array(params["padding"])  # (2, 2), before and after each axis
    plain = set(params["lhs_dilation"]) == {1} and params["batch_group_count"] == 1
    if isinstance(kernel, Tensor) or not plain or len(lhs) != 4 or pads.min() < 0:
        return None
    assert isinstance(x, Tensor)
    return graph.node(
        "Conv",
        [graph.ordered(x, lhs).name, graph.constant(kernel.transpose(rhs))],
        _aval(equation).shape,
        x.dtype,
        out,
        kernel_shape=[kernel.shape[axis] for axis in rhs[2:]],
        strides=list(params["window_strides"]),
        pads=pads.T.ravel().tolist(),
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )


def _matrix_product(graph: Graph, equation: Any, x: Value, weights: Value) -> Result:
    (ours, theirs), batches = equation.params["dimension_numbers"]
    if isinstance(weights, Tensor) or (tuple(ours), batches) != ((1,), ((), ())):
        return None
    assert isinstance(x, Tensor)
    if (len(x.shape), weights.ndim) != (2, 2):
        return None
    matrix = weights if tuple(theirs) == (0,) else weights.T
    inputs = [graph.ordered(x).name, graph.constant(matrix)]
    return graph.node("Gemm", inputs, _aval(equation).shape, x.dtype)


def _add(graph: Graph, equation: Any, one: Value, other: Value) -> Result:
    x, bias = _tensor_first(one, other)
    node = graph.maker(x.name)
    if isinstance(bias, np.ndarray) and node.operator in ("Conv", "Gemm") and not node.inputs[2:]:
        channels = x.order[1]  # of the graph's second axis, for maps and for vectors
        spread = [size if axis == channels else 1 for axis, size in enumerate(x.shape)]
        if list(bias.shape) == spread:
            inputs = [*node.inputs, graph.constant(bias.ravel())]
            return graph.like(x, node.operator, inputs, **node.attributes)
    return _elementwise("Add")(graph, equation, one, other)


def _maximum(graph: Graph, equation: Any, one: Value, other: Value) -> Result:
    x, bound = _tensor_first(one, other)
    if isinstance(bound, Tensor) or bound.ndim:
        return _elementwise("Max")(graph, equation, one, other)
    if bound == -np.inf:
        return x
    if bound == 0:
        return graph.like(x, "Relu", [x.name])
    return graph.like(x, "Clip", [x.name, graph.constant(bound)])


def _minimum(graph: Graph, equation: Any, one: Value, other: Value) -> Result:
    x, bound = _tensor_first(one, other)
    if isinstance(bound, Tensor) or bound.ndim:
        return _elementwise("Min")(graph, equation, one, other)
    node = graph.maker(x.name)
    high = graph.constant(bound)
    if node.operator == "Relu":
        return graph.like(x, "Clip", [node.inputs[0], graph.constant(0 * bound), high])
    if node.operator == "Clip" and len(node.inputs) == 2:
        return graph.like(x, "Clip", [*node.inputs, high])
    return graph.like(x, "Clip", [x.name, "", high])


def _divide(graph: Graph, equation: Any, one: Value, other: Value) -> Result:
    if isinstance(one, Tensor):
        found = _mean(graph, one, other) or _softmax(graph, one, other)
        if found:
            return found
    return _elementwise("Div")(graph, equation, one, other)


def _mean(graph: Graph, x: Tensor, count: Value) -> Tensor | None:
    """Returns GlobalAveragePool for a sum over all pixels that is divided by their number."""
    flat = graph.behind(x.name, "Flatten")
    node = graph.maker(flat or x.name)
    if isinstance(count, Tensor) or count.ndim or node.operator != "Mul":
        return None
    factor = graph.constant_of(node.inputs[1])
    if factor is None or factor.ndim or factor != count:
        return None
    mean = node.inputs[0]
    return graph.like(x, "Flatten", [mean]) if flat else dataclasses.replace(x, name=mean)


def _softmax(graph: Graph, x: Tensor, total: Value) -> Tensor | None:
    """Returns Softmax for exp(x - max(x)) over its sum, both over the last axis."""
    if isinstance(total, np.ndarray) or graph.behind(total.name, "Reshape", "ReduceSum") != x.name:
        return None
    difference = graph.maker(graph.behind(x.name, "Exp"))
    if difference.operator != "Sub":
        return None
    logits, greatest = difference.inputs
    reduced = total.shape == (*x.shape[:-1], 1)
    if graph.behind(greatest, "Reshape", "ReduceMax") != logits or not reduced:
        return None
    return graph.node("Softmax", [logits], x.shape, x.dtype, axis=len(x.shape) - 1)


def _sum(graph: Graph, equation: Any, x: Tensor) -> Result:
    axes = equation.params["axes"]
    shape = _aval(equation).shape
    if len(x.shape) == 4 and tuple(axes) == (1, 2):
        count = x.dtype.type(x.shape[1] * x.shape[2])
        whole = (x.shape[0], 1, 1, x.shape[3])
        maps = graph.ordered(x, CHANNELS_FIRST).name
        mean = graph.node("GlobalAveragePool", [maps], whole, x.dtype, CHANNELS_FIRST)
        total = graph.like(mean, "Mul", [mean.name, graph.constant(count)])
        return graph.node("Flatten", [total.name], shape, x.dtype)
    inputs = [graph.ordered(x).name, graph.constant(np.array(axes, np.int64))]
    return graph.node("ReduceSum", inputs, shape, x.dtype, keepdims=0)


def _most(graph: Graph, equation: Any, x: Tensor) -> Result:
    axes, name = list(equation.params["axes"]), graph.ordered(x).name
    return graph.node("ReduceMax", [name], _aval(equation).shape, x.dtype, axes=axes, keepdims=0)


def _broadcast(graph: Graph, equation: Any, x: Tensor) -> Result:
    shape, axes = tuple(equation.params["shape"]), equation.params["broadcast_dimensions"]
    spread = [1] * len(shape)
    for axis, length in zip(axes, x.shape, strict=True):
        spread[axis] = length
    if len(shape) != len(x.shape):
        pooled = graph.behind(x.name, "Flatten")  # (N, C) of (N, C, 1, 1)
        if pooled and len(shape) == 4 and tuple(axes) == (0, 3):
            x = Tensor(pooled, tuple(spread), x.dtype, CHANNELS_FIRST)
        else:
            x = _reshaped(graph, x, spread)
    if shape == x.shape:
        return x
    wanted = [1 if shape[axis] == x.shape[axis] else shape[axis] for axis in x.order]
    size = graph.constant(np.array(wanted, np.int64))
    return graph.node("Expand", [x.name, size], shape, x.dtype, x.order)


def _reshape(graph: Graph, equation: Any, x: Tensor) -> Result:
    return _reshaped(graph, x, _aval(equation).shape)


def _reshaped(graph: Graph, x: Tensor, shape: Any) -> Tensor:
    if tuple(shape) == x.shape:
        return x
    kept = x.shape[:1] == tuple(shape[:1])  # 0 takes the length of the input's axis
    sizes = graph.constant(np.array([0, *shape[1:]] if kept else shape, np.int64))
    return graph.node("Reshape", [graph.ordered(x).name, sizes], shape, x.dtype)


def _transpose(graph: Graph, equation: Any, x: Tensor) -> Result:
    perm = list(equation.params["permutation"])
    order = tuple(perm.index(axis) for axis in x.order)  # no node: the axes have other numbers
    return Tensor(x.name, _aval(equation).shape, x.dtype, order)


def _concatenate(graph: Graph, equation: Any, *parts: Value) -> Result:
    if not all(isinstance(part, Tensor) for part in parts):
        return None
    first = parts[0]
    assert isinstance(first, Tensor)
    axis = first.order.index(equation.params["dimension"])
    names = [graph.operand(part, first.order) for part in parts]
    return graph.node("Concat", names, _aval(equation).shape, first.dtype, first.order, axis=axis)


def _slice(graph: Graph, equation: Any, x: Tensor) -> Result:
    params = equation.params
    strides = params["strides"] or [1] * len(x.shape)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    rows = [
        (start, limit, x.order.index(axis), stride)
        for axis, (start, limit, stride) in enumerate(bounds)
        if (start, limit, stride) != (0, x.shape[axis], 1)
    ]
    inputs = [graph.constant(np.array(column, np.int64)) for column in zip(*rows, strict=True)]
    return graph.node("Slice", [x.name, *inputs], _aval(equation).shape, x.dtype, x.order)


def _split(graph: Graph, equation: Any, x: Tensor) -> Result:
    sizes = graph.constant(np.array(equation.params["sizes"], np.int64))
    axis = x.order.index(equation.params["axis"])
    shapes = [variable.aval.shape for variable in equation.outvars]
    return graph.several("Split", [x.name, sizes], shapes, x.dtype, x.order, axis=axis)


def _cast(graph: Graph, equation: Any, x: Tensor) -> Result:
    dtype = np.dtype(equation.params["new_dtype"])
    if dtype == x.dtype:
        return x
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return graph.node("Cast", [x.name], x.shape, dtype, x.order, to=kind)


def _same(graph: Graph, equation: Any, x: Tensor) -> Result:
    del graph, equation
    return x


def _elementwise(operator: str) -> Callable[..., Tensor]:
    """Returns the function of an operation that treats each element alike."""

    def convert(graph: Graph, equation: Any, *inputs: Value) -> Tensor:
        x, aval = _tensor_first(*inputs)[0], _aval(equation)
        order = x.order
        names = [graph.operand(value, order) for value in inputs]
        return graph.node(operator, names, aval.shape, aval.dtype, order)

    return convert


def _tensor_first(*inputs: Value) -> tuple[Tensor, Value]:
    """Returns a tensor among the inputs of an operation, and its other input, if there is one."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    others = [value for value in inputs if value is not tensors[0]]
    return tensors[0], (others or tensors)[-1]


def _aval(equation: Any) -> Any:
    """Returns the shape and the dtype of an operation's only result."""
    return equation.outvars[0].aval


# By the names of JAX's primitives, and of composites.
OPERATIONS: Mapping[str, Callable[..., Result]] = {
    COMPOSITE: _resize,
    "add": _add,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "div": _divide,
    "dot_general": _matrix_product,
    "exp": _elementwise("Exp"),
    "logistic": _elementwise("Sigmoid"),
    "max": _maximum,
    "min": _minimum,
    "mul": _elementwise("Mul"),
    "reduce_max": _most,
    "reduce_sum": _sum,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "stop_gradient": _same,
    "sub": _elementwise("Sub"),
    "transpose": _transpose,
}
