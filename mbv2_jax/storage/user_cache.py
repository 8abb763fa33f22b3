"""The user's cache folder, for files that only save time: indexes of data, compiled programs."""

import os
import pathlib


def folder() -> pathlib.Path:
    """Returns `mbv2_jax` in $XDG_CACHE_HOME, or in ~/.cache without it; it need not exist.

    Raises:
      FileNotFoundError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the standard says to ignore it
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise FileNotFoundError("no home folder")
    return pathlib.Path(base, "mbv2_jax")
