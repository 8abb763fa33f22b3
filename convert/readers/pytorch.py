"""PyTorch's weight files, opened without executing anything in them."""

import contextlib
import pathlib
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mbv2_jax.errors import UserError, first_line, listed
from mbv2_jax.installed import require

from .contents import Contents, no_averages, strip_wrappers

# In older versions a file could run code in spite of weights_only (CVE-2025-32434).
_SAFE_TORCH = (2, 6)

# Types of the logs, counters and options that training programs write beside the weights. A file
# may name them, and gets `_Inert` in their place, whether or not mmengine and the others are
# installed.
_HARMLESS = (
    # mmengine's Runner: message_hub. HistoryBuffer pickles its methods by `getattr`, which leads to
    # any code, and therefore must never be the real one.
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    # torchvision's and timm's training scripts: args
    "argparse.Namespace",
)

# The keys under which training programs keep the weights, and their moving average.
_RAW = ("state_dict", "model", "model_state_dict", "net")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")

# torch has one list of allowed names for the whole process.
_ALLOWING = threading.Lock()


class _Inert:
    """A stand-in for an object that a file names; it can be created and filled, and does nothing.

    torch's loader calls the allowed names (REDUCE, NEWOBJ) and sets the state of the objects that
    they return (BUILD); it refuses to call those objects.
    """

    def __new__(cls, *args: object) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"the result of {type(self).__name__}"


_STAND_INS = [(type(name, (_Inert,), {}), name) for name in _HARMLESS]


def read(path: pathlib.Path, ema: bool | None) -> Contents:
    """Reads the weights in a file of torch.save, and the class names beside them.

    Args:
      path: the file, in either of torch's serialisations.
      ema: None selects the weights that the program which wrote the file would load for use: the
        averaged ones where there are some (timm's load_checkpoint; torchvision publishes those;
        mmengine puts them under `state_dict`). True selects the averaged weights, False the others.

    Raises:
      UserError: the file would run code, is damaged, or does not hold such weights; or torch is not
        installed.
    """
    checkpoint = _load(path)
    selection, weights = _select(path, checkpoint, ema)
    tensors = strip_wrappers(path, _to_arrays(path, weights))
    return Contents(tensors, selection, _class_names(checkpoint))


def _load(path: pathlib.Path) -> Any:
    """Returns the object in a file of torch.save, on the CPU, with `_Inert` in place of logs.

    Raises:
      UserError: the file would run code, is damaged, or torch is not installed.
    """
    require(f"reading {path}", "torch", extra="convert")
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise UserError(
            f"reading {path} needs torch {'.'.join(map(str, _SAFE_TORCH))} or newer, here is"
            f" {torch.__version__}: run pip install '.[convert]' in the clone of mbv2_jax"
        )
    _check_crcs(path)
    try:
        with (
            open(path, "rb") as file,
            _only_harmless_names(torch.serialization),
            warnings.catch_warnings(action="ignore"),  # on types of storage, pickle's protocol, ...
        ):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from None
    # The type of error depends on the damage: RuntimeError, EOFError, struct.error, ...
    except Exception as error:
        raise UserError(f"{path} is damaged or cut off: {first_line(error)}") from None


def _select(path: pathlib.Path, checkpoint: Any, ema: bool | None) -> tuple[str, dict[str, Any]]:
    """Returns a clause that names the weights, "" where there are no others; and the weights.

    Raises:
      UserError: there are no such weights, or there are several sets of them.
    """
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path} holds a {type(checkpoint).__name__} instead of weights by name; in the program"
            " that wrote it, save model.state_dict()"
        )
    held = [key for key in (*_RAW, *_AVERAGED) if isinstance(checkpoint.get(key), dict)]
    averaged = [key for key in held if key in _AVERAGED]
    if "ema_state_dict" in held and "steps" in checkpoint["ema_state_dict"]:
        # mmengine's EMAHook swaps the two when it saves: `state_dict` holds the averaged weights.
        averaged = [key for key in held if key == "state_dict"]
    raw = [key for key in held if key not in averaged]
    if not held:
        if not any(_is_tensor(value) for value in checkpoint.values()):
            raise UserError(
                f"{path} holds no weights, neither directly nor under"
                f" {_quoted((*_RAW, *_AVERAGED))}; it holds {_quoted(checkpoint) or 'nothing'}"
            )
        if ema:
            raise no_averages(path)
        return "", checkpoint
    found = averaged if ema or (ema is None and averaged) else raw
    if not found:
        wanted, others = ("averaged (EMA)", raw) if ema else ("raw", averaged)
        raise UserError(f"{path} holds no {wanted} weights: only {_quoted(others)}")
    if len(found) > 1:
        raise UserError(
            f"{path} holds several sets of weights: {_quoted(found)}; save the right one"
            f" to a file of its own: torch.save(torch.load({path.name!r})[{found[0]!r}], ...)"
        )
    (key,) = found
    note = " (averaged: EMA)" if found is averaged else " (not the averaged ones)"
    return key + (note if averaged else ""), checkpoint[key]


def _to_arrays(path: pathlib.Path, weights: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Returns copies of the weights as numpy arrays; 16-bit floats become float32.

    Raises:
      UserError: some values are not tensors, or tensors that numpy cannot hold; lists them.
    """
    import torch

    faults = []
    found = {}
    for name, value in weights.items():
        if not isinstance(name, str):
            faults.append(f"{name!r} is not a name")
        elif not isinstance(value, torch.Tensor):
            faults.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.layout != torch.strided:
            faults.append(f"{name} is a {str(value.layout).removeprefix('torch.')} tensor")
        elif value.is_quantized:
            faults.append(f"{name} is a quantized tensor")
        elif value.is_meta:
            faults.append(f"{name} is a tensor without data")
        elif value.is_complex():
            faults.append(f"{name} is a tensor of complex numbers")
        else:
            value = value.detach()
            if value.is_floating_point() and value.dtype.itemsize < 4:
                value = value.float()  # numpy has no bfloat16
            found[name] = value.numpy().copy()
    if faults:
        raise UserError(f"{path} does not hold plain weights: {listed(faults)}")
    return found


def _class_names(checkpoint: Any) -> tuple[str, ...]:
    """Returns the class names that mmcls 0.x and mmpretrain 1.x keep in `meta`; () without any."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    if not isinstance(meta, dict):
        return ()
    dataset = meta.get("dataset_meta")
    names = dataset.get("classes") if isinstance(dataset, dict) else meta.get("CLASSES")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


@contextlib.contextmanager
def _only_harmless_names(serialization: Any) -> Iterator[None]:
    """Restricts torch's weights-only loader to the harmless names.

    Names that the user's own program has allowed, such as `getattr`, would let a file run code.
    """
    with _ALLOWING:
        others = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        try:
            serialization.add_safe_globals(_STAND_INS)
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(others)


def _check_crcs(path: pathlib.Path) -> None:
    """Checks the CRC of each member of a zip archive, which torch does not do.

    A user can switch the CRCs off: then torch.save writes 0.
    """
    if not zipfile.is_zipfile(path):
        return  # torch's older serialisation has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.external_attr & 0x10:  # torch would skip it silently
                    raise zipfile.BadZipFile(f"{member.filename} is marked as a folder")
                if member.CRC:
                    with archive.open(member) as file:
                        while file.read(1 << 20):
                            pass
    # The type of error depends on the damage: BadZipFile, EOFError, zlib.error, ...
    except Exception as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _refusal(path: pathlib.Path, error: str) -> str:
    """Returns the line that explains why torch's loader refused a file.

    Args:
      error: torch's message, of several paragraphs.
    """
    match = re.search(r"GLOBAL (.+?) (?:was not an allowed|whose module)", error)
    if not match:
        reason = error.rpartition("WeightsUnpickler error:")[2].partition("\n\nCheck the")[0]
        reason = " ".join(reason.split())
        if "operand" in reason:
            reason += ": it is damaged, or written in another pickle protocol than torch.save's"
        return f"{path} was refused: {reason}"
    name = match[1] if "." in match[1] else f"builtins.{match[1]}"
    if not name.isprintable():
        name = repr(name)
    line = f"{path} was refused: opening it would run {name}"
    if name.rpartition(".")[2][:1].isupper():
        line += (
            "; if it is a whole model, open it in the program that wrote it, and save"
            " model.state_dict()"
        )
    return line


def _quoted(names: Iterable[object], limit: int = 8) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:limit]) + (", ..." if len(quoted) > limit else "")


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
