"""The nodes of TensorFlow's graphs.

The numbers of the fields are those of tensorflow/core/framework: node_def.proto and
attr_value.proto.
"""

import functools
from collections.abc import Iterable, Mapping

import numpy as np

from .wire_format import Limit, Message


class Node:
    """A node of a graph: an operator, or a constant.

    Attributes:
      name: its own.
      op: the name of its operator; "Const" for a constant.
    """

    def __init__(self, message: Message):
        self._message = message
        self.name = message.text(1)
        self.op = message.text(2)

    @functools.cached_property
    def inputs(self) -> list[str]:
        """The names of the nodes that it reads, without the numbers of their outputs."""
        names = (bytes(name).decode() for name in self._message.views(3))
        return [name.partition(":")[0] for name in names]

    def attribute(self, name: str, number: int) -> Message:
        """Returns the value of an attribute, of the kind with this number in attr_value.proto.

        It is an empty message where there is no such value.
        """
        return self._attributes.get(name, _NOTHING).message(number)

    def integers(self, attribute: str) -> list[int]:
        """Returns an attribute that is a list of integers; [] where it is not there."""
        return self.attribute(attribute, 1).integers(3).tolist()

    def flag(self, attribute: str) -> bool:
        """Returns an attribute that is true or false; False where it is not there."""
        return bool(self._attributes.get(attribute, _NOTHING).integers(5).any())

    @functools.cached_property
    def _attributes(self) -> dict[str, Message]:
        return {entry.text(1): entry.message(2) for entry in self._message.messages(5)}


_NOTHING = Message(memoryview(b""), Limit(0))


def along_height(node: Node, attribute: str) -> int:
    """Returns a stride or dilation; 1 where the node has none."""
    numbers = node.integers(attribute)
    return numbers[1] if len(numbers) == 4 else 1


def dilation(node: Node, nodes: Mapping[str, Node]) -> int:
    """Returns a convolution's dilation, its own or that of a SpaceToBatchND around it."""
    earlier = before(node, nodes)
    if earlier is None or earlier.op != "SpaceToBatchND":
        return along_height(node, "dilations")
    return integers(nodes[earlier.inputs[1]])[0]


def before(node: Node, nodes: Mapping[str, Node]) -> Node | None:
    """Returns the node whose result is the first input of another."""
    return nodes.get(node.inputs[0]) if node.inputs else None


def integers(constant: Node) -> list[int]:
    """Returns the numbers of a constant of 32-bit integers, or the one that stands for all."""
    tensor = constant.attribute("value", 8)
    content = tensor.view(4)
    return (np.frombuffer(content, "<i4") if content else tensor.integers(7)).tolist()


def floats(constant: Node) -> list[float]:
    """Returns the numbers of a constant of float32, as decimals of as many digits."""
    tensor = constant.attribute("value", 8)
    content = tensor.view(4) or b"".join(bytes(view) for view in tensor.views(5))
    return [float(str(value)) for value in np.frombuffer(content, "<f4")]


def epsilons(norms: Iterable[Node]) -> list[float]:
    """Returns the different epsilons of nodes of BatchNorm, sorted."""
    values = [np.frombuffer(node.attribute("epsilon", 4).content, "<f4") for node in norms]
    # As decimals, since 1e-3 is not a float32.
    return sorted({float(str(value[0])) for value in values if len(value)})
