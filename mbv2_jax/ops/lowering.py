"""The choice of a lowering: XLA's own operations, or those of `mbv2_jax.ops.cpu`."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# The values are part of the key of JAX's caches: a program traced with some values is never reused
# for others.
_plain = jax.make_user_context(default_value=None)
_PLAIN, _COMPOSITES = "plain", "plain with composites"
_platform = jax.make_user_context(default_value=None)


def plain_lowering(*, composites: bool = False) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which every platform gets XLA's own convolutions.

    A program traced in this context has none of the CPU lowerings, and therefore runs on every
    platform, as an exported program must. Results differ by rounding only. A jitted function may be
    called both inside and outside the context: JAX traces it separately for each.

    Args:
      composites: whether operations that other formats have, and XLA has not, are `lax.composite`s
        with the names by which LiteRT's converter knows them. JAX can lower those only for a known
        batch size and for one platform, and vmap cannot take them.
    """
    return _plain(_COMPOSITES if composites else _PLAIN)


def has_composites() -> bool:
    """Returns whether the program is traced in `plain_lowering(composites=True)`."""
    return bool(_plain.value == _COMPOSITES)


def lowering_for(platform: str | None) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which `by_platform` chooses at once, which halves the time for tracing.

    A program traced in this context computes the same, but is made for one platform.

    Args:
      platform: such as "cpu"; None leaves the choice open until the program is lowered.
    """
    return _platform(platform)


def by_platform(*arrays: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """Applies `cpu` on CPUs and `default` elsewhere; both must give the same result.

    The compiled program has no conditional. `lax.platform_dependent` decides when the program is
    lowered, so both functions are traced and differentiated. If the platform is known, from
    `lowering_for` or, as in training, from a mesh in context, the choice is made at once, which
    halves the time for tracing.
    """
    if _plain.value:
        return default(*arrays)
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = _platform.value or (device and device.platform)
    if platform is None:
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)
    return (cpu if platform == "cpu" else default)(*arrays)
