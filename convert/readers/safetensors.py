"""Safetensors files: a JSON header, then the arrays."""

import json
import pathlib

import ml_dtypes
import numpy as np

from mbv2_jax.errors import UserError, listed

from .contents import Contents, no_averages, strip_wrappers

_DTYPES = {
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


def read(path: pathlib.Path, ema: bool | None) -> Contents:
    """Reads the arrays of a safetensors file, and its metadata.

    Raises:
      UserError: the file is damaged, has arrays of another type than numbers, or no averaged
        weights where `ema` asks for them.
    """
    if ema:
        raise no_averages(path)
    import safetensors

    content = path.read_bytes()
    try:
        entries = safetensors.deserialize(content)  # checks header, shapes and length
    except Exception as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    unknown = [
        f"{name} is {entry['dtype']}" for name, entry in entries if entry["dtype"] not in _DTYPES
    ]
    if unknown:
        raise UserError(f"{path} does not hold plain weights: {listed(unknown)}")
    tensors = {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
    return Contents(strip_wrappers(path, tensors), metadata=metadata or {})
