"""Keras's weight files, read without Keras: JSON and HDF5 groups -> {"LAYER/VARIABLE": array}.

Keras has written three structures of HDF5:

  Keras 3, .weights.h5 and the same inside .keras    layers/conv2d_3/vars/0 ...
  Keras 2 (and 3, on request), .h5                   conv_1/conv_1/kernel:0, listed in attributes
  the same inside a whole-model .h5                  model_weights/conv_1/..., beside model_config

A .keras file, and a whole-model .h5, also have the model's config, which describes its layers. So
has the folder that Keras writes to Hugging Face's hub: config.json beside model.weights.h5.
"""

import io
import json
import pathlib
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mbv2_jax.errors import UserError

from ..layouts import LAYOUTS
from . import keras_graph, keras_model
from .archive import open_archive
from .contents import Contents, Dense, damage_named, fault, no_averages
from .keras_graph import Graph, Path
from .keras_hdf5 import Hdf5

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

# Groups and variables that hold the state of training and of random layers, not weights.
_STATE = re.compile(
    r"_?(optimizer|metrics|compile_metrics|compile_loss|loss_tracker|random_generator|"
    r"seed_generator)(_\d+)?"
)
_RANDOM_STATES = ("StateVar", "seed_generator_state")

_LONGEST_CONFIG = 4 << 20  # bytes; a MobileNetV2's has about 200 kB

_NO_NAMES = "the file has no layer names: they are taken from the layers' order, class by class"


class Weight(NamedTuple):
    """A variable of a layer: the layer's path of names, the variable's name, and its value."""

    layer: Path
    variable: str
    array: np.ndarray


class _Layer(NamedTuple):
    """A group of variables.

    Attributes:
      key: of the group in the file, such as conv2d_3.
      outer: the names of the models around the layer.
      name: of the layer; "" where the file has none.
      variables: by number.
    """

    key: str
    outer: Path
    name: str
    variables: dict[str, np.ndarray]


def read(path: pathlib.Path, ema: bool | None) -> Contents:
    """Reads the layers' weights in a .keras, .weights.h5 or .h5 file, and its model's description.

    Optimizer, metrics and the states of random layers are left out.

    Raises:
      UserError: the file is damaged, holds no layers, or another backbone, or no averaged weights
        where `ema` asks for them.
    """
    if ema:
        raise no_averages(path)
    import h5py

    config = _config_beside(path)
    content: str | io.BytesIO = str(path)
    with damage_named(path):
        if zipfile.is_zipfile(path):
            with open_archive(path) as archive:
                config = parse(path, archive.read("config.json"))
                content = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(content, "r") as file:
            hdf5 = Hdf5(path, file, path.stat().st_size)
            if text := hdf5.text(file, "model_config"):
                config = parse(path, text)
            weights, guesses = _weights(path, hdf5, config)
    if not weights:
        raise UserError(f"{path} is an HDF5 file, but holds no layers as Keras writes them")
    return described(path, named(path, weights), config, guesses)


def _config_beside(path: pathlib.Path) -> Any:
    """Returns the config of a model that Keras saved to a folder; None for any other file."""
    file = path.with_name("config.json")
    if path.name != "model.weights.h5" or not file.is_file():
        return None
    with damage_named(file), open(file, "rb") as content:
        config = parse(file, content.read(_LONGEST_CONFIG + 1))
    return config if isinstance(config, dict) and "class_name" in config else None


def parse(path: pathlib.Path, text: str | bytes) -> Any:
    """Parses a JSON text in a file.

    Raises:
      UserError: it is far too long for the description of such a model.
      ValueError: it is not JSON.
    """
    if len(text) > _LONGEST_CONFIG:
        raise UserError(
            f"{path} was refused: the description of its model has {len(text) / 2**20:.0f} MiB"
        )
    return json.loads(text)


def named(path: pathlib.Path, weights: Iterable[Weight]) -> dict[str, np.ndarray]:
    """Returns the arrays as LAYER/VARIABLE, after the models around it where two share a name.

    Raises:
      UserError: two arrays have one name all the same.
    """
    weights = list(weights)
    owners = defaultdict(set)
    for weight in weights:
        owners[weight.layer[-1]].add(weight.layer)
    found: dict[str, np.ndarray] = {}
    for layer, variable, array in weights:
        shared = len(owners[layer[-1]]) > 1
        name = "/".join((*(layer if shared else layer[-1:]), variable))
        if name in found:
            raise UserError(f"{path} has two layers named {layer[-1]!r}; rename one of them")
        found[name] = array
    return found


def described(
    path: pathlib.Path,
    tensors: dict[str, np.ndarray],
    config: Any,
    guesses: Sequence[str] = (),
    **others: Any,
) -> Contents:
    """Returns the contents of a file, with what its model's config says.

    Args:
      path: of the file, for messages.
      tensors: from `named`.
      config: of the model, {"class_name": ..., "config": ...}; None where the file has none.
      guesses: of the reader.
      **others: further fields of the result.

    Raises:
      UserError: the config is damaged, or describes another backbone.
    """
    graph = _graph(path, config)
    if graph is None:
        return Contents(tensors, guesses=tuple(guesses), **others)
    try:
        model = keras_model.describe(graph)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}: its layers cannot be read: {fault(error)}") from None
    head = None
    if model.head is not None:
        head = tuple(
            Dense(_name_in(tensors, layer), activation) for layer, activation in model.head
        )
    return Contents(
        tensors,
        guesses=(*guesses, *model.guesses),
        stated=model.stated | others.pop("stated", {}),
        head=head,
        obstacles=tuple(model.obstacles),
        **others,
    )


def _graph(path: pathlib.Path, config: Any) -> Graph | None:
    """Returns the layers in a config; None where there are none."""
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict | list):
        return None
    try:
        return keras_graph.read(config)
    # The type of error depends on the damage: KeyError, TypeError, IndexError, ...
    except Exception as error:
        raise UserError(f"{path}: its layers cannot be read: {fault(error)}") from None


def _name_in(tensors: Mapping[str, np.ndarray], layer: Path) -> str:
    """Returns the name that a layer of a config has among the tensors."""
    names = ("/".join(layer), "/".join((layer[0], layer[-1])), layer[-1])
    return next((name for name in names if f"{name}/kernel" in tensors), layer[-1])


def _weights(path: pathlib.Path, hdf5: Hdf5, config: Any) -> tuple[list[Weight], tuple[str, ...]]:
    """Returns the weights in an HDF5 file, and the assumptions about their names."""
    root = hdf5.get(hdf5.root, "model_weights") or hdf5.root
    if "layer_names" in root.attrs or "layer_names0" in root.attrs:
        return list(_by_attributes(path, hdf5, root, _graph(path, config))), ()
    layers = list(_walk(hdf5, "", hdf5.members(root), config, ()))
    if any(layer.name for layer in layers):
        return list(_flatten(layers)), ()
    return list(_flatten(_name_by_order(layers))), (_NO_NAMES,)


# ---- Keras 3 ----


def _walk(
    hdf5: Hdf5, key: str, members: Mapping[str, Any], entry: Any, outer: Path
) -> Iterator[_Layer]:
    """Yields the layer of a group and those of the groups in it, in the model's order.

    Args:
      key: of the group: its class's name and its number among those, e.g. conv2d_3, or the name of
        an attribute of a model; "" for the whole model.
      members: of the group.
      entry: of the layer in a config, which lists the layers in the same order; {} without one.
      outer: the names of the models around it.
    """
    own = str(_settings(entry).get("name") or "")
    if len(members.get("vars", ())):
        variables = hdf5.members(members["vars"])
        own = hdf5.text(members["vars"], "name") or own
        yield _Layer(key, outer, own, {n: hdf5.array(each) for n, each in variables.items()})
    inner = (*outer, own or key) if key else ()
    entries = _by_key(_settings(entry).get("layers"))
    groups: dict[str, tuple[Any, Mapping[str, Any]]] = {}
    for name, member in members.items():
        if name in _CONTAINERS:
            groups |= {each: (group, entries) for each, group in hdf5.members(member).items()}
        elif name != "vars" and not _STATE.fullmatch(name):
            groups[name] = (member, {})
    for name in sorted(groups, key=_order):
        group, described = groups[name]
        if hasattr(group, "keys"):  # not a dataset
            inside = hdf5.members(group)
            yield from _walk(hdf5, name, inside, described.get(name, {}), inner)


def _settings(entry: Any) -> Mapping[str, Any]:
    config = entry.get("config") if isinstance(entry, dict) else None
    return config if isinstance(config, dict) else {}


def _by_key(entries: Any) -> dict[str, Any]:
    """Returns the layers of a config by the keys of their groups."""
    found, counts = {}, Counter[str]()
    for entry in entries if isinstance(entries, list) else ():
        kind = _snake_case(str(entry.get("class_name", "")))
        found[f"{kind}_{counts[kind]}" if counts[kind] else kind] = entry
        counts[kind] += 1
    return found


def _flatten(layers: Iterable[_Layer]) -> Iterator[Weight]:
    """Yields the variables by name; by number in layers of other classes or variables."""
    for layer in layers:
        names = _VARIABLES.get(_class_of(layer.key)) or _guessed(layer.variables)
        count = len(layer.variables)
        complete = count == len(names) or (count == 1 and "bias" in names)
        known = dict(zip(map(str, range(count)), names, strict=False)) if complete else {}
        for number, array in layer.variables.items():
            path = (*layer.outer, layer.name or layer.key)
            yield Weight(path, known.get(number, number), array)


def _guessed(variables: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Returns the variables' names of a group that is not named after its class, if it is Dense."""
    shapes = [array.shape for _, array in sorted(variables.items())]
    if shapes and len(shapes[0]) == 2 and shapes[1:] in ([], [shapes[0][1:]]):
        return _VARIABLES["dense"]
    return ()


def _name_by_order(layers: list[_Layer]) -> list[_Layer]:
    """Names the layers as keras.applications does, if the network has as many of each class.

    Any number of dense layers may follow, as in a model around the network: they keep their keys.
    """
    names = _names_by_class()
    counts = Counter(_class_of(layer.key) for layer in layers)
    dense = counts.pop("dense", 0)
    if counts != {kind: len(found) for kind, found in names.items()}:
        return layers
    whole = len({layer.outer for layer in layers}) == 1
    remaining = {kind: iter(found) for kind, found in names.items()}
    remaining["dense"] = iter(["predictions"] if dense == 1 and whole else [])
    return [
        layer._replace(name=next(remaining[_class_of(layer.key)], layer.key)) for layer in layers
    ]


def _names_by_class() -> dict[str, list[str]]:
    """Returns the names of a backbone's layers in its order, by class as files write it."""
    names: dict[str, list[str]] = {kind: [] for kind in _VARIABLES if kind != "dense"}
    layout = LAYOUTS["keras"]
    for layer, (conv, norm) in layout.layers(layout.backbone):
        names["depthwise_conv2d" if layer.endswith("depthwise") else "conv2d"].append(conv)
        names["batch_normalization"].append(norm)
    return names


def _class_of(key: str) -> str:
    """Returns the class in a group's key: conv2d_3 -> conv2d."""
    return re.sub(r"_\d{1,9}$", "", key)


def _order(key: str) -> tuple[str, int]:
    """Returns a sorting key by which conv2d_10 comes after conv2d_9."""
    number = key.removeprefix(_class_of(key))
    return _class_of(key), int(number[1:] or 0)


def _snake_case(name: str) -> str:
    """Returns a class's name as Keras writes it in files: DepthwiseConv2D -> depthwise_conv2d."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


# ---- Keras 2 ----


def _by_attributes(
    path: pathlib.Path, hdf5: Hdf5, root: Any, graph: Graph | None
) -> Iterator[Weight]:
    """Reads the structure of Keras 2, in which attributes list the layers and their weights."""
    for layer in hdf5.listed(root, "layer_names"):
        group = hdf5.get(root, layer)
        names = hdf5.listed(group, "weight_names")
        for name, weight in zip(names, split_names(names, layer, graph), strict=True):
            if weight is not None:
                owner, variable = weight
                yield Weight(owner, variable, hdf5.array(hdf5.get(group, name)))


def split_names(
    names: Sequence[str], layer: str, graph: Graph | None
) -> list[tuple[Path, str] | None]:
    """Returns the layer and the variable in names of weights, such as conv_1/kernel:0.

    Args:
      names: of a layer's weights; of all the layers' in it, if it is a model.
      layer: its name; "" where that is not known.
      graph: of the model, which tells the models; None where it is not known.

    Returns:
      For each name the path of the layer and the variable's name; None for a random state.
    """
    parts = [name.partition(":")[0].split("/") for name in names]
    nested = not layer or len({tuple(each[:-1]) for each in parts}) > 1
    known = [path for path in graph.nodes if layer in ("", path[0])] if graph else []
    if known:
        nested = (layer,) not in known
    found: list[tuple[Path, str] | None] = []
    for *outer, variable in parts:
        if variable in _RANDOM_STATES:
            found.append(None)
            continue
        owner: Path = (layer, outer[-1]) if layer and nested and outer else (layer or outer[-1],)
        paths = [path for path in known if path[-1] == owner[-1]]
        owner = paths[0] if len(paths) == 1 else owner
        if variable == "kernel" and "depthwise" in owner[-1]:
            variable = "depthwise_kernel"  # Keras 3 calls it kernel
        found.append((owner, variable))
    return found
