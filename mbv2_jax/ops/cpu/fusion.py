"""A boundary across which XLA's CPU backend does not fuse."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def as_separate_computation(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """Calls `function` as a separate computation, across whose boundary XLA does not fuse.

    Without the boundary, XLA's CPU backend recomputes sums of shifted views inside each of their
    users (normalisation, its statistics, its gradient), and the views' input for each view.
    `optimization_barrier` does not help, since it is removed before the CPU backend fuses.
    Functions that are jitted inside `function`, as many of jax.numpy's are, become separate as
    well: use lax there.

    Args:
      function: a module's function; a jitted copy is cached for each set of options.
      arrays: trees of arrays.
      options: static, hashable.
    """
    with set_xla_metadata(inlineable="false"):
        return _jitted(function, **options)(*arrays)


@cache
def _jitted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns the jitted function that all layers share: layers of one shape are traced once."""
    return jax.jit(partial(function, **options))
