"""Readers of weight files: a container -> {name: array}. Nothing in a file is executed.

    torch          pytorch.py       torch.save, in either of its serialisations
    safetensors    safetensors.py
    keras          keras.py         .keras, .weights.h5 and .h5
    tfjs           tfjs.py          model.json with files of weights beside it, or both in a zip
    frozen graph   frozen_graph.py  TensorFlow's .pb, also in a .tgz
    tflite         tflite.py        .tflite

To read another container, add a file here with a function `read(path, ema)`, an entry to
`_READERS`, and a check to identify.py.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from mbv2_jax.errors import UserError, listed

from . import frozen_graph, identify, keras, pytorch, safetensors, tfjs, tflite
from .contents import Contents

# A byte or more for each number, of which the zip archives allow eight times as many. Those that
# become float32 take memory of their own, also where they share what the file has of them.
_RATIO = 8
_WIDENED_RATIO = 1
_PLAIN = 1 << 22

_LONGEST_NAME = 1000  # characters
_HALVES = (np.float16, ml_dtypes.bfloat16)

_READERS: dict[str, Callable[[pathlib.Path, bool | None], Contents]] = {
    "torch": pytorch.read,
    "safetensors": safetensors.read,
    "keras": keras.read,
    "tfjs": tfjs.read,
    "frozen graph": frozen_graph.read,
    "tflite": tflite.read,
}


@dataclasses.dataclass(frozen=True)
class ForeignFile:
    """A weight file of another framework.

    Attributes:
      path: the file.
      sha256: of the whole file, and of those beside it that hold its weights, hex.
      container: a key of `_READERS`, such as "torch".
      contents: its weights; float16 and bfloat16 as float32, other types as they are; every number
        is finite.
    """

    path: pathlib.Path
    sha256: str
    container: str
    contents: Contents

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The weights by name."""
        return self.contents.tensors


def read(path: str | os.PathLike[str], *, ema: bool | None = None) -> ForeignFile:
    """Reads the weights in a file, whose container is recognised by its content.

    Args:
      path: a file of torch.save, a safetensors file, Keras's .keras, .weights.h5 or .h5,
        TensorFlow.js's model.json or a .zip of it, TensorFlow's frozen graph (.pb, or a .tgz that
        holds one), or a .tflite file.
      ema: for a file that holds averaged weights beside the raw ones: True selects the averaged
        ones, False the raw ones, and None those that the program which wrote it would load for use.

    Raises:
      UserError: the file is missing, damaged or of another kind, would run code, or does not hold
        the weights asked for.
    """
    path = pathlib.Path(path)
    container = identify.container(path)
    contents = _READERS[container](path, ema)
    _check_names(path, contents.tensors)
    if not contents.tensors:
        raise UserError(f"{path} holds no weights")
    files = (path, *contents.beside)
    _check_size(files, contents.tensors)
    tensors = {name: _to_float32(array) for name, array in contents.tensors.items()}
    _check_finite(path, tensors)
    contents = dataclasses.replace(contents, tensors=tensors)
    return ForeignFile(path, _sha256(files), container, contents)


def _check_names(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Refuses names that no program gives to arrays, since messages repeat them."""
    for name in tensors:
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise UserError(f"{path} was refused: an array in it is named {ascii(name)[:100]}")


def _check_size(files: Sequence[pathlib.Path], tensors: dict[str, np.ndarray]) -> None:
    """Refuses arrays that files of this size cannot hold, since they would fill the memory."""
    held = sum(file.stat().st_size for file in files)
    size = sum(array.size for array in tensors.values())
    widened = sum(array.size for array in tensors.values() if array.dtype in _HALVES)
    if size > _RATIO * held + _PLAIN or widened > _WIDENED_RATIO * held + _PLAIN:
        raise UserError(
            f"{files[0]} was refused: it has {held:,} bytes, and its arrays {size:,} numbers"
        )


def _to_float32(array: np.ndarray) -> np.ndarray:
    """Returns float16 and bfloat16 as float32, which is exact; other types as they are."""
    if array.dtype in _HALVES:
        return array.astype(np.float32)
    return array


def _check_finite(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    faults = [
        f"{name} has {np.count_nonzero(~np.isfinite(array)):,} of {array.size:,}"
        for name, array in tensors.items()
        if np.issubdtype(array.dtype, np.inexact) and not _is_finite(array)
    ]
    if faults:
        raise UserError(f"{path} holds numbers that are NaN or infinite: {listed(faults)}")


def _is_finite(array: np.ndarray) -> bool:
    """Returns whether all numbers are finite; takes no memory, as np.isfinite of them would."""
    return not array.size or bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _sha256(files: Sequence[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 16):
                digest.update(chunk)
    return digest.hexdigest()
