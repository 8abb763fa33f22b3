"""The model around a MobileNetV2 in a stored Keras config: its preprocessing and its head."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from . import keras_backbone
from .keras_backbone import activation_name
from .keras_graph import Graph, Node, Path, number

# Layers that return what they get, once a model is trained.
_IDENTITIES = frozenset(
    (
        *("InputLayer", "Dropout", "SpatialDropout2D", "GaussianDropout", "AlphaDropout"),
        *("GaussianNoise", "ActivityRegularization", "Cast", "Identity"),
        *("AugMix", "CutMix", "MixUp", "RandAugment"),
        *(
            f"Random{change}"
            for change in (
                *("Brightness", "ColorDegeneration", "ColorJitter", "Contrast", "ElasticTransform"),
                *("Erasing", "Flip", "GaussianBlur", "Grayscale", "Height", "Hue", "Invert"),
                *("Perspective", "Posterization", "Rotation", "Saturation", "Sharpness", "Shear"),
                *("Translation", "Width", "Zoom"),
            )
        ),
    )
)

# Arithmetic with a number, as Keras 3 calls it, and TensorFlow's functions in Keras 2: what it does
# with the pixels.
_ARITHMETIC = {
    "Multiply": "multiply",
    "math.multiply": "multiply",
    "__operators__.mul": "multiply",
    "TrueDivide": "divide",
    "Divide": "divide",
    "math.truediv": "divide",
    "math.divide": "divide",
    "__operators__.truediv": "divide",
    "Add": "add",
    "math.add": "add",
    "__operators__.add": "add",
    "Subtract": "subtract",
    "math.subtract": "subtract",
    "__operators__.sub": "subtract",
}

_HEAD_ACTIVATIONS = ("linear", "relu", "softmax", "sigmoid")
_NO_ANTIALIASING = (
    "the model's Resizing layer does not antialias; here an image is antialiased as it shrinks"
)
_BY_NAME = (
    "the model calls a function 'preprocess_input', whose code is not in the file: it is taken for "
    "MobileNetV2's, (pixel - 127.5) / 127.5"
)


@dataclasses.dataclass
class Description:
    """The description of a model in its config, without the backbone.

    Attributes:
      head: the dense layers by path, and their activations; None where that is not known.
      obstacles, stated, guesses: as in `Contents`.
    """

    head: list[tuple[Path, str]] | None = None
    obstacles: list[str] = dataclasses.field(default_factory=list)
    stated: dict[str, Any] = dataclasses.field(default_factory=dict)
    guesses: list[str] = dataclasses.field(default_factory=list)


class _Scale(NamedTuple):
    """The image as the network gets it: (pixel - mean) / std, each of R, G and B."""

    mean: np.ndarray
    std: np.ndarray

    def changed(self, operation: str, value: np.ndarray) -> "_Scale":
        """Returns the scale after arithmetic with a number or one for each colour."""
        mean, std = self
        if operation == "multiply":
            return _Scale(mean, std / value)
        if operation == "divide":
            return _Scale(mean, std * value)
        return _Scale(mean + (value if operation == "subtract" else -value) * std, std)


def describe(graph: Graph) -> Description:
    """Describes the model around the network in a graph.

    Raises:
      UserError: its backbone computes something else than a MobileNetV2.
    """
    found = Description()
    found.obstacles += [
        f"{_article(graph.nodes[path].kind if path in graph.nodes else 'model')} "
        f"{path[-1]!r} that is applied more than once"
        for path in graph.shared
    ]
    if len(graph.outputs) != 1:
        found.obstacles.append(f"{len(graph.outputs)} outputs")
    backbone = keras_backbone.find(graph)
    if backbone is None:
        return found
    if backbone.epsilon != 1e-3:
        found.stated["model.bn_epsilon"] = backbone.epsilon
    size = _entrance(graph, backbone.entrance, found)
    _head(graph, backbone.exit, size, found)
    return found


# ---- Before the backbone ----


def _entrance(graph: Graph, path: Path, found: Description) -> tuple[int, int] | None:
    """Describes the layers between the images and the backbone; returns the backbone's input size.

    Args:
      path: of the node that gives the backbone its images.
      found: gets what they state.
    """
    layers = graph.before(path)
    if layers[-1].inputs:
        found.obstacles.append(_obstacle(layers.pop(), "before the network"))
    scale = start = _Scale(np.zeros(3), np.ones(3))
    for node in reversed(layers):
        if node.kind in _IDENTITIES or (node.kind == "Resizing" and _resizing(node, found)):
            continue
        with np.errstate(all="ignore"):
            changed = _scaled(scale, node, found)
        if changed is None:
            found.obstacles.append(_obstacle(node, "before the network"))
        else:
            scale = changed
    if scale is not start:
        if not np.all(scale.std > 0) or not np.isfinite([*scale.mean, *scale.std]).all():
            found.obstacles.append("a scale of the pixels that is not positive")
        else:
            found.stated["data.mean"] = _rounded(scale.mean)
            found.stated["data.std"] = _rounded(scale.std)
    size = graph.size(path)
    if size and size[0] == size[1]:
        found.stated["data.image_size"] = size[0]
    elif size:
        found.stated.setdefault("data.eval_transforms", f"resize(({size[0]}, {size[1]}))")
    return size


def _resizing(node: Node, found: Description) -> bool:
    """Describes a Resizing layer; returns whether an evaluation transform here does the same."""
    config = node.config
    interpolation = config.get("interpolation", "bilinear")
    square = config["height"] == config["width"]
    crops = config.get("crop_to_aspect_ratio", False)
    if (
        interpolation not in ("bilinear", "bicubic")
        or config.get("pad_to_aspect_ratio")
        or (crops and not square)
    ):
        return False
    how = "" if interpolation == "bilinear" else ", interpolation='bicubic'"
    size = "size" if square else f"({config['height']}, {config['width']})"
    resized = f"resize_edge(size{how})|center_crop(size)" if crops else f"resize({size}{how})"
    found.stated["data.eval_transforms"] = resized
    if not config.get("antialias"):
        found.guesses.append(_NO_ANTIALIASING)
    return True


def _scaled(scale: _Scale, node: Node, found: Description) -> _Scale | None:
    """Returns the scale after a layer or operation; None where it is not one of the pixels alone.

    Args:
      found: gets the assumption about a function without code.
    """
    config = node.config
    if node.kind == "Rescaling":
        factor, offset = _colours(config["scale"]), _colours(config.get("offset", 0))
        return scale.changed("multiply", factor).changed("add", offset)
    if node.kind == "Normalization" and config.get("mean") and not config.get("invert"):
        mean, variance = _colours(config["mean"]), _colours(config["variance"])
        return scale.changed("subtract", mean).changed("divide", np.sqrt(variance))
    if node.kind == "Lambda" and _function(config) == "preprocess_input":
        found.guesses.append(_BY_NAME)
        return scale.changed("divide", _colours(127.5)).changed("subtract", _colours(1))
    called = config.get("function", "") if node.kind == "TFOpLambda" else node.kind
    if called == "cast":
        return scale
    numbers = [value for key, value in node.arguments.items() if key in ("1", "y", "x2")]
    if called not in _ARITHMETIC or len(numbers) != 1 or len(node.arguments) != 1:
        return None
    return scale.changed(_ARITHMETIC[called], _colours(numbers[0]))


def _function(config: Mapping[str, Any]) -> str:
    """Returns the name of a Lambda layer's function; "" where the file has its code."""
    function = config.get("function")
    if isinstance(function, dict) and function.get("class_name") == "function":
        function = function.get("config")
    return function if isinstance(function, str) else ""


def _colours(value: Any) -> np.ndarray:
    """Returns a number, or one for each colour, as three float64.

    Raises:
      ValueError: they are not three.
    """
    if isinstance(value, dict):  # an array, as Keras 3 stores it
        value = value["config"]["value"]
    return np.broadcast_to(np.asarray(value, np.float64).reshape(-1), 3)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    """Returns numbers without the errors of float64: 1 / (1 / 127.5) as 127.5."""
    return tuple(float(f"{value:.9g}") + 0.0 for value in values)


# ---- After the backbone ----


def _head(graph: Graph, path: Path, size: tuple[int, int] | None, found: Description) -> None:
    """Describes the layers from the last feature map to the model's output.

    Args:
      path: of the node that gives the map.
      size: of the network's input; None where it is open.
      found: gets them.
    """
    layers, pooled = [], False
    found.head = []
    while path not in graph.outputs:
        users = graph.consumers(path)
        if len(users) != 1:
            names = ", ".join(repr(node.name) for node in users)
            found.obstacles.append(f"a branch after the network, to {names or 'nothing'}")
            break
        layers.append(users[0])
        path = users[0].path
    for node in layers:
        if node.kind in _IDENTITIES:
            continue
        if not pooled and _pools(node, size):
            pooled = True
        elif node.kind == "Dense" and pooled and not _quantized(node):
            found.head.append((node.path, activation_name(node.config.get("activation"))))
        elif not (pooled and (_flattens(node) or _activates(node, found.head))):
            found.obstacles.append(_obstacle(node, "after the network"))


def _pools(node: Node, size: tuple[int, int] | None) -> bool:
    """Returns whether a layer averages the last feature map, or that has a single pixel."""
    if node.kind == "GlobalAveragePooling2D":
        return True
    sides = None if size is None else [-(-side // 32) for side in size]
    if node.kind == "AveragePooling2D":
        return node.config["pool_size"] == sides
    return _flattens(node) and sides == [1, 1]


def _flattens(node: Node) -> bool:
    """Returns whether a layer turns a map of one pixel into its features."""
    if node.kind == "Reshape":
        return len(node.config["target_shape"]) == 1
    return node.kind == "Flatten"


def _activates(node: Node, head: list[tuple[Path, str]]) -> bool:
    """Moves an activation into the dense layer before it; returns whether it is one."""
    config = node.config
    name = {"Relu": "relu", "ReLU": "relu", "Softmax": "softmax", "Sigmoid": "sigmoid"}.get(
        node.kind, ""
    )
    if node.kind == "Activation":
        name = activation_name(config["activation"])
    plain = (
        config.get("max_value") is None
        and not number(config.get("negative_slope"))
        and not number(config.get("threshold"))
        and config.get("axis", -1) == -1
    )
    if name == "linear":
        return True
    if name not in _HEAD_ACTIVATIONS or not plain or not head or head[-1][1] != "linear":
        return False
    head[-1] = (head[-1][0], name)
    return True


def _quantized(node: Node) -> bool:
    """Returns whether a layer's weights are integers with scales (Keras 3's `quantize`)."""
    dtype = node.config.get("dtype")
    return isinstance(dtype, dict) and "Quantized" in str(dtype.get("class_name"))


def _obstacle(node: Node, place: str) -> str:
    return f"{_article(node.kind)} {node.name!r} {place}"


def _article(kind: str) -> str:
    """Returns the class of a layer with its article."""
    return f"{'an' if kind[:1] in 'AEIOUaeiou' else 'a'} {kind}" + (
        "" if kind == "model" else " layer"
    )
