"""PyTorch's weight files: opened without executing anything, and the weights found in them."""

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

from mbv2_jax.errors import UserError, listed

# In older versions a file could run code in spite of weights_only (CVE-2025-32434).
_SAFE_TORCH = (2, 6)

# What training programs write beside the weights, and nobody here needs: logs, counters, options.
# Files name these; what they get is _Inert, also where mmengine and its like are not installed.
_HARMLESS = (
    # mmengine's Runner: message_hub. HistoryBuffer pickles its methods by `getattr`, which is a
    # way to any code there is, and so is never the real one.
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

# Where training programs put the weights, and their moving average.
_RAW = ("state_dict", "model", "model_state_dict", "net")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")

# torch keeps its list of allowed names for the whole process.
_ALLOWING = threading.Lock()


class _Inert:
    """Takes the place of an object that a file names: it can be made and filled, and does nothing.

    torch's loader calls the allowed names (REDUCE, NEWOBJ) and fills what they return (BUILD);
    calling what they return it refuses.
    """

    def __new__(cls, *args: object) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"what {type(self).__name__} returns"


_STAND_INS = [(type(name, (_Inert,), {}), name) for name in _HARMLESS]


def load(path: pathlib.Path) -> Any:
    """Returns what torch.save wrote to `path`, on the CPU, with `_Inert` for what is not weights.

    Raises:
      UserError: the file would run code, is damaged, or torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path} needs torch: pip install 'mbv2_jax[convert]'") from None

    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise UserError(
            f"reading {path} needs torch {'.'.join(map(str, _SAFE_TORCH))} or newer, here is"
            f" {torch.__version__}: pip install 'mbv2_jax[convert]'"
        )
    _check_sums(path)
    try:
        with (
            open(path, "rb") as file,
            _only_harmless_names(torch.serialization),
            warnings.catch_warnings(action="ignore"),  # on types of storage, pickle's protocol, ...
        ):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from None
    # By where the damage is: RuntimeError, EOFError, KeyError, IndexError, struct.error, ...
    except Exception as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or cut off: {what}") from None


def choose(path: pathlib.Path, checkpoint: Any, ema: bool | None) -> tuple[str, dict[str, Any]]:
    """Finds the weights in what a file holds.

    Args:
      path: the file, for messages.
      checkpoint: what `load` returned.
      ema: None = what the program that wrote the file would load for use: the averaged weights
        where there are some (timm's load_checkpoint; torchvision publishes those; mmengine puts
        them under `state_dict`). True = the averaged weights, False = the others.

    Returns:
      A word for the summary on which ones they are, "" where the file holds nothing else; and the
      weights as {name: whatever the file has there}.

    Raises:
      UserError: there are no such weights, or it is not clear which ones they are.
    """
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path} holds no weights by name but a {type(checkpoint).__name__}; in the program"
            " that wrote it, save model.state_dict()"
        )
    held = [key for key in (*_RAW, *_AVERAGED) if isinstance(checkpoint.get(key), dict)]
    averaged = [key for key in held if key in _AVERAGED]
    if "ema_state_dict" in held and "steps" in checkpoint["ema_state_dict"]:
        # mmengine's EMAHook exchanges the two when it saves, so that `state_dict` is for use.
        averaged = [key for key in held if key == "state_dict"]
    raw = [key for key in held if key not in averaged]
    if not held:
        if not any(_is_tensor(value) for value in checkpoint.values()):
            raise UserError(
                f"{path} holds no weights, neither directly nor under"
                f" {_quoted((*_RAW, *_AVERAGED))}; it holds {_quoted(checkpoint) or 'nothing'}"
            )
        if ema:
            raise UserError(f"{path} holds one set of weights, and calls none averaged (EMA)")
        return "", checkpoint
    found = averaged if ema or (ema is None and averaged) else raw
    if not found:
        wanted, others = ("averaged (EMA)", raw) if ema else ("other than averaged", averaged)
        raise UserError(f"{path} holds no weights {wanted}: only {_quoted(others)}")
    if len(found) > 1:
        raise UserError(
            f"{path} holds several sets of weights: {_quoted(found)}; save the one that is meant"
            f" to a file of its own: torch.save(torch.load({path.name!r})[{found[0]!r}], ...)"
        )
    (key,) = found
    note = " (averaged: EMA)" if found is averaged else " (not the averaged ones)"
    return key + (note if averaged else ""), checkpoint[key]


def arrays(path: pathlib.Path, weights: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Returns the weights as numpy arrays, copies, of the file's types; 16 bits become float32.

    Raises:
      UserError: something is no tensor, or one that numpy cannot hold; all such are named.
    """
    import torch

    faults = []
    found = {}
    for name, value in weights.items():
        if not isinstance(name, str):
            faults.append(f"{name!r} is no name")
        elif not isinstance(value, torch.Tensor):
            faults.append(f"{name} is no tensor but a {type(value).__name__}")
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


def class_names(checkpoint: Any) -> tuple[str, ...]:
    """Returns the class names that mmcls 0.x and mmpretrain 1.x keep in `meta`, () without any."""
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
    """Lets torch's weights-only loader know the harmless names, and none that others registered.

    What a user's own program allowed, `getattr` perhaps, would otherwise be run by a file.
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


def _check_sums(path: pathlib.Path) -> None:
    """Checks the CRC of each member of a zip archive, which torch does not.

    torch.save writes 0 in their place where a user has switched them off.
    """
    if not zipfile.is_zipfile(path):
        return  # torch's older serialisation has no check sums
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.external_attr & 0x10:  # torch would not read it, and not say so either
                    raise zipfile.BadZipFile(f"{member.filename} is marked as a folder")
                if member.CRC:
                    with archive.open(member) as file:
                        while file.read(1 << 20):
                            pass
    # By where the damage is: BadZipFile, EOFError, NotImplementedError, zlib.error, ...
    except Exception as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _refusal(path: pathlib.Path, error: str) -> str:
    """Says in a line what torch's loader did not want to do for the file."""
    match = re.search(r"GLOBAL (.+?) (?:was not an allowed|whose module)", error)
    if not match:
        what = error.rpartition("WeightsUnpickler error:")[2].partition("\n\nCheck the")[0].strip()
        if "operand" in what:
            what += ": it is damaged, or saved with another pickle protocol than torch.save's own"
        return f"{path} was refused: {' '.join(what.split())}"
    name = match[1] if "." in match[1] else f"builtins.{match[1]}"
    if not name.isprintable():
        name = repr(name)
    text = f"{path} was refused: opening it would run {name}"
    if name.rpartition(".")[2][:1].isupper():
        text += (
            "; if it is a whole model, open it in the program that wrote it, and save"
            " model.state_dict()"
        )
    return text


def _quoted(names: Iterable[object], limit: int = 8) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:limit]) + (", ..." if len(quoted) > limit else "")


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
