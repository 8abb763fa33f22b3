"""Files that torch.load opens, written without PyTorch.

The structure is that of torch.save: a zip archive of a pickle, in protocol 2, and of the numbers of
each tensor, in members that begin at multiples of 64 bytes, so that torch can map them into memory.
`torch.load(file, weights_only=True)` opens it, since its pickle names nothing but tensors.
"""

import io
import math
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

_FOLDER = "weights"  # torch names it after the file, and accepts any name
_ALIGNMENT = 64
_HEADER = 30  # bytes before a member's name in the archive
_STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}


def encode(content: Any) -> bytes:
    """Returns a file of torch.save.

    Args:
      content: dicts with text for keys, lists, text, and numpy arrays, float32 or int64, which
        become tensors.
    """
    arrays: list[np.ndarray] = []
    pickled = pickle.PROTO + b"\x02" + _pickled(content, arrays) + pickle.STOP
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", pickled)
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(arrays):
            _add(archive, f"data/{key}", array.astype(array.dtype.newbyteorder("<")).tobytes())
        _add(archive, "version", b"3\n")
    return buffer.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds a member whose content begins at a multiple of `_ALIGNMENT` bytes."""
    member = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    assert archive.fp is not None
    begin = archive.fp.tell() + _HEADER + len(member.filename) + 4
    padding = -begin % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # as torch does
    archive.writestr(member, content)


def _pickled(value: Any, arrays: list[np.ndarray]) -> bytes:
    """Returns the instructions that make a value, and appends its arrays to `arrays`."""
    if isinstance(value, np.ndarray):
        return _tensor(value, arrays)
    if isinstance(value, dict):
        items = b"".join(_pickled(entry, arrays) for pair in value.items() for entry in pair)
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, list):
        entries = b"".join(_pickled(entry, arrays) for entry in value)
        return pickle.EMPTY_LIST + pickle.MARK + entries + pickle.APPENDS
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    raise TypeError(f"torch_file does not write a {type(value).__name__}")


def _tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    """Returns the instructions of torch._utils._rebuild_tensor_v2 for a contiguous tensor."""
    storage = pickle.MARK + _pickled("storage", arrays)
    storage += _name("torch", _STORAGES[array.dtype]) + _pickled(str(len(arrays)), arrays)
    storage += _pickled("cpu", arrays) + _integer(array.size) + pickle.TUPLE + pickle.BINPERSID
    arrays.append(array)
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    arguments = storage + _integer(0) + _integers(array.shape) + _integers(strides)
    arguments += pickle.NEWFALSE + _name("collections", "OrderedDict")
    arguments += pickle.EMPTY_TUPLE + pickle.REDUCE
    call = _name("torch._utils", "_rebuild_tensor_v2")
    return call + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _integers(values: Any) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE


def _integer(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)
