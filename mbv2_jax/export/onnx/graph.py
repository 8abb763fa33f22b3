"""An ONNX graph in the making: nodes, constants, and tensors with their layouts.

A tensor's axes have an order of their own, so that maps are (N, C, H, W) from the first convolution
on, as ONNX wants them, while the program has (N, H, W, C): a transposition is a node only where an
operation needs the program's own order.

Nodes are never changed. An operation that is fused with the one before it, such as a bias with a
convolution, becomes a new node, and those that no output needs are left out in the end.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx

CHANNELS_FIRST = (0, 3, 1, 2)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value that depends on the images.

    Attributes:
      name: in the graph.
      shape, dtype: as the program has them.
      order: axis i of the graph's tensor is axis order[i] of the program's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...]


# Of a program: arrays do not depend on the images.
Value: TypeAlias = Tensor | np.ndarray


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
      operator: its name in ONNX, such as "Conv".
      inputs, outputs: names; "" for an input that is left out.
      attributes: by name.
      scope: the layer that it belongs to, such as "layer4_1/depthwise"; "" for none.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    scope: str


class Graph:
    """A graph that grows.

    Attributes:
      images: the input.
      batch: the number of images that the program was traced for.
      scope: of the nodes that come next.
    """

    def __init__(self, images: Tensor, batch: int | str):
        """Starts a graph.

        Args:
          images: the input, with as many images as the program was traced for.
          batch: that number, or the name of a number that is open, such as "N".
        """
        self.images, self.batch, self.scope = images, images.shape[0], ""
        self._first = batch
        self._outputs: dict[str, Tensor] = {}
        self._information = [self._info(images, images.name, batch)]  # input, then outputs
        self._nodes: list[Node] = []
        self._makers: dict[str, Node] = {}
        self._constants: dict[str, np.ndarray] = {}
        self._names: dict[Any, str] = {}  # of constants, by their content

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        dtype: Any,
        order: Sequence[int] | None = None,
        **attributes: Any,
    ) -> Tensor:
        """Adds an operation with one result; without an `order`, it has the program's."""
        (result,) = self.several(operator, inputs, [shape], dtype, order, **attributes)
        return result

    def several(
        self,
        operator: str,
        inputs: Sequence[str],
        shapes: Sequence[Sequence[int]],
        dtype: Any,
        order: Sequence[int] | None = None,
        **attributes: Any,
    ) -> list[Tensor]:
        """Adds an operation with a result of each shape."""
        number = len(self._nodes)
        results = [
            Tensor(
                f"{number}:{i}",
                tuple(shape),
                np.dtype(dtype),
                tuple(range(len(shape)) if order is None else order),
            )
            for i, shape in enumerate(shapes)
        ]
        names = tuple(result.name for result in results)
        node = Node(operator, tuple(inputs), names, attributes, self.scope)
        self._nodes.append(node)
        self._makers.update(dict.fromkeys(names, node))
        return results

    def like(self, x: Tensor, operator: str, inputs: Sequence[str], **attributes: Any) -> Tensor:
        """Adds an operation whose result has the shape, the dtype and the order of `x`."""
        return self.node(operator, inputs, x.shape, x.dtype, x.order, **attributes)

    def constant(self, array: Any) -> str:
        """Returns the name of a constant; equal ones are in the file once."""
        array = np.asarray(array)
        key = array.dtype, array.shape, array.tobytes()
        name = self._names.setdefault(key, f"constant_{len(self._names)}")
        self._constants[name] = array
        return name

    def constant_of(self, name: str) -> np.ndarray | None:
        """Returns a constant by its name; None if it is none."""
        return self._constants.get(name)

    def maker(self, name: str) -> Node:
        """Returns the operation that makes a tensor; for others one with the operator ""."""
        return self._makers.get(name, Node("", (), (), {}, ""))

    def behind(self, name: str, *operators: str) -> str:
        """Returns the first input of the chain of operators that makes a tensor, the last first.

        It is "" where other operators make the tensor.
        """
        for operator in operators:
            node = self.maker(name)
            if node.operator != operator:
                return ""
            name = node.inputs[0]
        return name

    def ordered(self, x: Tensor, order: Sequence[int] | None = None) -> Tensor:
        """Returns a tensor with another order of axes, or with the program's."""
        axes = tuple(range(len(x.shape)) if order is None else order)
        if x.order == axes:
            return x
        perm = [x.order.index(axis) for axis in axes]
        return self.node("Transpose", [x.name], x.shape, x.dtype, axes, perm=perm)

    def operand(self, value: Value, order: Sequence[int]) -> str:
        """Returns the name of an operand of an elementwise operation whose result has `order`."""
        if isinstance(value, Tensor):
            return self.ordered(value, order).name
        if value.ndim == 0:
            return self.constant(value)
        if value.shape[0] == self.batch and (value == value[:1]).all():
            value = value[:1]  # it is the same for each image: let the runtime broadcast it
        return self.constant(value.transpose(order))

    def output(self, name: str, value: Value, first: str | None = None) -> None:
        """Adds an output.

        Args:
          name: of the output.
          value: it.
          first: the name of its first axis, where its length depends on the images' content.
        """
        if isinstance(value, Tensor):
            x = self.ordered(value)
        else:
            x = Tensor(self.constant(value), value.shape, value.dtype, tuple(range(value.ndim)))
        taken = [other.name for other in self._outputs.values()]
        if not self.maker(x.name).operator or x.name in taken:
            x = self.like(x, "Identity", [x.name])
        self._outputs[name] = x
        by_image = x.shape[:1] == (self.batch,)
        self._information.append(self._info(x, name, first or (self._first if by_image else None)))

    def result(self, name: str) -> Tensor:
        """Returns an output by its name."""
        return self._outputs[name]

    def proto(self) -> onnx.GraphProto:
        """Returns the graph, without the operations that no output needs."""
        nodes = self._needed()
        names = self._public_names(nodes)
        protos = [
            onnx.helper.make_node(
                node.operator,
                [names[name] if name else "" for name in node.inputs],
                [names[name] for name in node.outputs],
                names[node.outputs[0]],
                **node.attributes,
            )
            for node in nodes
        ]
        constants = [
            onnx.numpy_helper.from_array(np.asarray(array, order="C"), names[name])
            for name, array in self._constants.items()
            if name in names
        ]
        images, *outputs = self._information
        return onnx.helper.make_graph(protos, "mbv2_jax", [images], outputs, constants)

    def _needed(self) -> list[Node]:
        """Returns the operations on which an output depends, in their order."""
        needed = {x.name for x in self._outputs.values()}
        nodes = []
        for node in reversed(self._nodes):
            if needed.intersection(node.outputs):
                needed.update(node.inputs)
                nodes.append(node)
        return nodes[::-1]

    def _public_names(self, nodes: Sequence[Node]) -> dict[str, str]:
        """Returns the names of tensors and constants in the file: of the layers that make them."""
        names = {self.images.name: self.images.name}
        names |= {x.name: name for name, x in self._outputs.items()}
        counts: Counter[str] = Counter()
        for node in nodes:
            base = f"{node.scope}/{node.operator}" if node.scope else node.operator
            for name in node.outputs:
                counts[base] += 1
                count = f"_{counts[base]}" if counts[base] > 1 else ""
                names.setdefault(name, base + count)
            for kind, name in zip(("", "weight", "bias"), node.inputs, strict=False):
                if kind and node.operator in ("Conv", "Gemm") and name in self._constants:
                    names.setdefault(name, f"{names[node.outputs[0]]}/{kind}")
            for name in node.inputs:
                names.setdefault(name, name)
        return names

    @staticmethod
    def _info(x: Tensor, name: str, first: int | str | None) -> onnx.ValueInfoProto:
        """Returns a declaration of a tensor; `first` replaces the length of its first axis."""
        shape: list[int | str] = [x.shape[axis] for axis in x.order]
        if first is not None:
            shape[0] = first
        return onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), shape
        )
