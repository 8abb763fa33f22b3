"""The choice between two lowerings of the same result."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def by_platform(*arrays: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """Returns what `cpu` gives on CPUs, `default` elsewhere; both give the same.

    No conditional is left. `lax.platform_dependent` decides when the program is lowered, so that
    both functions are traced and differentiated; where a mesh in context tells the platform, as in
    training, it is decided at once, and tracing takes half the time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)
    return (cpu if device.platform == "cpu" else default)(*arrays)
