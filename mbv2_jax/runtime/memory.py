"""The process's memory."""

import contextlib
import ctypes
import sys


def give_back() -> None:
    """Gives to the system what was freed; for after compiling.

    glibc keeps it otherwise: 60 MB of an inference program's compilation, a gigabyte of a training
    step's. Other C libraries are left alone.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
