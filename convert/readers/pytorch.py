"""PyTorch's weight files, read without PyTorch: pickles and the numbers of their tensors.

torch.save has written two structures:

  a zip archive (since torch 1.6)   NAME/data.pkl, and NAME/data/0, NAME/data/1, ... for numbers
  the "legacy" one before           five pickles one after another (a magic number, the version,
                                    the system, the object, the keys of its storages), then the
                                    count, 8 bytes, and the numbers of each storage

Nothing that a pickle names is imported or run, see torch_pickle.py.
"""

import dataclasses
import io
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mbv2_jax.errors import UserError, listed

from . import torch_modules
from .archive import Archive, open_archive
from .contents import Contents, Dense, damage_named, no_averages, strip_wrappers, unwrapped
from .torch_pickle import STORAGES, Machine, Made, Name, Refused, Storage, Tensor

# The keys under which training programs keep the weights, and their moving average.
_RAW = ("state_dict", "model", "model_state_dict", "net")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")


def read(path: pathlib.Path, ema: bool | None) -> Contents:
    """Reads the weights in a file of torch.save, and the class names beside them.

    Args:
      path: the file, in either of torch's serialisations. It holds arrays by name, a whole model,
        or a training program's checkpoint with either of them.
      ema: None selects the weights that the program which wrote the file would load for use: the
        averaged ones where there are some (timm's load_checkpoint; torchvision publishes those;
        mmengine puts them under `state_dict`). True selects the averaged weights, False the others.

    Raises:
      UserError: the file would run code, is damaged, or does not hold such weights.
    """
    with damage_named(path):
        try:
            if not zipfile.is_zipfile(path):
                return _contents(path, _load_legacy(path.read_bytes()), ema)
            with open_archive(path) as archive:
                return _contents(path, _load_zip(archive), ema)
        except Refused as error:
            raise UserError(f"{path} was refused: opening it would run {error}") from None


def _load_zip(archive: Archive) -> Any:
    """Returns the object in an archive, whose tensors are read from it when they are used."""
    (pickled,) = (name for name in archive.names if name.rpartition("/")[2] == "data.pkl")
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.names:
        _check_byte_order(archive.read(f"{folder}byteorder") == b"little")
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Storage:
        _, kind, key, _, count = identity
        dtype = _element(kind, key, count)

        def numbers() -> np.ndarray:
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)

        return storages.setdefault(key, Storage(dtype, count, numbers))

    return Machine(persistent).load(archive.read(pickled))


def _load_legacy(content: bytes) -> Any:
    """Returns the object in a file of the older structure."""
    file = io.BytesIO(content)
    storages: dict[str, Storage] = {}
    places: dict[str, int] = {}

    def persistent(identity: Any) -> Any:
        kind, *fields = identity
        if kind == "module":  # of a whole model: its class, and the source code of that
            return fields[0]
        storage_type, key, _, count, view = fields
        dtype = _element(storage_type, key, count)

        def numbers() -> np.ndarray:
            return np.frombuffer(content, dtype, count, places[key])

        storage = storages.setdefault(key, Storage(dtype, count, numbers))
        if view is None:
            return storage
        _, first, length = view
        if not 0 <= first <= first + length <= storage.count:
            raise ValueError("a part of a storage that lies outside it")
        return Storage(dtype, length, lambda: storage.array()[first : first + length])

    for _ in range(2):  # the magic number and the version
        Machine(persistent).load(file)
    system = Machine(persistent).load(file)
    _check_byte_order(system.get("little_endian", True) is True)
    checkpoint = Machine(persistent).load(file)
    for key in Machine(persistent).load(file):
        if not isinstance(key, str):  # hashing anything else could take for ever
            raise ValueError("a storage whose key is no text")
        count = int.from_bytes(file.read(8), "little")
        storage = storages[key]
        # A storage of bytes is counted in bytes, in files of torch 1.10 and later.
        if count != storage.count:
            raise ValueError(f"storage {key} has {count} numbers, not {storage.count}")
        places[key] = file.tell()
        file.seek(storage.count * storage.dtype.itemsize, io.SEEK_CUR)
    if file.tell() > len(content):
        raise ValueError("the last numbers are missing")
    return checkpoint


def _element(storage_type: Any, key: Any, count: Any) -> np.dtype[Any]:
    """Returns the type of the elements of a torch.FloatStorage and its like.

    Raises:
      ValueError: the type is no name, the key no text, or the count no plausible number.
    """
    if not isinstance(storage_type, Name) or not isinstance(key, str):
        raise ValueError("a storage without a type or a key")
    if type(count) is not int or not 0 <= count < 1 << 48:
        raise ValueError("a storage whose count of numbers is impossible")
    return np.dtype(STORAGES[storage_type.name.removesuffix("Storage")])


def _check_byte_order(little: bool) -> None:
    if not little:
        raise ValueError("its numbers are big-endian")


def _contents(path: pathlib.Path, checkpoint: Any, ema: bool | None) -> Contents:
    """Returns the weights of a checkpoint, with their arrays."""
    selection, weights = _select(path, checkpoint, ema)
    model = torch_modules.find(weights)
    if model is not None:
        weights = model.state
    contents = Contents(
        strip_wrappers(path, _to_arrays(path, weights)), selection, _class_names(checkpoint)
    )
    if model is None:
        return contents
    head = tuple(Dense(unwrapped(name), activation) for name, activation in model.head or ())
    return dataclasses.replace(contents, head=head or None, obstacles=model.obstacles)


def _select(path: pathlib.Path, checkpoint: Any, ema: bool | None) -> tuple[str, Any]:
    """Returns a clause that names the weights, "" where there are no others; and the weights.

    The weights are arrays by name, or a whole model.

    Raises:
      UserError: there are no such weights, or there are several sets of them.
    """
    if _holds_weights(checkpoint):
        if ema:
            raise no_averages(path)
        return "", checkpoint
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path} holds {_article(checkpoint)} instead of weights by name; in the program that "
            "wrote it, save model.state_dict()"
        )
    held = [key for key in (*_RAW, *_AVERAGED) if _holds_weights(checkpoint.get(key))]
    if not held:
        return _only_weights(path, checkpoint, ema)
    averaged = [key for key in held if key in _AVERAGED]
    ema_state = checkpoint.get("ema_state_dict")
    if isinstance(ema_state, dict) and "steps" in ema_state:
        # mmengine's EMAHook swaps the two when it saves: `state_dict` holds the averaged weights.
        averaged = [key for key in held if key == "state_dict"]
    raw = [key for key in held if key not in averaged]
    found = averaged if ema or (ema is None and averaged) else raw
    if not found:
        wanted, others = ("averaged (EMA)", raw) if ema else ("raw", averaged)
        raise UserError(f"{path} holds no {wanted} weights: only {_quoted(others)}")
    if len(found) > 1:
        raise _several(path, found)
    (key,) = found
    note = " (averaged: EMA)" if found is averaged else " (not the averaged ones)"
    return key + (note if averaged else ""), checkpoint[key]


def _only_weights(
    path: pathlib.Path, checkpoint: Mapping[str, Any], ema: bool | None
) -> tuple[str, Any]:
    """Returns the only weights in a checkpoint, whatever their key."""
    held = [key for key, value in checkpoint.items() if _holds_weights(value)]
    if not held:
        raise UserError(
            f"{path} holds no weights, neither directly nor under"
            f" {_quoted((*_RAW, *_AVERAGED))}; it holds {_quoted(checkpoint) or 'nothing'}"
        )
    if len(held) > 1:
        raise _several(path, held)
    if ema:
        raise no_averages(path)
    return held[0], checkpoint[held[0]]


def _several(path: pathlib.Path, keys: list[str]) -> UserError:
    return UserError(
        f"{path} holds several sets of weights: {_quoted(keys)}; save the right one to a file of"
        f" its own: torch.save(torch.load({path.name!r})[{keys[0]!r}], ...)"
    )


def _holds_weights(value: Any) -> bool:
    """Returns whether an object is a whole model, or has tensors by name."""
    if isinstance(value, dict):
        return any(isinstance(entry, Tensor) for entry in value.values())
    return torch_modules.is_module(value)


def _to_arrays(path: pathlib.Path, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the weights as numpy arrays.

    Raises:
      UserError: some values are not tensors, or tensors that numpy cannot hold; lists them.
    """
    faults = []
    found = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            faults.append(f"{name} is {_article(value)}, not a tensor")
        elif value.fault:
            faults.append(f"{name} {value.fault}")
        else:
            found[name] = value.array()
    if faults:
        raise UserError(f"{path} does not hold plain weights: {listed(faults)}")
    return found


def _class_names(checkpoint: Any) -> tuple[str, ...]:
    """Returns the class names that OpenMMLab's programs keep in `meta`; () without any."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    if not isinstance(meta, dict):
        return ()
    dataset = meta.get("dataset_meta")
    holder = dataset if isinstance(dataset, dict) else meta
    names = holder.get("classes", holder.get("CLASSES"))
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def _article(value: Any) -> str:
    """Returns the kind of a value that a pickle holds, such as "a list"."""
    if isinstance(value, Made):
        return f"an object of {value.name}"
    if isinstance(value, Tensor):
        return "a tensor"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _quoted(names: Iterable[object], limit: int = 8) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:limit]) + (", ..." if len(quoted) > limit else "")
