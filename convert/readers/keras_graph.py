"""The layers of a stored Keras model and their connections, read from its config without Keras.

The config is JSON: layers with a class, a name and settings, connected by `inbound_nodes`, in the
forms of Keras 2, Keras 3 and TensorFlow.js's converter. A model may contain models.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Path = tuple[str, ...]  # a layer's name, after those of the models around it

# Far more than a MobileNetV2 with any head, which has about 160.
_MOST_LAYERS = 2000
_DEEPEST = 20  # models in models

_SEQUENCES = ("Sequential", "Pipeline")


@dataclasses.dataclass(frozen=True)
class Node:
    """A layer or operation.

    Attributes:
      kind: its class's name.
      path: of names.
      config: its settings.
      inputs: the nodes whose outputs it gets.
      arguments: the numbers that an operation gets beside them, by their name or position.
    """

    kind: str
    path: Path
    config: Mapping[str, Any]
    inputs: tuple[Path, ...]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The layer's own name."""
        return self.path[-1]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of an image after a layer that fixes them; None elsewhere."""
        if self.kind == "Resizing":
            return _sides(self.config["height"], self.config["width"])
        shape = self.config.get("batch_shape") or self.config.get("batch_input_shape")
        if self.kind != "InputLayer" or not shape or len(shape) != 4 or not all(shape[1:3]):
            return None
        return _sides(shape[1], shape[2])


@dataclasses.dataclass(frozen=True)
class Graph:
    """The nodes of a model, with those of the models in it.

    Attributes:
      nodes: by path, each after those that it gets its inputs from.
      outputs: of the model.
      shared: the layers that are applied more than once, of which the graph has the first time.
    """

    nodes: dict[Path, Node]
    outputs: tuple[Path, ...]
    shared: tuple[Path, ...]

    def before(self, path: Path) -> list[Node]:
        """Returns a node and the chain of those before it, backwards, up to one with no input.

        The chain ends, too, with a node that has several.
        """
        chain = [self.nodes[path]]
        while len(chain[-1].inputs) == 1:
            chain.append(self.nodes[chain[-1].inputs[0]])
        return chain

    def size(self, path: Path) -> tuple[int, int] | None:
        """Returns the height and width of the image that a node gives; None where it is open."""
        return next((node.size for node in self.before(path) if node.size), None)

    def consumers(self, path: Path) -> list[Node]:
        """Returns the nodes that get a node's output."""
        return self._consumers[path]

    @functools.cached_property
    def _consumers(self) -> Mapping[Path, list[Node]]:
        found = defaultdict(list)
        for node in self.nodes.values():
            for path in dict.fromkeys(node.inputs):
                found[path].append(node)
        return found


def read(config: Any) -> Graph | None:
    """Returns the graph of a model; None for one whose class describes its layers in code.

    Args:
      config: the model's, from JSON: {"class_name": ..., "config": {"layers": [...]}}.

    Raises:
      ValueError, KeyError, TypeError, ...: the config is damaged.
    """
    if not _sublayers(config):
        return None
    builder = _Builder()
    outputs = builder.add(config, (), ())
    return Graph(builder.nodes, outputs, tuple(builder.shared))


class _Builder:
    """Collects the nodes of a model, in the order of their computation."""

    def __init__(self) -> None:
        self.nodes: dict[Path, Node] = {}
        self.shared: list[Path] = []

    def add(self, entry: Any, path: Path, feeds: tuple[Path, ...], arguments: Any = None) -> Any:
        """Adds a layer, or the layers of a model.

        Args:
          entry: the layer's, with class_name and config.
          path: of the layer; () for the outermost model.
          feeds: the nodes whose outputs it gets.
          arguments: as in `Node`.

        Returns:
          The nodes that give the outputs.
        """
        layers = _sublayers(entry)
        if len(self.nodes) + len(layers) > _MOST_LAYERS or len(path) > _DEEPEST:
            raise ValueError(f"more than {_MOST_LAYERS} layers, or models nested too deeply")
        if path in self.nodes:
            raise ValueError(f"two layers are named {_name(entry)!r}")
        if not layers:
            kind, config = str(entry["class_name"]), entry["config"]
            self.nodes[path] = Node(kind, path, config, feeds, arguments or {})
            return (path,)
        if entry["class_name"] in _SEQUENCES:
            return self._sequence(entry, layers, path, feeds)
        return self._functional(entry, layers, path, feeds)

    def _sequence(
        self, entry: Any, layers: Sequence[Any], path: Path, feeds: tuple[Path, ...]
    ) -> tuple[Path, ...]:
        """Adds the layers of a Sequential model, with an input layer in any case."""
        if layers[0]["class_name"] != "InputLayer":
            layers = [_implicit_input(entry, layers[0]), *layers]
        for layer in layers:
            feeds = self.add(layer, (*path, _name(layer)), feeds)
        return feeds

    def _functional(
        self, entry: Any, layers: Sequence[Any], path: Path, feeds: tuple[Path, ...]
    ) -> tuple[Path, ...]:
        """Adds the layers of a Functional model; a file may list a layer before its inputs."""
        config = entry["config"]
        entrances = [name for name, _ in _references(config["input_layers"])]
        outer = dict(zip(entrances, feeds, strict=False))
        calls = {_name(layer): layer.get("inbound_nodes") or [[]] for layer in layers}
        self.shared += [(*path, name) for name, made in calls.items() if len(made) > 1]
        first = {name: _call(made[0]) for name, made in calls.items()}
        by_name = {_name(layer): layer for layer in layers}
        if len(by_name) < len(layers):
            raise ValueError("two layers of a model have the same name")
        done: dict[str, tuple[Path, ...]] = {}
        for name in _in_order({name: [s for s, _ in call[0]] for name, call in first.items()}):
            sources, arguments = first[name]
            inputs = [_output(done[source], index) for source, index in sources]
            if name in outer:
                inputs = [outer[name]]
            done[name] = self.add(by_name[name], (*path, name), tuple(inputs), arguments)
        outputs = _references(config["output_layers"])
        return tuple(_output(done[name], index) for name, index in outputs)


def _in_order(sources: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the layers, each after those that it gets its inputs from.

    Args:
      sources: of each layer.

    Raises:
      ValueError: there is no such order, or no such source.
    """
    missing = {name: set(each) for name, each in sources.items()}
    users = defaultdict(list)
    for name, each in missing.items():
        for source in each:
            users[source].append(name)
    order = [name for name, each in missing.items() if not each]
    for name in order:  # which grows
        for user in users[name]:
            missing[user].remove(name)
            if not missing[user]:
                order.append(user)
    if len(order) < len(sources):
        stuck = next(name for name in sources if missing[name])
        raise ValueError(f"the inputs of layer {stuck!r} cannot be found")
    return order


def _sides(height: Any, width: Any) -> tuple[int, int]:
    """Returns the height and width of an image.

    Raises:
      ValueError: they are not whole numbers above 0.
    """
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise ValueError(f"images of {height!r} x {width!r} pixels")
    return height, width


def _output(outputs: tuple[Path, ...], number: int) -> Path:
    """Returns the node that gives a numbered output; a layer gives all of its own."""
    return outputs[number] if len(outputs) > 1 else outputs[0]


def _sublayers(entry: Any) -> list[Any]:
    """Returns the layers of a model; [] for a layer."""
    config = entry["config"]
    if entry["class_name"] in _SEQUENCES and isinstance(config, list):  # before Keras 2.2.3
        return config
    layers = config.get("layers") if isinstance(config, dict) else None
    functional = isinstance(config, dict) and "output_layers" in config
    return layers if layers and (functional or entry["class_name"] in _SEQUENCES) else []


def _name(entry: Any) -> str:
    """Returns a layer's name."""
    config = entry["config"]
    name = entry.get("name") or (config.get("name") if isinstance(config, dict) else None)
    return str(name or entry["class_name"])


def _implicit_input(model: Any, first: Any) -> dict[str, Any]:
    """Returns the input layer of a Sequential model that lists none."""
    configs = [entry["config"] for entry in (model, first) if isinstance(entry["config"], dict)]
    keys = ("batch_input_shape", "batch_shape", "build_input_shape")
    shapes = [config[key] for config in configs for key in keys if config.get(key)]
    name = f"the input of {_name(model)}"
    return {
        "class_name": "InputLayer",
        "config": {"name": name, "batch_shape": shapes[0] if shapes else None},
    }


def _call(call: Any) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Returns the sources of a call, as (layer, number of its output), and its other arguments."""
    if isinstance(call, dict):  # Keras 3
        arguments = dict(enumerate(call.get("args", ()))) | dict(call.get("kwargs", {}))
        sources = [
            (value["config"]["keras_history"][0], value["config"]["keras_history"][2])
            for value in _values(arguments)
            if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__"
        ]
        return sources, {str(key): value for key, value in arguments.items() if _is_number(value)}
    sources, arguments = [], {}
    for tensor in [call] if call and isinstance(call[0], str) else call:
        if tensor[0] == "_CONSTANT_VALUE":  # a number before the tensor, as in 255 - pixel
            arguments["0"] = tensor[2]
        else:
            sources.append((tensor[0], tensor[2]))
        for key, value in (tensor[3] if len(tensor) > 3 else {}).items():
            if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
                sources.append((value[0], value[2]))  # another tensor, by name
            elif _is_number(value):
                arguments[key] = value
    return sources, arguments


def _values(nested: Any) -> Iterator[Any]:
    """Yields the values in nested lists and dicts; a tensor is one value."""
    if isinstance(nested, dict) and nested.get("class_name") != "__keras_tensor__":
        nested = list(nested.values())
    if not isinstance(nested, list):
        yield nested
        return
    for value in nested:
        yield from _values(value)


def _references(listed: Any) -> list[tuple[str, int]]:
    """Returns (layer, number of its output) of a model's input or output layers.

    They are [[name, 0, 0], ...], or [name, 0, 0] for one in newer versions, or a dict.
    """
    if isinstance(listed, dict):
        listed = list(listed.values())
    if listed and isinstance(listed[0], str):
        listed = [listed]
    return [(name, index) for name, _, index in listed]


def number(stored: Any) -> Any:
    """Returns a number of a layer's config; some versions store it as an array."""
    return stored.get("value") if isinstance(stored, dict) else stored


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
