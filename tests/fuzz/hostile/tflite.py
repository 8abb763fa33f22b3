"""Hostile files of TFLite: places and lengths that lie, parts that are shared, bombs of labels."""

import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .files import Files, Originals, zip_file

_LIES = (0, 1, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, (1 << 32) - 4, 20_000)
_OPERATOR_CODES, _GRAPHS, _BUFFERS = 1, 2, 4  # fields of a model
_TENSORS, _INPUTS, _OPERATORS = 0, 1, 3  # fields of a graph


def files(originals: Originals) -> Files:
    """Returns hostile files, most of which begin with a real one's network."""
    real = originals[0].read_bytes()
    return [
        *_patched(real),
        *_graphs(),
        *(real + zip_file(members, zipfile.ZIP_DEFLATED) for members in _LABELS),
        b"\x08\0\0\0TFL3",
        b"\x08\0\0\0TFL3" + bytes(1_000),
        b"\x08\0\0\0TFL3" + b"\xff" * 1_000,
        b"\x08\0\0\0TFL3" + b"\x04\0\0\0" * 1_000,
        real[:200],
    ]


# ---- Bytes ----


class _File:
    """A flatbuffer, of which numbers can be changed."""

    def __init__(self, content: bytes):
        self.content = bytearray(content)
        self.root = self.number(0)

    def number(self, place: int) -> int:
        return int.from_bytes(self.content[place : place + 4], "little")

    def put(self, place: int, value: int) -> None:
        self.content[place : place + 4] = (value % (1 << 32)).to_bytes(4, "little")

    def vtable(self, table: int) -> int:
        return table - int.from_bytes(self.content[table : table + 4], "little", signed=True)

    def field(self, table: int, number: int) -> int:
        """Returns the place to which a field leads: a vector or a table."""
        entry = self.vtable(table) + 4 + 2 * number
        place = table + int.from_bytes(self.content[entry : entry + 2], "little")
        return place + self.number(place)

    def part(self, vector: int, index: int = 0) -> int:
        """Returns the place of a table in a vector."""
        place = vector + 4 + 4 * index
        return place + self.number(place)

    def count(self, vector: int) -> int:
        return self.number(vector)


def _patched(content: bytes) -> Iterator[bytes]:
    """Yields files with lies in the places of tables, and in the lengths of vectors."""
    file = _File(content)
    graph = file.part(file.field(file.root, _GRAPHS))
    vectors = [file.field(file.root, n) for n in (_OPERATOR_CODES, _GRAPHS, _BUFFERS)]
    vectors += [file.field(graph, number) for number in (_TENSORS, _INPUTS, _OPERATORS)]
    places = [0, file.root, graph, *vectors, *(vector + 4 for vector in vectors)]
    tensor = file.part(file.field(graph, _TENSORS), 1)
    places += [tensor, file.field(tensor, 0), file.field(tensor, 0) + 4, file.field(tensor, 3)]
    for place in places:
        for lie in _LIES:
            changed = _File(content)
            changed.put(place, lie)
            yield bytes(changed.content)
    for vector in vectors:
        yield _one_for_all(content, vector)


def _one_for_all(content: bytes, vector: int) -> bytes:
    """Returns a file in which all the tables of a vector are the same one, 20,000 times."""
    file = _File(content)
    target = file.part(vector)
    file.content += bytes(-len(file.content) % 4)
    # A vector at the end, which only the first of the fields that lead to the old one reaches.
    start = len(file.content)
    file.content += (20_000).to_bytes(4, "little") + bytes(80_000)
    for index in range(20_000):
        place = start + 4 + 4 * index
        file.put(place, target - place)
    for place in range(0, start - 3, 4):
        if place + file.number(place) == vector and file.number(place) < start:
            file.put(place, start - place)
            break
    return bytes(file.content)


# ---- Graphs ----


def _graphs() -> Iterator[bytes]:
    """Yields files with a network that is followed by something hostile, or changed."""
    # Imported here, so that the other containers need no LiteRT.
    from mbv2_jax.spec import Backbone
    from tests.support import tflite_files

    for change in _CHANGES:
        network = tflite_files.Network(Backbone(width=0.1, padding="same"), 32)
        output = network.head(network.build(), 5)
        yield network.content(change(network, output) or output)


Change = Callable[[Any, int], int | None]  # gets the network and the number of its output


def _first(**fields: Any) -> Change:
    """Returns a change of the tensor of the first kernel."""

    def change(network: Any, output: int) -> None:
        kernel = network._tensors[network.operators[0].inputs[1]]
        for name, value in fields.items():
            setattr(kernel, name, value)

    return change


def _quantized(**fields: Any) -> Change:
    """Returns a change of every constant to 8 bits, with these values of the quantisation."""

    def change(network: Any, output: int) -> None:
        from ai_edge_litert import schema_py_generated as schema

        for tensor in network._tensors:
            if tensor.buffer and len(tensor.shape) == 4:
                tensor.type = schema.TensorType.INT8
                size = int(np.prod(tensor.shape))
                network._buffers[tensor.buffer] = schema.BufferT(data=np.ones(size, np.uint8))
                tensor.quantization = schema.QuantizationParametersT(**fields)

    return change


def _operators(**fields: Any) -> Change:
    """Returns a change of every operator."""

    def change(network: Any, output: int) -> None:
        for operator in network.operators:
            for name, value in fields.items():
                setattr(operator, name, value)

    return change


def _cycle(network: Any, output: int) -> None:
    network.operators[0].inputs[0] = output


def _dequantised_by_itself(network: Any, output: int) -> None:
    kernel = network.operators[0].inputs[1]
    network.op("DEQUANTIZE", [kernel], [1])
    network.operators[-1].outputs = [kernel]
    network.operators.insert(0, network.operators.pop())


def _reversed(network: Any, output: int) -> None:
    network.operators.reverse()


def _many_tensors(network: Any, output: int) -> None:
    for _ in range(19_000):
        network.tensor([1 << 20])
        network._tensors[-1].buffer = network._tensors[network.operators[0].inputs[1]].buffer


def _unknown_sizes(network: Any, output: int) -> None:
    """Adds many constants of all the numbers of one buffer, whose shape does not count them."""
    large = network.constant(np.ones(500_000))
    many = [network.tensor([-1]) for _ in range(5_000)]
    for number in many:
        network._tensors[number].buffer = network._tensors[large].buffer
    for first in range(0, len(many), 50):
        network.op("CONCATENATION", [output, *many[first : first + 50]], [1])


def _all_read_all(network: Any, output: int) -> None:
    """Adds operators of which each of one half leads to each of the other."""
    tensors = [network.tensor([1]) for _ in range(90)]
    for half in range(2):
        for _ in range(4_000):
            network.op("CONCATENATION", [output, *(tensors if half else [])], [1])
            if not half:
                network.operators[-1].outputs = tensors


def _read_often(network: Any, output: int) -> None:
    """Adds operators that read one constant again and again."""
    constants = [network.constant(np.ones(1)) for _ in range(90)]
    for _ in range(8_000):
        network.op("CONCATENATION", [output, *constants], [1])


def _long_chain(network: Any, output: int) -> int:
    for _ in range(9_000):
        output = network.op("RELU", [output], [1, 5])
    return output


def _nameless(name: Any) -> Change:
    def change(network: Any, output: int) -> None:
        for tensor in network._tensors:
            tensor.name = name

    return change


def _odd_head(network: Any, output: int) -> int:
    return int(network.op("CUSTOM", [output], [1, 5]))


_CHANGES: list[Change] = [
    *(_first(shape=shape) for shape in ([1 << 30] * 4, [-1] * 4, [0] * 4, [], [1] * 2_000, [-1])),
    *(_first(type=kind) for kind in (1, 4, 5, 6, 8, 17, 127)),
    *(_first(buffer=number) for number in (0, 1 << 31, (1 << 32) - 1)),
    _quantized(scale=[]),
    _quantized(scale=[1.0] * 7),
    _quantized(scale=[1.0] * 5_000),
    _quantized(scale=[float("nan")], zeroPoint=[0]),
    _quantized(scale=[float("inf")], zeroPoint=[0]),
    _quantized(scale=[1e38], zeroPoint=[-(1 << 63)]),
    _quantized(scale=[0.1], zeroPoint=[1, 2, 3]),
    _quantized(scale=[0.1, 0.2], zeroPoint=[1], quantizedDimension=1 << 30),
    _quantized(scale=[0.1, 0.2], zeroPoint=[1], quantizedDimension=-5),
    _operators(inputs=[]),
    _operators(outputs=[]),
    _operators(inputs=[-1, -1, -1]),
    _operators(inputs=[1 << 30]),
    _operators(inputs=[-(1 << 31)] * 3),
    _operators(outputs=[-1]),
    _operators(outputs=[1 << 30]),
    _operators(opcodeIndex=1 << 30),
    _operators(builtinOptions=None),
    _cycle,
    _dequantised_by_itself,
    _reversed,
    _many_tensors,
    _unknown_sizes,
    _all_read_all,
    _read_often,
    _long_chain,
    _nameless("a\nb\x1b[31m"),
    _nameless(b"\xff\xfe"),
    _nameless("n" * 2_000),
    _nameless(None),
    _odd_head,
    lambda network, output: network.inputs.clear(),
    lambda network, output: network.inputs.extend([0] * 1_000),
    lambda network, output: network.inputs.__setitem__(0, 1 << 30),
]
_LABELS: list[dict[str, bytes]] = [
    {"labels.txt": bytes(300 << 20)},
    {"labels.txt": b"\n" * (60 << 20)},
    {"labels.txt": b"a\n" * (30 << 20)},
    {"labels.txt": b"\xff\xfe"},
    {"labels.txt": b"a\x1b[31m\n" * 5},
    {"labels.txt": b""},
    {"labels.txt": b"a\na\na\na\na"},
    {f"{n}": b"" for n in range(60_000)},
    {"../../labels.txt": b"a\nb"},
]
