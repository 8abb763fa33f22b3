"""TensorFlow's frozen graphs, read without TensorFlow: a GraphDef whose constants are the weights.

The graph is a file of its own (.pb), or the one with "frozen" in its name in an archive (.tgz), as
TF-slim, TensorFlow's detection models and its DeepLab are published. BatchNorm has to be separate:
a graph that folded it into the convolutions, or simulates 8-bit numbers, is refused.

The numbers of the fields are those of tensorflow/core/framework: graph.proto and tensor.proto.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mbv2_jax.errors import UserError, listed

from . import archive, frozen_deeplab, frozen_ssdlite, strides
from .contents import Contents, damage_named, no_averages
from .graph_nodes import Node, along_height, before, dilation, epsilons, integers
from .wire_format import Limit, Message

# The last parts of the names of weights, of TF-slim and of Keras. Other constants are shapes,
# paddings, anchors, ...
_WEIGHTS = re.compile(
    r"(.+/)?(weights|depthwise_weights|biases|kernel|depthwise_kernel|bias"
    r"|gamma|beta|moving_mean|moving_variance)"
)
# A name in TF-slim's network, apart from its head.
_SCOPE = re.compile(
    r"(.*/)?MobilenetV2/(?P<layer>Conv|Conv_1|(?P<block>expanded_conv)(_(?P<number>\d{1,4}))?)/.+"
)
_ACTIVATIONS = ("Elu", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Tanh")
_DEPTHWISE = ("depthwise_weights", "depthwise_kernel")

_FLOATS = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 14: ml_dtypes.bfloat16, 19: np.dtype("<f2")}

# A published detection graph has 5,000 nodes, and 16 fields are passed for each.
_NODES = 100_000
_FIELDS = 1_000_000


def read(path: pathlib.Path, ema: bool | None) -> Contents:
    """Reads the weights in a frozen graph, and the image size and fields that its nodes show.

    Args:
      path: a GraphDef, or a tar archive (compressed or not) that holds one.
      ema: True is refused: a graph holds one set of weights.

    Raises:
      UserError: the file is damaged, holds no weights, simulates 8-bit numbers, has BatchNorm
        folded into its convolutions, or differs from every network here.
    """
    if ema:
        raise no_averages(path)
    member, content = _content(path)
    with damage_named(path):
        graph = Message(memoryview(content), Limit(_FIELDS))
        nodes = {node.name: node for node in _nodes(path, graph)}
        tensors = dict(_tensors(nodes))
        _check(path, nodes, tensors)
        stated = _backbone(path, nodes)
        head = frozen_deeplab.find(path, nodes, stated.get("model.output_stride"))
        boxes = frozen_ssdlite.find(path, nodes, stated.get("model.bn_epsilon"))
        size = _image_size(nodes)
    guesses = () if size else head.guesses
    stated |= head.stated | size | boxes
    return Contents(tensors, member, guesses=guesses, stated=stated, rates=head.rates)


def _content(path: pathlib.Path) -> tuple[str, bytes]:
    """Returns the graph, and its name in an archive; "" for a file of its own."""
    if not archive.is_tar(path):
        return "", path.read_bytes()
    wanted = re.compile(r"[^/]*frozen[^/]*\.pb")
    found = archive.read_tar(path, lambda name: bool(wanted.fullmatch(name.rpartition("/")[2])))
    if len(found) != 1:
        raise UserError(
            f"{path} is an archive with {len(found) or 'no'} frozen graphs "
            f"({listed(found, 3, ', ') or 'such as frozen_inference_graph.pb'}): unpack it, and "
            "give the file of weights in it"
        )
    return next(iter(found.items()))


def _nodes(path: pathlib.Path, graph: Message) -> Iterator[Node]:
    """Yields the nodes of a graph."""
    for count, message in enumerate(graph.messages(1)):
        if count == _NODES:
            raise UserError(f"{path} was refused: its graph has more than {_NODES:,} nodes")
        yield Node(message)


def _tensors(nodes: Mapping[str, Node]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the weights by name."""
    for node in nodes.values():
        if node.op == "Const" and _WEIGHTS.fullmatch(node.name):
            tensor = node.attribute("value", 8)
            if _type(tensor) in _FLOATS:
                yield node.name, _array(tensor)


def _type(tensor: Message) -> int:
    """Returns the number of a tensor's type; 0 where it is not there."""
    return next(iter(tensor.integers(1).tolist()), 0)


def _array(tensor: Message) -> np.ndarray:
    """Returns a tensor of floats; a view, also where one number stands for all of them."""
    dtype = np.dtype(_FLOATS[_type(tensor)])
    shape = _shape(tensor.message(2))
    content = tensor.view(4)
    if content:
        return np.frombuffer(content, dtype).reshape(shape)
    if dtype.itemsize == 2:  # half_val: the bits of a number in an integer
        values = tensor.integers(13, np.uint16).view(dtype)
    else:
        number = 5 if dtype.itemsize == 4 else 6
        joined = bytearray()
        for view in tensor.views(number):
            joined += view
        values = np.frombuffer(joined, dtype)
    if len(values) == 1:  # it stands for all of them
        return np.broadcast_to(values, shape)
    return values.reshape(shape)


def _shape(message: Message) -> tuple[int, ...]:
    """Returns the sizes in a TensorShapeProto; -1 for an unknown one."""
    sizes = (dimension.integers(1).tolist() for dimension in message.messages(2))
    return tuple(size[0] if size else 0 for size in sizes)


def _check(
    path: pathlib.Path, nodes: Mapping[str, Node], tensors: Mapping[str, np.ndarray]
) -> None:
    """Raises UserError for a graph whose constants are not the weights of a float network."""
    ops = {node.op for node in nodes.values()}
    quantized = sorted(op for op in ops if op.startswith(("FakeQuant", "Quantize")))
    if quantized:
        raise UserError(
            f"{path} simulates 8-bit numbers ({listed(quantized, 1)}), which no network here does: "
            "convert the graph of the float network, or the .tflite file made from this one"
        )
    if not tensors:
        variables = ops & {"Variable", "VariableV2", "VarHandleOp"}
        found = "a graph whose weights are in a checkpoint" if variables else "no frozen graph"
        raise UserError(f"{path} holds {found}: give the frozen graph, whose constants are weights")
    last = {name.rpartition("/")[2] for name in tensors}
    if last.intersection(_DEPTHWISE) and "moving_variance" not in last:
        raise UserError(
            f"{path} has its BatchNorm folded into the convolutions, in a way that its names do "
            "not tell: convert the graph before that, or a .tflite file of it"
        )


def _image_size(nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Returns the side of the images, if the graph takes squares of one size."""
    inputs = [node for node in nodes.values() if node.op == "Placeholder"]
    shapes = [_shape(node.attribute("shape", 7)) for node in inputs]
    sides = {shape[1] for shape in shapes if len(shape) == 4 and shape[1] == shape[2] > 0}
    return {"data.image_size": sides.pop()} if len(sides) == 1 else {}


def _backbone(path: pathlib.Path, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Returns the fields of TF-slim's network that its operators show; {} of another network.

    Raises:
      UserError: no network here has its strides, dilations, padding, activation or epsilon.
    """
    stems, blocks, norms = [], {}, []
    for node in nodes.values():
        scope = _SCOPE.fullmatch(node.name)
        if scope is None:
            continue
        if node.op in _ACTIVATIONS:
            place = listed([node.name])
            raise UserError(f"{path} has the activation {node.op} at {place}, not Relu6")
        if node.op == "Conv2D" and scope["layer"] == "Conv":
            stems.append(node)
        if node.op == "DepthwiseConv2dNative" and scope["block"]:
            blocks[int(scope["number"] or 0)] = node
        if node.op.startswith("FusedBatchNorm"):
            norms.append(node)
    if len(stems) != 1 or not blocks:
        return {}
    depthwise = [blocks[index] for index in sorted(blocks)]
    fields = _strides(path, nodes, stems[0], depthwise)
    return fields | _padding(path, nodes, [*stems, *depthwise]) | _epsilon(path, norms)


def _strides(
    path: pathlib.Path, nodes: Mapping[str, Node], stem: Node, depthwise: Sequence[Node]
) -> dict[str, Any]:
    """Returns the fields of the strides and dilations."""
    steps = [
        strides.Step(along_height(node, "strides"), dilation(node, nodes)) for node in depthwise
    ]
    found = strides.fields(along_height(stem, "strides"), steps)
    if found is None:
        raise UserError(
            f"{path} has strides and dilations that no network here has: "
            + ", ".join(f"{step.stride} and {step.dilation}" for step in steps)
        )
    return found


def _padding(
    path: pathlib.Path, nodes: Mapping[str, Node], convolutions: Sequence[Node]
) -> dict[str, Any]:
    """Returns the padding, which only the convolutions with stride 2 tell."""
    found = {}
    for node in convolutions:
        if along_height(node, "strides") == 2:
            kind = bytes(node.attribute("padding", 2).content)
            earlier = before(node, nodes)
            if kind == b"SAME":
                found["same"] = node.name
            elif kind == b"VALID" and earlier is not None and earlier.op == "Pad":
                pads = integers(nodes[earlier.inputs[1]])
                found["torch" if pads == [0, 0, 1, 1, 1, 1, 0, 0] else f"by {pads}"] = node.name
            else:
                found["none"] = node.name
    if len(found) > 1 or not found.keys() <= {"same", "torch"}:
        places = listed((f"{padding} at {name}" for padding, name in found.items()), 3, ", ")
        raise UserError(f"{path} pads as no network here does: {places}")
    return {"model.padding": next(iter(found))} if found else {}


def _epsilon(path: pathlib.Path, norms: Sequence[Node]) -> dict[str, Any]:
    """Returns the epsilon of the BatchNorm, where the graph has operators of that."""
    found = epsilons(norms)
    if len(found) > 1:
        raise UserError(f"{path} has BatchNorm with several epsilons: {found}")
    return {"model.bn_epsilon": found[0]} if found else {}
