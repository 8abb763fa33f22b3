"""Runs `mbv2_jax.main` with a seventh of the network's layers.

Most of a short run's time is compilation, which depends on the number of layers, not on their size.
Everything else is the real command.
"""

import contextlib
import importlib.abc
import sys
from collections.abc import Iterator
from typing import Any

from mbv2_jax.models import mobilenet_v2

# The short network's `mobilenet_v2.STAGES`: the first and the last block, and none between them.
STAGES: Any = tuple(
    stage._replace(blocks=int(number in (1, 7)))
    for number, stage in enumerate(mobilenet_v2.STAGES, start=1)
)


class _NoTorch(importlib.abc.MetaPathFinder):
    """Hides torch, as if it were not installed: tensorboardX takes two seconds to import it."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "torch":
            raise ModuleNotFoundError(name=fullname)


@contextlib.contextmanager
def in_use() -> Iterator[None]:
    """Replaces the network by the short one for everything that is traced in this context."""
    whole = mobilenet_v2.STAGES
    mobilenet_v2.STAGES = STAGES
    try:
        yield
    finally:
        mobilenet_v2.STAGES = whole


if __name__ == "__main__":
    sys.meta_path.insert(0, _NoTorch())
    from mbv2_jax import command_line, main

    with in_use():
        command_line.run(main.main)
