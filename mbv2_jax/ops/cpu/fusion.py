"""A border across which XLA's CPU backend fuses nothing."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def as_separate_computation(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """Calls `function` as a computation of its own, across whose border XLA fuses nothing.

    Without the border XLA's CPU backend computes sums of shifted views again inside each of their
    users (normalisation, its statistics, its gradient), and their input again for each view. Its
    `optimization_barrier` doesn't help: it is gone before the CPU backend fuses. Functions that are
    jitted inside `function` (many of jax.numpy's) become separate as well: use lax there.

    Args:
      function: a function of a module: it is kept in a cache, with each set of options.
      arrays: trees of arrays.
      options: static, hashable.
    """
    with set_xla_metadata(inlineable="false"):
        return _jitted(function, **options)(*arrays)


@cache
def _jitted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns one jitted function for all layers: those of the same shape are traced once."""
    return jax.jit(partial(function, **options))
