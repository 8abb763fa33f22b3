"""Keras's weight files -> {"LAYER/VARIABLE": array}, read without Keras: JSON and HDF5 groups.

Three layouts of HDF5 are about, by what wrote them:

  Keras 3, .weights.h5 and the same inside .keras    layers/conv2d_3/vars/0 ...
  Keras 2 (and 3, on request), .h5                   conv_1/conv_1/kernel:0, listed in attributes
  the same inside a whole-model .h5                  model_weights/conv_1/...
"""

import io
import json
import pathlib
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mbv2_jax.errors import UserError

# What the variables of a layer are called, in the order in which Keras numbers them, by the name
# that its class has in a file. Layers of other classes keep the numbers.
_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("depthwise_kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}

# Groups of layers inside a model's group; the second is Keras 2.13's.
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")

# The state of random layers: no weights, and of no use elsewhere.
_RANDOM_STATES = ("StateVar", "seed_generator_state")

# Bytes that a member of a .keras file may unpack to; the widest network here is far below it.
_LARGEST = 2 << 30

_NO_NAMES = "the file has no layer names: they are taken from the layers' order, class by class"


class _Layer(NamedTuple):
    """A group that holds variables: its key in the file, such as conv2d_3, and the layer's name."""

    key: str
    name: str  # "" where the file has none
    variables: dict[str, np.ndarray]  # by number


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Reads a .keras, .weights.h5 or .h5 file.

    Returns:
      The layers' weights, and what had to be assumed. Optimizer, metrics and the states of random
      layers are left out.

    Raises:
      UserError: the file is damaged or holds no layers, or h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(f"reading {path} needs h5py: pip install 'mbv2_jax[convert]'") from None

    config: list[Any] = []
    content: str | io.BytesIO = str(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                config = _config_layers(json.loads(_member(path, archive, "config.json")))
                content = io.BytesIO(_member(path, archive, "model.weights.h5"))
        with h5py.File(content, "r") as file:
            root = file.get("model_weights", file)
            if "layer_names" in root.attrs or "layer_names0" in root.attrs:
                return _by_attributes(path, file, root), ()
            layers = list(_walk(path, file, root, config))
    except UserError:
        raise
    # By where the damage is: OSError, KeyError, RuntimeError, BadZipFile, JSONDecodeError, ...
    except Exception as error:
        raise UserError(f"{path} is damaged or cut off: {_one_line(error)}") from None
    if not layers:
        raise UserError(f"{path} is an HDF5 file, but holds no layers as Keras writes them")
    if any(layer.name for layer in layers):
        return _flat(path, layers), ()
    return _flat(path, _named_by_order(layers)), (_NO_NAMES,)


def _member(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > _LARGEST:
        raise UserError(
            f"{path} was refused: its {name} unpacks to {size / 2**30:.1f} GiB, and no MobileNetV2 "
            f"has more than {_LARGEST / 2**30:.0f}"
        )
    return archive.read(name)


def _config_layers(config: Any) -> list[Any]:
    """Returns the layers in a .keras file's config, [] where a model of another kind has none."""
    inner = config.get("config") if isinstance(config, dict) else None
    layers = inner.get("layers") if isinstance(inner, dict) else None
    return layers if isinstance(layers, list) else []


def _walk(path: pathlib.Path, file: Any, group: Any, config: list[Any]) -> Iterator[_Layer]:
    """Yields the layers of a model's group and of the models nested in it, in the model's order.

    A group's key is its class's name and its number among those, e.g. conv2d_3; the config lists
    the layers in the same order.
    """
    named, counts = {}, Counter[str]()
    for entry in config:
        kind = _snake_case(str(entry.get("class_name", "")))
        key = f"{kind}_{counts[kind]}" if counts[kind] else kind
        counts[kind] += 1
        named[key] = entry
    for container in (group[name] for name in _CONTAINERS if name in group):
        for key in sorted(container, key=_order):
            layer, entry = container[key], named.get(key, {})
            if any(name in layer for name in _CONTAINERS):
                yield from _walk(path, file, layer, _config_layers(entry))
            elif "vars" in layer and len(layer["vars"]):
                own = layer["vars"].attrs.get("name") or entry.get("config", {}).get("name")
                variables = {n: _array(path, file, layer["vars"][n]) for n in layer["vars"]}
                yield _Layer(key, str(own or ""), variables)


def _flat(path: pathlib.Path, layers: list[_Layer]) -> dict[str, np.ndarray]:
    """Returns the variables by name, and by number in a layer of another class or make."""
    found: dict[str, np.ndarray] = {}
    for layer in layers:
        names = _VARIABLES.get(_class_of(layer.key), ())
        count = len(layer.variables)
        usual = count == len(names) or (count == 1 and "bias" in names)
        known = dict(zip(map(str, range(count)), names, strict=False)) if usual else {}
        for number, array in layer.variables.items():
            variable = known.get(number, number)
            name = f"{layer.name or layer.key}/{variable}"
            if name in found:
                raise UserError(f"{path} has two layers named {layer.name!r}; rename one of them")
            found[name] = array
    return found


def _by_attributes(path: pathlib.Path, file: Any, root: Any) -> dict[str, np.ndarray]:
    """Reads the layout of Keras 2, in which attributes list layers and weights."""
    found: dict[str, np.ndarray] = {}
    for layer in _listed(root, "layer_names"):
        group = root[layer]
        weights = {
            name: name.partition(":")[0].split("/") for name in _listed(group, "weight_names")
        }
        # A model nested in a model is one group, and its layers' names are in the weights' names.
        nested = len({tuple(parts[:-1]) for parts in weights.values()}) > 1
        for weight, parts in weights.items():
            owner, variable = parts[-2] if nested and len(parts) > 1 else layer, parts[-1]
            if variable in _RANDOM_STATES:
                continue
            if variable == "kernel" and "depthwise" in owner:
                variable = "depthwise_kernel"  # Keras 3's name for it is kernel
            name = f"{owner}/{variable}"
            if name in found:
                raise UserError(f"{path} has two layers named {owner!r}; rename one of them")
            found[name] = _array(path, file, group[weight])
    return found


def _listed(group: Any, name: str) -> list[str]:
    """Reads an attribute that lists names; Keras splits long ones into name0, name1, ..."""
    names = [name] if name in group.attrs else []
    while f"{name}{len(names)}" in group.attrs:
        names.append(f"{name}{len(names)}")
    listed = [entry for part in names for entry in group.attrs[part]]
    return [entry.decode() if isinstance(entry, bytes) else str(entry) for entry in listed]


def _array(path: pathlib.Path, file: Any, dataset: Any) -> np.ndarray:
    """Reads a dataset that lies in `file` itself: HDF5 can also point to other files."""
    if dataset.file != file or dataset.external or dataset.is_virtual:
        raise UserError(f"{path} was refused: its {dataset.name} lies in another file")
    array = np.asarray(dataset[()])
    if dataset.attrs.get("dtype") == "bfloat16" or array.dtype == np.dtype("V2"):
        array = array.view(ml_dtypes.bfloat16).astype(np.float32)
    return array


def _named_by_order(layers: list[_Layer]) -> list[_Layer]:
    """Names the layers as keras.applications.MobileNetV2's, if it has as many of each class."""
    blocks = ["expanded_conv", *(f"block_{i}" for i in range(1, 17))]
    parts = ("expand", "depthwise", "project")
    convs = [f"{block}_{part}" for block in blocks for part in parts]
    convs.remove("expanded_conv_expand")  # the first block has no expansion
    names = {
        "conv2d": ["Conv1", *(name for name in convs if "depthwise" not in name), "Conv_1"],
        "depthwise_conv2d": [name for name in convs if "depthwise" in name],
        "batch_normalization": ["bn_Conv1", *(f"{name}_BN" for name in convs), "Conv_1_bn"],
        "dense": ["predictions"],
    }
    counts = Counter(_class_of(layer.key) for layer in layers)
    wanted = {kind: len(listed) for kind, listed in names.items()}
    if counts not in (Counter(wanted), Counter(wanted | {"dense": 0})):
        return layers
    left = {kind: iter(listed) for kind, listed in names.items()}
    return [layer._replace(name=next(left[_class_of(layer.key)])) for layer in layers]


def _class_of(key: str) -> str:
    return re.sub(r"_\d+$", "", key)


def _order(key: str) -> tuple[str, int]:
    """Sorts conv2d_10 after conv2d_9."""
    number = key.removeprefix(_class_of(key))
    return _class_of(key), int(number[1:] or 0)


def _snake_case(name: str) -> str:
    """DepthwiseConv2D -> depthwise_conv2d, as Keras names groups after classes."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
