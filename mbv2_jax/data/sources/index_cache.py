"""Indexes of large datasets, kept between runs in the user's cache folder.

An index is a dict of numpy arrays in $XDG_CACHE_HOME/mbv2_jax/NAME.npz (~/.cache by default). Its
reader checks that it still fits the data. A cache that is damaged or cannot be written only costs
time.
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mbv2_jax.storage import atomic, user_cache


def load(kind: str, location: str) -> dict[str, np.ndarray] | None:
    """Returns the index that was saved for `location`; None if there is none, or it is damaged.

    Args:
      kind: the maker of the index and the version of its layout, such as "folder-1".
      location: the data's full path, or anything else that identifies it.
    """
    try:
        with np.load(_path(kind, location), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}  # checks their CRCs
    # A damaged file raises any error of zipfile, zlib or numpy.
    except Exception:
        return None


def save(kind: str, location: str, arrays: Mapping[str, Any]) -> None:
    """Saves an index, or does nothing where the folder cannot be written.

    Two processes may save the same index at once: the last one wins.

    Args:
      kind: see `load`.
      location: see `load`.
      arrays: numpy arrays by their names.
    """
    with contextlib.suppress(OSError):
        path = _path(kind, location)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.open_file(path, "wb") as file:
            np.savez(file, **arrays)


def _path(kind: str, location: str) -> pathlib.Path:
    digest = hashlib.sha256(os.fsencode(location)).hexdigest()[:24]
    return user_cache.folder() / f"{kind}-{digest}.npz"
