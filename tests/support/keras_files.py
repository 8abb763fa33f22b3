"""Models of live Keras 3, and files of Keras 2 and TensorFlow.js with their weights.

Keras 2 and TensorFlow.js's converter need TensorFlow, which is no peer here: the files are written
after the formats' descriptions, and Keras 3 gives the results to expect.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import h5py
import numpy as np

from tests.support import peers

Arrays = dict[str, np.ndarray]

_VARIABLES = {
    "Conv2D": ("kernel", "bias"),
    "DepthwiseConv2D": ("depthwise_kernel", "bias"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Dense": ("kernel", "bias"),
}
_OPERATIONS = {"TrueDivide": "math.truediv", "Subtract": "math.subtract"}


def application(size: int = 64, **options: Any) -> Any:
    """Returns Keras's MobileNetV2 of width 0.35, without its head."""
    return peers.keras().applications.MobileNetV2(
        input_shape=(size, size, 3), alpha=0.35, weights=None, include_top=False, **options
    )


def randomize(model: Any, seed: int = 0) -> None:
    """Gives a model weights and statistics such as a trained one has."""
    generator = np.random.default_rng(seed)
    values = []
    for variable in model.weights:
        shape = tuple(variable.shape)
        if len(shape) in (2, 4):  # variance-preserving
            fan_in = np.prod(shape[:2] if "depthwise" in variable.path else shape[:-1])
            value = generator.standard_normal(shape) * np.sqrt(2 / fan_in)
        elif variable.name in ("gamma", "moving_variance"):
            value = generator.uniform(0.5, 1.5, shape)
        else:
            value = generator.uniform(-0.5, 0.5, shape)
        values.append(value.astype(np.float32))
    model.set_weights(values)


def layers(model: Any) -> Iterator[Any]:
    """Yields the layers of a model and of the models in it."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from layers(layer)
        else:
            yield layer


def weights(model: Any) -> Arrays:
    """Returns a model's weights as LAYER/VARIABLE, named as by Keras 2."""
    keras = peers.keras()
    return {
        f"{layer.name}/{variable}": keras.ops.convert_to_numpy(value)
        for layer in layers(model)
        if layer.weights
        for variable, value in zip(_VARIABLES[type(layer).__name__], layer.weights, strict=False)
    }


# ---- Configs ----


def keras_2_config(model: Any) -> dict[str, Any]:
    """Returns a model's config as Keras 2 wrote it."""
    return _keras_2(json.loads(model.to_json()))


def _keras_2(entry: Any) -> Any:
    kind, config = entry["class_name"], dict(entry["config"])
    converted = {"class_name": kind, "config": config}
    if "name" in entry:
        converted["name"] = entry["name"]
    if "dtype" in config:
        config["dtype"] = "float32"
    if "batch_shape" in config:
        config["batch_input_shape"] = config.pop("batch_shape")
    if kind in _OPERATIONS:
        converted["class_name"] = "TFOpLambda"
        config |= {"trainable": True, "dtype": "float32", "function": _OPERATIONS[kind]}
    if "layers" in config:
        config["layers"] = [_keras_2(layer) for layer in config["layers"]]
        for ends in ("input_layers", "output_layers"):
            if ends in config and isinstance(config[ends][0], str):
                config[ends] = [config[ends]]
    if "inbound_nodes" in entry:
        converted["inbound_nodes"] = [_keras_2_call(call) for call in entry["inbound_nodes"]]
    return converted


def _keras_2_call(call: Any) -> Any:
    tensors, *numbers = call["args"]
    tensors = tensors if isinstance(tensors, list) else [tensors]
    histories = [tensor["config"]["keras_history"] for tensor in tensors]
    if numbers:  # an operation, whose one tensor is not in a list
        return [*histories[0], {"y": numbers[0], "name": None}]
    return [[*history, {}] for history in histories]


def camel_case(config: Any) -> Any:
    """Returns a config with keys as TensorFlow.js's own classes have them."""
    if isinstance(config, list):
        return [camel_case(value) for value in config]
    if not isinstance(config, dict):
        return config
    return {
        key[:1] + key.title().replace("_", "")[1:]: camel_case(value)
        for key, value in config.items()
    }


# ---- Files ----


def write_keras_2(model: Any, path: pathlib.Path) -> None:
    """Writes a whole model as Keras 2 did, to an .h5 file."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.11.0"
        file.attrs["model_config"] = json.dumps(keras_2_config(model)).encode()
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = np.asarray([layer.name.encode() for layer in model.layers])
        for layer in model.layers:
            group = root.create_group(layer.name)
            arrays = weights(layer) if hasattr(layer, "layers") else _own(layer)
            trained = [name for name in arrays if "/moving_" not in name]
            names = [*trained, *(name for name in arrays if name not in trained)]
            group.attrs["weight_names"] = np.asarray([f"{name}:0".encode() for name in names])
            for name in names:
                group[f"{name}:0"] = arrays[name]
        file.create_group("optimizer_weights")["SGD/momentum:0"] = np.ones(3)


def _own(layer: Any) -> Arrays:
    """Returns a layer's weights, named as by Keras 2."""
    values = map(peers.keras().ops.convert_to_numpy, layer.weights)
    names = _VARIABLES.get(type(layer).__name__, ()) if layer.weights else ()
    return {f"{layer.name}/{name}": value for name, value in zip(names, values, strict=False)}


def write_tfjs(
    model: Any,
    folder: pathlib.Path,
    *,
    shards: Sequence[str] = ("group1-shard1of1.bin",),
    config: Callable[[Any], Any] = keras_2_config,
    quantize: Callable[[np.ndarray], tuple[np.ndarray, dict[str, Any]]] | None = None,
) -> pathlib.Path:
    """Writes a layers model of TensorFlow.js: model.json, and shards of equal size beside it.

    Args:
      model: of Keras.
      folder: an existing one.
      shards: the files' names.
      config: returns the config of the model.
      quantize: returns what is stored of an array, and its entry "quantization".
    """
    specs, content = [], b""
    for name, array in weights(model).items():
        spec: dict[str, Any] = {"name": name, "shape": array.shape, "dtype": "float32"}
        if quantize:
            array, spec["quantization"] = quantize(array)
        specs.append(spec)
        content += np.ascontiguousarray(array).tobytes()
    size = -(-len(content) // len(shards))
    for number, shard in enumerate(shards):
        (folder / shard).write_bytes(content[number * size : (number + 1) * size])
    topology = {"keras_version": "2.11.0", "backend": "tensorflow", "model_config": config(model)}
    description = {
        "format": "layers-model",
        "generatedBy": "keras v2.11.0",
        "convertedBy": "TensorFlow.js Converter v4.22.0",
        "modelTopology": topology,
        "weightsManifest": [{"paths": list(shards), "weights": specs}],
    }
    (folder / "model.json").write_text(json.dumps(description))
    return folder / "model.json"
