"""The way through the graph of a .tflite file, from one convolution to the next."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mbv2_jax.errors import UserError

from . import strides
from .tflite_graph import BYTE, INT, Graph, Operator

QUANTIZING = ("QUANTIZE", "DEQUANTIZE")
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_BEFORE = (*QUANTIZING, "PAD", "SPACE_TO_BATCH_ND")

# The activation that is part of an operator: the number of the option, and its values.
_FUSED = {
    "ADD": 0,
    "SUB": 0,
    "MUL": 0,
    "DIV": 0,
    "FULLY_CONNECTED": 0,
    "CONV_2D": 3,
    "CONCATENATION": 1,
    "DEPTHWISE_CONV_2D": 4,
}
_ACTIVATIONS = {0: "linear", 1: "relu", 2: "relu_n1_to_1", 3: "relu6", 4: "tanh", 5: "sign_bit"}
# Activations that are operators of their own.
_OPERATORS = {
    "RELU": "relu",
    "RELU6": "relu6",
    "TANH": "tanh",
    "LOGISTIC": "sigmoid",
    "SOFTMAX": "softmax",
    "HARD_SWISH": "hard_swish",
}


class Unit(NamedTuple):
    """A convolution or a dense layer, with the operators that belong to it.

    Attributes:
      kernel: OHWI of a convolution, (1, H, W, C) of a depthwise one, (out, in) of a dense layer.
      bias: (out,); zeros where the file has none.
      step: its stride and dilation.
      padding: "same", "torch", "" where both are the same, or a description of another padding.
      activation: "linear", "relu6", ...
      clamped: whether its 8-bit results cannot leave the range of ReLU6.
      output: the number of the tensor after the activation.
      operators: all that belong to it.
    """

    kernel: np.ndarray
    bias: np.ndarray
    step: strides.Step
    padding: str
    activation: str
    clamped: bool
    output: int
    operators: tuple[Operator, ...]

    @property
    def channels(self) -> int:
        """The number of the results' channels."""
        return self.bias.size

    @property
    def is_relu6(self) -> bool:
        """Tells whether the activation is ReLU6, or equals it in 8 bits."""
        clamped = self.clamped and self.activation in ("linear", "relu")
        return clamped or self.activation == "relu6"


class Walk:
    """A graph, with the operators that read each tensor."""

    def __init__(self, graph: Graph):
        """Prepares the walk.

        Raises:
          ValueError: the file is damaged.
        """
        self.graph = graph
        self._readers: dict[int, list[Operator]] = {}
        for operator in graph.operators:
            for tensor in dict.fromkeys(operator.inputs):
                self._readers.setdefault(tensor, []).append(operator)
        self._depths = self._count_depths()

    def readers(self, tensor: int) -> list[Operator]:
        """Returns the operators that read a tensor."""
        return self._readers.get(tensor, [])

    def follow(
        self, tensor: int, kinds: Iterable[str] | None, through: Sequence[str] = ()
    ) -> list[Operator]:
        """Returns the operators from a tensor to the next one of some kinds; [] without one.

        Where the graph branches, the trunk is where the most convolutions follow.

        Args:
          tensor: the number of the tensor.
          kinds: of the last operator; None for any.
          through: the kinds of those before it.
        """
        passed: list[Operator] = []
        while True:
            wanted = None if kinds is None else (*kinds, *through)
            found = [op for op in self.readers(tensor) if wanted is None or op.kind in wanted]
            if not found:
                return []
            operator = max(found, key=lambda op: self._depths[op.place])
            passed.append(operator)
            if kinds is None or operator.kind in kinds:
                return passed
            (tensor,) = operator.outputs

    def unit(self, tensor: int, kinds: Sequence[str], through: Sequence[str] = ()) -> Unit | None:
        """Returns the next convolution or dense layer after a tensor.

        Args:
          tensor: the number of the tensor.
          kinds: of the layer.
          through: kinds of operators that may be before it, beside those of padding.

        Raises:
          UserError: its weights or its padding are not constants.
        """
        operators = self.follow(tensor, kinds, (*_BEFORE, *through))
        return self._unit(operators) if operators else None

    def branches(self, tensor: int, kinds: Sequence[str]) -> list[Unit]:
        """Returns the convolutions that read one tensor, each as `unit` does.

        Args:
          tensor: the number of the tensor.
          kinds: of the layers.
        """
        found = []
        for operator in self.readers(tensor):
            operators = [operator]
            if operator.kind in _BEFORE:
                following = self.follow(operator.outputs[0], kinds, _BEFORE)
                operators = [operator, *following] if following else []
            if operators and operators[-1].kind in kinds:
                found.append(self._unit(operators))
        return found

    def _unit(self, operators: Sequence[Operator]) -> Unit:
        """Returns the layer that the last of some operators is, with the others before it."""
        layer = operators[-1]
        kernel = self.graph.constant(layer.inputs[1])
        if kernel is None or kernel.ndim not in (2, 4):
            raise self.refusal(f"the weights of {self.name(layer)} are not a constant array")
        given = self.graph.constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
        out = kernel.shape[-1] if layer.kind == "DEPTHWISE_CONV_2D" else kernel.shape[0]
        bias = np.zeros(out, np.float32) if given is None else given
        output, after, activation = self._activation(layer, operators)
        limits = self.graph.tensors[output].range
        clamped = limits is not None and limits[0] >= 0 and limits[1] <= 6.1  # rounded up
        step = self._step(layer, operators)
        padding = self._padding(layer, operators, step, kernel)
        return Unit(kernel, bias, step, padding, activation, clamped, output, (*operators, *after))

    def refusal(self, reason: str) -> UserError:
        """Returns the error for a graph of another network."""
        return UserError(f"{self.graph.path} is not a MobileNetV2 that can be read here: {reason}")

    def name(self, operator: Operator) -> str:
        """Returns an operator's kind and the name of its result, for messages."""
        return f"{operator.kind} {ascii(self.graph.tensors[operator.outputs[0]].name)[1:-1]}"

    def activation(self, operator: Operator) -> str:
        """Returns the activation that is part of an operator."""
        number = operator.options.number(_FUSED[operator.kind], BYTE)
        return _ACTIVATIONS.get(number, "unknown")

    def _activation(
        self, layer: Operator, operators: Sequence[Operator]
    ) -> tuple[int, list[Operator], str]:
        """Returns the tensor after a layer's activation, the operators up to it, and its name."""
        (output,) = layer.outputs
        after: list[Operator] = []
        if any(op.kind == "SPACE_TO_BATCH_ND" for op in operators):
            after = self.follow(output, ("BATCH_TO_SPACE_ND",))
            if not after:
                raise self.refusal(f"{self.name(layer)} lacks its BATCH_TO_SPACE_ND")
            (output,) = after[-1].outputs
        activation = self.activation(layer)
        following = self.readers(output)
        if activation == "linear" and len(following) == 1 and following[0].kind in _OPERATORS:
            activation = _OPERATORS[following[0].kind]
            after = [*after, following[0]]
            (output,) = following[0].outputs
        return output, after, activation

    def _step(self, layer: Operator, operators: Sequence[Operator]) -> strides.Step:
        """Returns a layer's stride and dilation; 0 for those that differ between the axes."""
        if layer.kind == "FULLY_CONNECTED":
            return strides.Step(1, 1)
        first = 4 if layer.kind == "CONV_2D" else 5
        stride = {layer.options.number(field, INT) for field in (1, 2)}
        dilation = {layer.options.number(field, INT, 1) for field in (first, first + 1)}
        for operator in operators:
            if operator.kind == "SPACE_TO_BATCH_ND":
                dilation = set(self._integers(operator, 1).tolist())
        return strides.Step(
            *(value.pop() if len(value) == 1 else 0 for value in (stride, dilation))
        )

    def _padding(
        self, layer: Operator, operators: Sequence[Operator], step: strides.Step, kernel: np.ndarray
    ) -> str:
        """Returns a layer's padding as in `Unit`."""
        pads = np.zeros((2, 2), int)  # height, width; before, after
        for operator in operators:
            if operator.kind == "PAD":
                added = self._integers(operator, 1).reshape(4, 2)
                pads += added[1:3]
            if operator.kind == "SPACE_TO_BATCH_ND":
                added = self._integers(operator, 2).reshape(2, 2)
                # What is added after the map may also fill it up to whole blocks.
                pads += np.stack([added[:, 0], np.minimum(added[:, 0], added[:, 1])], 1)
        if layer.kind == "FULLY_CONNECTED" or kernel.shape[1] == 1:
            return "" if not pads.any() else f"padding {pads.tolist()} before a 1x1"
        side = self.graph.tensors[operators[0].inputs[0]].shape[1]
        odd = side % 2 == 1 and side > 1  # 1 may also stand for a side that the file leaves open
        same = layer.options.number(0, BYTE) == 0
        if same and not pads.any():
            return "" if step.stride == 1 else "same"
        if not same and (pads == step.dilation).all():
            return "" if step.stride == 1 or odd else "torch"
        if not same and step.stride == 2 and (pads == [0, 1]).all() and side % 2 == 0:
            return "same"
        return f"padding {pads.tolist()} and stride {step.stride}"

    def _integers(self, operator: Operator, position: int) -> np.ndarray:
        """Returns a constant input of integers, such as the sizes of a padding."""
        found = self.graph.constant(operator.inputs[position])
        if found is None or not np.issubdtype(found.dtype, np.integer):
            raise self.refusal(f"the sizes of {self.name(operator)} are not constant integers")
        return found

    def _count_depths(self) -> list[int]:
        """Returns for each operator the convolutions on the longest way from it to an end."""
        depths = [0] * len(self.graph.operators)
        after: dict[int, int] = {}  # the same for each tensor
        for operator in reversed(self.graph.operators):
            for out in operator.outputs:
                if any(reader.place <= operator.place for reader in self.readers(out)[:1]):
                    raise ValueError("its operators are not in the order of their execution")
            deepest = max((after.get(out, 0) for out in operator.outputs), default=0)
            depth = depths[operator.place] = deepest + (operator.kind in CONVOLUTIONS)
            for tensor in operator.inputs:
                after[tensor] = max(after.get(tensor, 0), depth)
        return depths


def pools_globally(graph: Graph, operator: Operator) -> bool:
    """Returns whether an operator averages a whole map: (1, H, W, C) -> C numbers."""
    before = graph.tensors[operator.inputs[0]].shape
    after = graph.tensors[operator.outputs[0]].shape
    if len(before) != 4 or math.prod(after) != before[0] * before[3]:
        return False
    if operator.kind == "AVERAGE_POOL_2D":
        width, height = (operator.options.number(field, INT) for field in (3, 4))
        return height >= before[1] and width >= before[2]
    return operator.kind == "MEAN"
