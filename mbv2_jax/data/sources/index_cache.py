"""Indexes of large datasets, kept between runs in the user's cache folder.

An index is a dict of numpy arrays in $XDG_CACHE_HOME/mbv2_jax/NAME.npz (~/.cache by default). Its
reader checks that it still fits the data. A cache that is damaged or cannot be written costs time
only.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np


def load(kind: str, location: str) -> dict[str, np.ndarray] | None:
    """Returns the index that was saved for `location`; None if there is none, or it is damaged.

    Args:
      kind: the maker of the index and the version of its layout, such as "folder-1".
      location: the data's full path, or anything else that tells it from other data.
    """
    try:
        with np.load(_path(kind, location), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}  # checks their CRCs
    # A damaged file raises any error of zipfile, zlib or numpy.
    except Exception:
        return None


def save(kind: str, location: str, arrays: Mapping[str, Any]) -> None:
    """Saves an index of numpy arrays; does nothing if the folder cannot be written.

    Processes may save at the same time: each writes a file of its own and renames it, and the last
    one stays.
    """
    with contextlib.suppress(OSError):
        path = _path(kind, location)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _path(kind: str, location: str) -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG standard says to ignore relative paths
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise FileNotFoundError("no home folder")
    digest = hashlib.sha256(os.fsencode(location)).hexdigest()[:24]
    return os.path.join(base, "mbv2_jax", f"{kind}-{digest}.npz")
