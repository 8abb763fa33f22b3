"""TensorFlow.js's layers models: model.json with a Keras config, and files of weights beside it.

The two may also lie in a zip archive, as Teachable Machine gives them, with metadata.json, which
has the class names.
"""

import dataclasses
import math
import pathlib
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mbv2_jax.errors import UserError, listed

from .archive import open_archive
from .contents import Contents, damage_named, no_averages
from .keras import Weight, described, named, parse, split_names

_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int32": np.dtype("<i4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

# What Teachable Machine's library does with an image: its central square, resized, and
# pixel / 127 - 1.
_TEACHABLE_MACHINE = "@teachablemachine/image"
_ITS_IMAGES = {
    "data.mean": (127.0,) * 3,
    "data.std": (127.0,) * 3,
    "data.eval_transforms": "resize_edge(size)|center_crop(size)",
}

_GRAPH_MODEL = (
    "is a TensorFlow.js graph model, whose layers are merged into TensorFlow's operations: convert "
    "the Keras model that it was made from, or a layers model"
)

_Open = Callable[[str], bytes | None]  # the content of a file beside model.json; None without one


def read(path: pathlib.Path, ema: bool | None) -> Contents:
    """Reads a layers model, from its model.json or from a zip archive with all its files.

    Weights that the converter quantised, to 8 or 16 bits, are scaled back to float32.

    Raises:
      UserError: the model is a graph model, a file of it is missing or damaged, or `ema` asks for
        averaged weights, which there are none.
    """
    if ema:
        raise no_averages(path)
    with damage_named(path):
        if not zipfile.is_zipfile(path):
            contents, files = _read(path, path.read_bytes(), _folder(path))
            beside = tuple(path.parent / name for name in files)
            return dataclasses.replace(contents, beside=beside)
        with open_archive(path) as archive:
            model = min((n for n in archive.names if _is_model(n)), key=len)
            folder = posixpath.dirname(model)

            def member(name: str) -> bytes | None:
                name = posixpath.join(folder, name)
                return archive.read(name) if name in archive.names else None

            return _read(path, archive.read(model), member)[0]


def _is_model(name: str) -> bool:
    return posixpath.basename(name) == "model.json"


def _folder(path: pathlib.Path) -> _Open:
    """Returns a function that reads the files beside a file."""

    def read_beside(name: str) -> bytes | None:
        file = path.parent / name
        return file.read_bytes() if file.is_file() else None

    return read_beside


def _read(path: pathlib.Path, text: bytes, read_file: _Open) -> tuple[Contents, list[str]]:
    """Returns the contents of a model, and the names of its files of weights.

    Args:
      path: of the model, for messages.
      text: of model.json.
      read_file: reads a file beside it.
    """
    model = parse(path, text)
    topology = model.get("modelTopology")
    if model.get("format") == "graph-model" or (isinstance(topology, dict) and "node" in topology):
        raise UserError(f"{path} {_GRAPH_MODEL}")
    if not isinstance(topology, dict):
        raise UserError(f"{path} has no modelTopology, which describes a model's layers")
    config = _pythonic(topology.get("model_config", topology.get("modelConfig", topology)))
    groups = model["weightsManifest"]
    files = [posixpath.normpath(name) for group in groups for name in group["paths"]]
    if len(set(files)) < len(files):
        raise UserError(f"{path} was refused: it lists a file of weights twice")
    arrays: dict[str, np.ndarray] = {}
    for group in groups:
        for name, array in _group(path, group, read_file):
            if name in arrays:
                raise UserError(f"{path} was refused: it has two arrays named {name}")
            arrays[name] = array
    owners = split_names(list(arrays), "", None)
    weights = [
        Weight(*owner, array)
        for owner, array in zip(owners, arrays.values(), strict=True)
        if owner is not None
    ]
    names, stated = _metadata(path, read_file)
    contents = described(path, named(path, weights), config, class_names=names, stated=stated)
    return contents, files


def _group(path: pathlib.Path, group: Any, read_file: _Open) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays of a group, which lie one after the other in its files taken together.

    Raises:
      UserError: a file is missing, or they have too few or too many bytes together.
    """
    shards = [_shard(path, name, read_file) for name in group["paths"]]
    content = shards[0] if len(shards) == 1 else b"".join(shards)
    files = listed(group["paths"], separator=", ") or "no files"
    start = 0
    for spec in group["weights"]:
        name, quantization = spec["name"], spec.get("quantization") or {}
        if not name.isprintable():
            raise UserError(f"{path} was refused: an array in it is named {ascii(name)[:100]}")
        kind = quantization.get("dtype", spec["dtype"])
        if kind not in _DTYPES:
            raise UserError(f"{path}: its {name} is of type {kind!r}, which holds no weights")
        shape = tuple(spec["shape"])
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise UserError(f"{path}: its {name} has the shape {ascii(spec['shape'])[:100]}")
        count = math.prod(shape)
        if count * _DTYPES[kind].itemsize > len(content) - start:
            raise UserError(
                f"{path}: its weights need more bytes than the {len(content):,} in {files}: a file "
                "is cut off or another model's"
            )
        array = np.frombuffer(content, _DTYPES[kind], count, start).reshape(shape)
        start += array.nbytes
        yield name, _scaled_back(array, quantization)
    if start != len(content):
        raise UserError(
            f"{path}: its weights take {start:,} bytes, and {files} have {len(content):,}: they "
            "are another model's"
        )


def _shard(path: pathlib.Path, name: str, read_file: _Open) -> bytes:
    """Reads a file of weights, which may only lie beside model.json or below it."""
    name = posixpath.normpath(name)
    if name.startswith(("/", "..")) or ":" in name or "\\" in name:
        raise UserError(f"{path} was refused: its weights lie elsewhere, in {name!r}")
    content = read_file(name)
    if content is None:
        raise UserError(f"{path}: its weights are in {name!r}, which is not beside it")
    return content


def _scaled_back(array: np.ndarray, quantization: Any) -> np.ndarray:
    """Returns float32 values for those of a quantised array; others as they are."""
    if "scale" not in quantization:
        return array
    scaled = array.astype(np.float32)
    with np.errstate(all="ignore"):  # whatever is not finite is refused in the end
        scaled *= np.float32(quantization["scale"])
        scaled += np.float32(quantization["min"])
    return scaled


def _metadata(path: pathlib.Path, read_file: _Open) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Returns the class names in metadata.json, and the fields that its writer is known to use."""
    text = read_file("metadata.json")
    metadata = parse(path, text) if text else None
    if not isinstance(metadata, dict):
        return (), {}
    labels = metadata.get("labels")
    if not isinstance(labels, list) or not all(_is_label(label) for label in labels):
        labels = []
    stated = _ITS_IMAGES if metadata.get("packageName") == _TEACHABLE_MACHINE else {}
    return tuple(labels), dict(stated)


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _pythonic(config: Any) -> Any:
    """Returns a config with Keras's names of settings: TensorFlow.js's own are className, ..."""
    if isinstance(config, list):
        return [_pythonic(value) for value in config]
    if not isinstance(config, dict):
        return "channels_last" if config == "channelsLast" else config
    return {
        re.sub(r"(?<=[a-z])[A-Z]", lambda capital: "_" + capital[0].lower(), key): _pythonic(value)
        for key, value in config.items()
    }
