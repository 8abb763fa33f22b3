"""The graph in a .tflite file: tensors, operators, and constants as numpy arrays.

A .tflite file is a flatbuffer: tables whose fields are numbered. The numbers here are those of
tensorflow/lite/schema/schema.fbs. Nothing in a flatbuffer keeps its vectors from being the same
bytes many times over, so that what is read is counted.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table

from mbv2_jax.errors import UserError, listed

BYTE, INT, UINT = number_types.Int8Flags, number_types.Int32Flags, number_types.Uint32Flags

_KINDS = {
    0: "ADD",
    1: "AVERAGE_POOL_2D",
    2: "CONCATENATION",
    3: "CONV_2D",
    4: "DEPTHWISE_CONV_2D",
    6: "DEQUANTIZE",
    9: "FULLY_CONNECTED",
    11: "L2_NORMALIZATION",
    14: "LOGISTIC",
    17: "MAX_POOL_2D",
    18: "MUL",
    19: "RELU",
    21: "RELU6",
    22: "RESHAPE",
    23: "RESIZE_BILINEAR",
    25: "SOFTMAX",
    28: "TANH",
    32: "CUSTOM",
    34: "PAD",
    37: "BATCH_TO_SPACE_ND",
    38: "SPACE_TO_BATCH_ND",
    39: "TRANSPOSE",
    40: "MEAN",
    41: "SUB",
    42: "DIV",
    43: "SQUEEZE",
    45: "STRIDED_SLICE",
    53: "CAST",
    56: "ARG_MAX",
    60: "PADV2",
    77: "SHAPE",
    83: "PACK",
    97: "RESIZE_NEAREST_NEIGHBOR",
    114: "QUANTIZE",
    117: "HARD_SWISH",
}
_TYPES: dict[int, Any] = {
    0: np.float32,
    1: np.float16,
    2: np.int32,
    3: np.uint8,
    4: np.int64,
    7: np.int16,
    9: np.int8,
    10: np.float64,
    18: ml_dtypes.bfloat16,
}

_MOST = 5000  # tables of a kind; MobileNetV2 has about 70 operators, and 200 tensors
_LONGEST = 1000  # characters of a name
_PLAIN = 64 << 20  # bytes of arrays, beside 4 for each of the file (8-bit weights as float32)


class Fields:
    """A table of a flatbuffer, whose fields are read by their numbers."""

    def __init__(self, table: Table):
        self._table = table

    def number(self, field: int, flags: Any, default: int = 0) -> int:
        """Returns a number; the default where it is not there."""
        offset = self._table.Offset(4 + 2 * field)
        return self._table.Get(flags, self._table.Pos + offset) if offset else default

    def numbers(self, field: int, flags: Any) -> np.ndarray:
        """Returns a vector of numbers, a view of the file; an empty one where it is not there."""
        offset = self._table.Offset(4 + 2 * field)
        if not offset:
            return np.zeros(0, number_types.to_numpy_type(flags))
        return self._table.GetVectorAsNumpy(flags, offset)

    def table(self, field: int) -> "Fields":
        """Returns a table; an empty one where it is not there."""
        offset = self._table.Offset(4 + 2 * field)
        if not offset:
            return _EMPTY
        return Fields(Table(self._table.Bytes, self._table.Indirect(self._table.Pos + offset)))

    def tables(self, field: int) -> "list[Fields]":
        """Returns a vector of tables; [] where it is not there.

        Raises:
          ValueError: there are too many for any such network.
        """
        offset = self._table.Offset(4 + 2 * field)
        if not offset:
            return []
        count, start = self._table.VectorLen(offset), self._table.Vector(offset)
        if count > _MOST:
            raise ValueError(f"a list of {count:,} parts, and {_MOST:,} are more than plausible")
        places = (self._table.Indirect(start + 4 * index) for index in range(count))
        return [Fields(Table(self._table.Bytes, place)) for place in places]

    def text(self, field: int) -> str:
        """Returns a string, cut off where it is too long for a name; "" where it is not there."""
        offset = self._table.Offset(4 + 2 * field)
        if not offset:
            return ""
        start, length = self._table.Vector(offset), self._table.VectorLen(offset)
        content = bytes(self._table.Bytes[start : start + min(length, _LONGEST)])
        return content.decode("utf-8", "replace")


# A table (at 4) whose vtable (at 0) has no fields.
_EMPTY = Fields(Table(bytes([4, 0, 4, 0, 4, 0, 0, 0]), 4))


class Tensor:
    """A tensor of a graph: an input, a result, or a constant.

    Attributes:
      name: it may be empty, or that of several tensors.
      shape: its sizes.
      dtype: a numpy type, or None for another one.
      buffer: the number of the buffer that holds a constant.
      scale, zero_point: of its 8-bit numbers: real = scale * (number - zero_point); [] for none.
      axis: the axis of several scales.
    """

    def __init__(self, fields: Fields):
        self.name = fields.text(3)
        self.shape = tuple(fields.numbers(0, INT)[:8].tolist())
        self.dtype = _TYPES.get(fields.number(1, BYTE))
        self.buffer = fields.number(2, UINT)
        quantization = fields.table(4)
        self.scale = quantization.numbers(2, number_types.Float32Flags)
        self.zero_point = quantization.numbers(3, number_types.Int64Flags)
        self.axis = quantization.number(6, INT)

    @functools.cached_property
    def range(self) -> tuple[float, float] | None:
        """The least and the greatest number of a tensor of one scale; None of another tensor."""
        if self.dtype not in (np.uint8, np.int8, np.int16) or len(self.scale) != 1:
            return None
        scale, zero_point = float(self.scale[0]), int(self.zero_point[:1].sum())
        limits = np.iinfo(self.dtype)
        return scale * (limits.min - zero_point), scale * (limits.max - zero_point)


class Operator(NamedTuple):
    """An operator of a graph.

    Attributes:
      place: its number in the order of execution.
      kind: its name in TFLite, such as "CONV_2D".
      inputs, outputs: numbers of tensors; -1 stands for an input that is left out.
      options: its table of options.
      custom: the name of an operator of no kind of TFLite's own, whose kind is "CUSTOM".
      custom_options: its options, a FlexBuffer.
    """

    place: int
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Fields
    custom: str
    custom_options: bytes


class Graph:
    """The graph in a .tflite file.

    Attributes:
      path: the file.
      tensors, operators: in the file's order, which is that of execution.
      inputs: numbers of tensors.
    """

    def __init__(self, path: pathlib.Path, content: bytes):
        """Reads the tables of a file.

        Raises:
          UserError: the file holds several graphs.
          ValueError, struct.error, TypeError, IndexError: the file is damaged.
        """
        self.path = path
        root = Fields(Table(content, int.from_bytes(content[:4], "little")))
        graphs = root.tables(2)
        if len(graphs) != 1:
            raise UserError(f"{path} holds {len(graphs)} graphs; one can be read, of the network")
        (graph,) = graphs
        self._content = content
        self._buffers = root.tables(4)
        self._left = _PLAIN + 4 * len(content)
        self.tensors = [Tensor(fields) for fields in graph.tables(0)]
        self.inputs = tuple(graph.numbers(1, INT)[:_MOST].tolist())
        codes = root.tables(1)
        kinds, names = [_kind(code) for code in codes], [code.text(1) for code in codes]
        self.operators = [
            Operator(
                index,
                kinds[fields.number(0, UINT)],
                tuple(fields.numbers(1, INT)[:100].tolist()),
                tuple(fields.numbers(2, INT)[:100].tolist()),
                fields.table(4),
                names[fields.number(0, UINT)],
                fields.numbers(5, number_types.Uint8Flags)[:_LONGEST].tobytes(),
            )
            for index, fields in enumerate(graph.tables(3))
        ]
        self._producers = {out: op for op in self.operators for out in op.outputs}
        if len(self._producers) < sum(len(op.outputs) for op in self.operators):
            raise ValueError("two of its operators write one tensor")

    def constant(self, index: int) -> np.ndarray | None:
        """Returns a constant; float32 for floats and for scaled integers, also behind DEQUANTIZE.

        Returns None where the tensor is not a constant.

        Raises:
          UserError: its numbers are of a type that is not read here.
          ValueError: it does not fit its buffer.
        """
        while index in self._producers and self._producers[index].kind == "DEQUANTIZE":
            index = self._producers[index].inputs[0]
        if index < 0:
            return None
        tensor = self.tensors[index]
        content = self._bytes(self._buffers[tensor.buffer])
        if not len(content):
            return None
        if tensor.dtype is None:
            raise UserError(
                f"{self.path} has numbers of a type that cannot be read here, in "
                f"{listed([tensor.name])}: 32-, 16- and 8-bit ones can"
            )
        numbers = content.view(np.dtype(tensor.dtype))
        self._left -= 4 * numbers.size
        if self._left < 0:
            raise ValueError("its tensors have more numbers than the file can hold")
        return _real(numbers.reshape(tensor.shape), tensor)

    def _bytes(self, buffer: Fields) -> np.ndarray:
        """Returns the bytes of a buffer, which may be behind all tables; [] where there are none.

        Raises:
          ValueError: they end beyond the file.
        """
        offset, size = (buffer.number(field, number_types.Uint64Flags) for field in (1, 2))
        if offset > 1:  # 1 says that the size is not known yet
            return np.frombuffer(self._content, np.uint8, size, offset)
        return buffer.numbers(0, number_types.Uint8Flags)


def _kind(code: Fields) -> str:
    """Returns the name of an operator's kind; newer files have its number in field 3."""
    number = max(code.number(0, BYTE), code.number(3, INT))
    return _KINDS.get(number, f"operator {number}")


def _real(numbers: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Returns the real numbers for which a constant's integers stand; float32."""
    if not len(tensor.scale):
        floating = not np.issubdtype(numbers.dtype, np.integer)
        return numbers.astype(np.float32) if floating else numbers
    along = [1] * numbers.ndim
    if len(tensor.scale) > 1:
        along[tensor.axis] = len(tensor.scale)
    real = numbers.astype(np.float32)
    if len(tensor.zero_point):
        real -= tensor.zero_point.astype(np.float32).reshape(_per(tensor.zero_point, along))
    with np.errstate(all="ignore"):  # whatever is not finite is refused in the end
        real *= tensor.scale.reshape(along)
    return real


def _per(values: np.ndarray, along: list[int]) -> list[int]:
    """Returns the shape that spreads one value, or one for each scale, over a constant."""
    return [1] * len(along) if len(values) == 1 else along
