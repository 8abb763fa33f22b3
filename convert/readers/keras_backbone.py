"""The MobileNetV2 in the graph of a stored Keras model, compared with the network layer by layer.

Names and shapes of arrays do not tell strides, paddings, activations and shortcuts; a config does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mbv2_jax.errors import UserError

from ..layouts import LAYOUTS
from .keras_graph import Graph, Node, Path, number

# Settings of layers that the network's have, where a config mentions them.
_PLAIN = {
    "data_format": "channels_last",
    "dilation_rate": 1,
    "groups": 1,
    "depth_multiplier": 1,
    "use_bias": False,
}
_EPSILON = 1e-3


class Backbone(NamedTuple):
    """The place of the network in a graph.

    Attributes:
      entrance: the node that gives the images.
      exit: the node that gives the last feature map.
      epsilon: of BatchNorm.
    """

    entrance: Path
    exit: Path
    epsilon: float


def find(graph: Graph) -> Backbone | None:
    """Returns the network in a graph; None where not all of its layers are there by name.

    Raises:
      UserError: it computes something else than MobileNetV2; the message names the first layer that
        differs.
    """
    layout = LAYOUTS["keras"]
    names = dict(layout.layers(layout.backbone))
    stems = [node for node in graph.nodes.values() if node.name == names["stem"][0]]
    if len(stems) != 1:
        return None
    outer = stems[0].path[:-1]
    if (*outer, names["last"][0]) not in graph.nodes:
        del names["last"]  # a network without its last convolution
    if any((*outer, name) not in graph.nodes for row in names.values() for name in row):
        return None
    return _Trace(graph, outer, names).run()


class _Trace:
    """The walk through the network, from the stem to the last convolution."""

    def __init__(self, graph: Graph, outer: Path, names: Mapping[str, tuple[str, ...]]):
        self._graph = graph
        self._outer = outer
        self._names = names
        self._entrance = self._source(self._node(names["stem"][0]))
        self._sides = graph.size(self._entrance)
        self._epsilon: float | None = None

    def run(self) -> Backbone:
        """Compares every layer of the network; returns its place."""
        current = start = self._entrance  # start: where the block begins
        channels = inputs = 0  # of the map, and of the one where the block begins
        for layer, (conv, _) in self._names.items():
            block, _, part = layer.partition("/")
            if part in ("", "expand") or layer == "layer1_0/depthwise":
                start, inputs = current, channels
            current = self._convolution(layer, current)
            if part != "project":
                current = self._activation(current)
            if part in ("", "project"):
                channels = self._node(conv).config["filters"]
            if part == "project" and _stride(block) == 1 and channels == inputs:
                current = self._sum(current, start)
        return Backbone(self._entrance, current, self._epsilon or _EPSILON)

    def _convolution(self, layer: str, current: Path) -> Path:
        """Compares a convolution and its BatchNorm; returns the latter's node."""
        conv, norm = map(self._node, self._names[layer])
        block, _, part = layer.partition("/")
        spatial = layer == "stem" or part == "depthwise"
        stride = _stride(block) if spatial else 1
        settings = {**_PLAIN, "kernel_size": 3 if spatial else 1, "strides": stride}
        self._same(conv.kind, "DepthwiseConv2D" if part == "depthwise" else "Conv2D", conv, "class")
        for setting, expected in settings.items():
            self._same(conv.config.get(setting, expected), expected, conv, setting)
        self._same(activation_name(conv.config.get("activation")), "linear", conv, "activation")
        self._same(self._source(conv), current, conv, "input")
        if spatial:
            self._padding(conv, stride)
        self._same(norm.kind, "BatchNormalization", norm, "class")
        self._same(self._source(norm), conv.path, norm, "input")
        for setting in ("center", "scale"):
            self._same(norm.config.get(setting, True), True, norm, setting)
        epsilon = norm.config.get("epsilon", _EPSILON)
        if not (isinstance(epsilon, float) and 0 < epsilon < 1):
            raise self._fault(norm, f"has epsilon {_shown(epsilon)}")
        self._same(epsilon, self._epsilon or epsilon, norm, "epsilon")
        self._epsilon = epsilon
        return norm.path

    def _padding(self, conv: Node, stride: int) -> None:
        """Checks that a 3x3 convolution is padded as by TensorFlow's SAME, explicitly or not.

        At stride 2, SAME adds a row below and, if the number of rows is odd, one above.
        """
        before = self._graph.nodes[conv.inputs[0]]
        if before.kind == "ZeroPadding2D":
            self._same(conv.config["padding"], "valid", conv, "padding")
            rows, columns = self._sides or (0, 0)
            odd = [1, 1] if stride == 1 else [rows % 2, columns % 2]
            self._same(before.config["padding"], [[side, 1] for side in odd], before, "padding")
        else:
            self._same(conv.config["padding"], "same", conv, "padding")
        if self._sides:
            self._sides = (-(-self._sides[0] // stride), -(-self._sides[1] // stride))

    def _activation(self, norm: Path) -> Path:
        """Returns the node of a BatchNorm's activation."""
        found = [node for node in self._graph.consumers(norm) if _is_relu6(node)]
        if len(found) != 1:
            raise self._fault(self._graph.nodes[norm], "is not followed by a ReLU of at most 6")
        return found[0].path

    def _sum(self, norm: Path, shortcut: Path) -> Path:
        """Returns the node that adds a block's input to its output."""
        for node in self._graph.consumers(norm):
            if node.kind == "Add" and sorted(node.inputs) == sorted((norm, shortcut)):
                return node.path
        raise self._fault(self._graph.nodes[norm], "is not followed by the shortcut's sum")

    def _node(self, name: str) -> Node:
        return self._graph.nodes[*self._outer, name]

    def _source(self, node: Node) -> Path:
        """Returns the node before a layer and its padding."""
        while len(node.inputs) == 1:
            before = self._graph.nodes[node.inputs[0]]
            if before.kind != "ZeroPadding2D":
                return before.path
            node = before
        raise self._fault(node, f"has {len(node.inputs)} inputs instead of one")

    def _same(self, found: Any, expected: Any, node: Node, setting: str) -> None:
        """Raises an error where a setting of a layer is not the network's."""
        if found in (expected, [expected, expected]):
            return
        if isinstance(found, tuple):
            found, expected = ("/".join(path) for path in (found, expected))
        raise self._fault(node, f"has {setting} {_shown(found)} instead of {_shown(expected)}")

    def _fault(self, node: Node, fault: str) -> UserError:
        return UserError(f"its layer {node.name!r} {fault}, and no MobileNetV2 here is like this")


def activation_name(stored: Any) -> str:
    """Returns the name of an activation; "linear" for none.

    Args:
      stored: its name, or the function or the layer in a config.
    """
    if stored is None:
        return "linear"
    if isinstance(stored, dict):
        named = stored.get("class_name") == "function"
        stored = stored.get("config") if named else stored.get("class_name")
    name = str(stored).lower()
    known = {"softmax_v2": "softmax", "relu_v2": "relu"}.get(name, name)
    return known if known.isidentifier() else _shown(known)


def _shown(value: Any) -> str:
    """Returns a value of a config for a message, cut off where it is long."""
    return ascii(value)[:80]


def _stride(block: str) -> int:
    """Returns the stride of a block, or of the stem."""
    strides = LAYOUTS["keras"].backbone.strides
    if block == "stem":
        return strides[0]
    stage, _, place = block.removeprefix("layer").partition("_")
    return strides[int(stage)] if place == "0" else 1


def _is_relu6(node: Node) -> bool:
    config = node.config
    if node.kind == "ReLU":
        plain = not number(config.get("negative_slope")) and not number(config.get("threshold"))
        return plain and number(config.get("max_value")) == 6
    return node.kind == "Activation" and activation_name(config["activation"]) == "relu6"
