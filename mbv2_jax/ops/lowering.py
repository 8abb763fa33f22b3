"""The choice of a lowering: XLA's own operations, or those of `mbv2_jax.ops.cpu`."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# JAX makes the value a part of the key of its caches: what was traced with one value is not taken
# for the other.
_plain = jax.make_user_context(default_value=False)


def plain_lowering() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which every platform gets XLA's own convolutions.

    A program that is traced in it has none of the CPU lowerings and runs anywhere, as an exported
    one has to. Results are the same but for rounding. Jitted functions are safe to use inside and
    outside: JAX traces them anew for either.
    """
    return _plain(True)


def by_platform(*arrays: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """Applies `cpu` on CPUs and `default` elsewhere, which both give the same result.

    The compiled program has no conditional. `lax.platform_dependent` decides when the program is
    lowered, so that both functions are traced and differentiated. Where a mesh in context tells the
    platform, as in training, the choice is made at once, and tracing takes half the time.
    """
    if _plain.value:
        return default(*arrays)
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)
    return (cpu if device.platform == "cpu" else default)(*arrays)
