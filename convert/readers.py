"""A file of another framework -> named numpy arrays. Nothing in a file is executed."""

import dataclasses
import hashlib
import json
import os
import pathlib

import ml_dtypes
import numpy as np

from mbv2_jax.errors import UserError, listed

from . import containers, keras_files, torch_files

_SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    **{
        f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}")
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class ForeignFile:
    """The weights in a file, as numpy arrays.

    Attributes:
      path: the file.
      sha256: of the whole file, hex.
      container: "torch", "safetensors" or "keras".
      tensors: the chosen weights by the names that their layout gives them ("features.0.0.weight",
        "Conv1/kernel"), without wrapper and without `module.`; float16 and bfloat16 as float32,
        other types as they are; every number finite.
      weights: which of the file's contents they are, e.g. "state_dict (averaged: EMA)"; "" where it
        holds nothing else.
      class_names: the file's own, in class order; () where it has none.
      metadata: what a safetensors file says of itself; {} elsewhere.
      guesses: what reading had to assume, a line each.
    """

    path: pathlib.Path
    sha256: str
    container: str
    tensors: dict[str, np.ndarray]
    weights: str = ""
    class_names: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    guesses: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], *, ema: bool | None = None) -> ForeignFile:
    """Reads the weights in a file; its content, not its name, tells what kind of file it is.

    Args:
      path: what torch.save wrote (in either of its serialisations), a safetensors file, or Keras's
        .keras, .weights.h5 or .h5.
      ema: where a file holds averaged weights beside the raw ones: True = the averaged ones, False
        = the raw ones, None = those that the program which wrote it would load for use.

    Returns:
      The weights.

    Raises:
      UserError: the file is missing, damaged, of another kind, would run code, or holds no weights
        of the kind asked for.
    """
    path = pathlib.Path(path)
    container = containers.identify(path)
    file = ForeignFile(path, _sha256(path), container, {})
    if container == "torch":
        checkpoint = torch_files.load(path)
        weights, chosen = torch_files.choose(path, checkpoint, ema)
        tensors = _bare_names(path, torch_files.arrays(path, chosen))
        names = torch_files.class_names(checkpoint)
        file = dataclasses.replace(file, tensors=tensors, weights=weights, class_names=names)
    else:
        if ema:
            raise UserError(f"{path} holds one set of weights, and calls none averaged (EMA)")
        if container == "safetensors":
            tensors, metadata = _safetensors(path)
            tensors = _bare_names(path, tensors)
            file = dataclasses.replace(file, tensors=tensors, metadata=metadata)
        else:
            tensors, guesses = keras_files.read(path)
            file = dataclasses.replace(file, tensors=tensors, guesses=guesses)
    tensors = {name: _widened(array) for name, array in file.tensors.items()}
    if not tensors:
        raise UserError(f"{path} holds no weights")
    _check_finite(path, tensors)
    return dataclasses.replace(file, tensors=tensors)


def _safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file: its arrays, and its metadata."""
    try:
        import safetensors
    except ImportError:
        raise UserError(
            f"reading {path} needs safetensors: pip install 'mbv2_jax[convert]'"
        ) from None
    content = path.read_bytes()
    try:
        entries = safetensors.deserialize(content)  # checks header, shapes and length
    except Exception as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    odd = [
        f"{name} is {entry['dtype']}"
        for name, entry in entries
        if entry["dtype"] not in _SAFETENSORS_TYPES
    ]
    if odd:
        raise UserError(f"{path} does not hold plain weights: {listed(odd)}")
    tensors = {
        name: np.frombuffer(entry["data"], _SAFETENSORS_TYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in entries
    }
    return tensors, metadata


def _bare_names(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes off what DistributedDataParallel, torch.compile and averaging put on."""
    bare: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name in ("n_averaged", "steps"):  # the counters of averaging
            continue
        parts = [part for part in name.split(".") if part not in ("module", "_orig_mod")]
        short = ".".join(parts)
        if short in bare:
            raise UserError(f"{path} has {short} twice: with and without a 'module.' prefix")
        bare[short] = array
    return bare


def _widened(array: np.ndarray) -> np.ndarray:
    """float16 and bfloat16 -> float32, exactly."""
    if array.dtype in (np.float16, ml_dtypes.bfloat16):
        return array.astype(np.float32)
    return array


def _check_finite(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    faults = [
        f"{name} has {np.count_nonzero(~np.isfinite(array)):,} of {array.size:,}"
        for name, array in tensors.items()
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all()
    ]
    if faults:
        raise UserError(f"{path} holds numbers that are NaN or infinite: {listed(faults)}")


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
