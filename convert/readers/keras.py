"""Keras's weight files, read without Keras: JSON and HDF5 groups -> {"LAYER/VARIABLE": array}.

Keras has written three structures of HDF5:

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

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.installed import require

from ..layouts import LAYOUTS, Layout
from .contents import Contents, no_averages

# The names of a layer's variables in the order in which Keras numbers them, by the layer's class as
# files write it. Variables of other classes keep their numbers.
_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("depthwise_kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}

# Groups of layers inside a model's group; the second is Keras 2.13's.
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")

# The state of random layers, which is not a weight.
_RANDOM_STATES = ("StateVar", "seed_generator_state")

# Bytes to which a member of a .keras file may unpack; the widest network needs far fewer.
_LARGEST = 2 << 30

_NO_NAMES = "the file has no layer names: they are taken from the layers' order, class by class"


class _Layer(NamedTuple):
    """A group of variables.

    Attributes:
      key: of the group in the file, such as conv2d_3.
      name: of the layer; "" where the file has none.
      variables: by number.
    """

    key: str
    name: str
    variables: dict[str, np.ndarray]


def read(path: pathlib.Path, ema: bool | None) -> Contents:
    """Reads the layers' weights in a .keras, .weights.h5 or .h5 file.

    Optimizer, metrics and the states of random layers are left out.

    Raises:
      UserError: the file is damaged, or holds no layers, or no averaged weights where `ema` asks
        for them; or h5py is not installed.
    """
    if ema:
        raise no_averages(path)
    require(f"reading {path}", "h5py", extra="convert")
    import h5py

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
                return Contents(_by_attributes(path, file, root))
            layers = list(_walk(path, file, root, config))
    except UserError:
        raise
    # The type of error depends on the damage: OSError, KeyError, BadZipFile, ...
    except Exception as error:
        raise UserError(f"{path} is damaged or cut off: {first_line(error)}") from None
    if not layers:
        raise UserError(f"{path} is an HDF5 file, but holds no layers as Keras writes them")
    if any(layer.name for layer in layers):
        return Contents(_flatten(path, layers))
    return Contents(_flatten(path, _name_by_order(layers)), guesses=(_NO_NAMES,))


def _member(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns a member of a zip archive; refuses one that unpacks to an implausible size."""
    size = archive.getinfo(name).file_size
    if size > _LARGEST:
        raise UserError(
            f"{path} was refused: its {name} unpacks to {size / 2**30:.1f} GiB, and no MobileNetV2 "
            f"has more than {_LARGEST / 2**30:.0f}"
        )
    return archive.read(name)


def _config_layers(config: Any) -> list[Any]:
    """Returns the layers in a .keras file's config; [] where a model of another kind has none."""
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


def _flatten(path: pathlib.Path, layers: list[_Layer]) -> dict[str, np.ndarray]:
    """Returns the variables by name; by number in layers of other classes or variables."""
    found: dict[str, np.ndarray] = {}
    for layer in layers:
        names = _VARIABLES.get(_class_of(layer.key), ())
        count = len(layer.variables)
        complete = count == len(names) or (count == 1 and "bias" in names)
        known = dict(zip(map(str, range(count)), names, strict=False)) if complete else {}
        for number, array in layer.variables.items():
            variable = known.get(number, number)
            name = f"{layer.name or layer.key}/{variable}"
            if name in found:
                raise UserError(f"{path} has two layers named {layer.name!r}; rename one of them")
            found[name] = array
    return found


def _by_attributes(path: pathlib.Path, file: Any, root: Any) -> dict[str, np.ndarray]:
    """Reads the structure of Keras 2, in which attributes list the layers and their weights."""
    found: dict[str, np.ndarray] = {}
    for layer in _listed(root, "layer_names"):
        group = root[layer]
        weights = {
            name: name.partition(":")[0].split("/") for name in _listed(group, "weight_names")
        }
        # A model nested in a model is one group; the weights' names contain its layers' names.
        nested = len({tuple(parts[:-1]) for parts in weights.values()}) > 1
        for weight, parts in weights.items():
            owner, variable = parts[-2] if nested and len(parts) > 1 else layer, parts[-1]
            if variable in _RANDOM_STATES:
                continue
            if variable == "kernel" and "depthwise" in owner:
                variable = "depthwise_kernel"  # Keras 3 calls it kernel
            name = f"{owner}/{variable}"
            if name in found:
                raise UserError(f"{path} has two layers named {owner!r}; rename one of them")
            found[name] = _array(path, file, group[weight])
    return found


def _listed(group: Any, name: str) -> list[str]:
    """Reads an attribute that lists names; Keras splits a long list into name0, name1, ..."""
    names = [name] if name in group.attrs else []
    while f"{name}{len(names)}" in group.attrs:
        names.append(f"{name}{len(names)}")
    listed = [entry for part in names for entry in group.attrs[part]]
    return [entry.decode() if isinstance(entry, bytes) else str(entry) for entry in listed]


def _array(path: pathlib.Path, file: Any, dataset: Any) -> np.ndarray:
    """Reads a dataset; refuses one that lies in another file than `file`, as HDF5 allows."""
    if dataset.file != file or dataset.external or dataset.is_virtual:
        raise UserError(f"{path} was refused: its {dataset.name} lies in another file")
    array = np.asarray(dataset[()])
    if dataset.attrs.get("dtype") == "bfloat16" or array.dtype == np.dtype("V2"):
        array = array.view(ml_dtypes.bfloat16).astype(np.float32)
    return array


def _name_by_order(layers: list[_Layer]) -> list[_Layer]:
    """Names the layers as keras.applications does, if the network has as many of each class."""
    names = _names_by_class(LAYOUTS["keras"])
    counts = Counter(_class_of(layer.key) for layer in layers)
    wanted = Counter({kind: len(found) for kind, found in names.items()})
    if counts not in (wanted, wanted - Counter(dense=1)):  # the latter: a backbone alone
        return layers
    remaining = {kind: iter(found) for kind, found in names.items()}
    return [layer._replace(name=next(remaining[_class_of(layer.key)])) for layer in layers]


def _names_by_class(layout: Layout) -> dict[str, list[str]]:
    """Returns the names of a network's layers in its order, by class as files write it."""
    names: dict[str, list[str]] = {kind: [] for kind in _VARIABLES}
    for layer, row in layout.layers(layout.backbone):
        kind = "depthwise_conv2d" if layer.endswith("depthwise") else "conv2d"
        names[kind].append(row[0])
        names["batch_normalization"].append(row[1])
    names["dense"] += layout.table["classifier"]
    return names


def _class_of(key: str) -> str:
    """Returns the class in a group's key: conv2d_3 -> conv2d."""
    return re.sub(r"_\d+$", "", key)


def _order(key: str) -> tuple[str, int]:
    """Returns a sorting key by which conv2d_10 comes after conv2d_9."""
    number = key.removeprefix(_class_of(key))
    return _class_of(key), int(number[1:] or 0)


def _snake_case(name: str) -> str:
    """Returns a class's name as Keras writes it in files: DepthwiseConv2D -> depthwise_conv2d."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
