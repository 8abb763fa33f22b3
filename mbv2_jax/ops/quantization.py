"""Rounding to 8 bits in training, by the rules of LiteRT's 8-bit files.

A network that trains with these roundings learns weights that lose little in such a file. Values
stay floats: each becomes the float that its 8-bit number stands for. Gradients go through a
rounding as if it were not there (the straight-through estimator, arXiv:1308.3432), and are 0 where
a value was cut off at the end of its range.

The rules are those of https://ai.google.dev/edge/litert/models/quantization_spec: weights are int8
from -127 to 127 with a scale for each output channel and zero point 0; activations are int8 from
-128 to 127 with one scale and one zero point.
"""

import jax
import jax.numpy as jnp
from jax import lax

_LARGEST_WEIGHT = 127
_LEAST, _LARGEST = -128, 127


def round_weights(kernel: jax.Array) -> jax.Array:
    """Rounds weights to 8 bits.

    Args:
      kernel: (..., C'), floating; each output channel has its own scale.

    Returns:
      The same shape and dtype.
    """
    largest = jnp.max(abs(kernel), range(kernel.ndim - 1), keepdims=True)
    scale = jnp.where(largest > 0, largest / _LARGEST_WEIGHT, 1)
    rounded = jnp.round(kernel / scale) * scale
    return kernel + lax.stop_gradient(rounded - kernel)


def round_activations(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Rounds activations to 8 bits over a range.

    Args:
      x: floating, of any shape.
      low, high: (), the ends of the range, low <= 0 <= high, so that 0 is a number of its own, as
        the zeros of padding need it. Where both are 0, nothing is rounded.

    Returns:
      The same shape and dtype; the arithmetic has the dtype of `low`.
    """
    wide = x.astype(low.dtype)
    known = high > low
    scale = jnp.where(known, (high - low) / (_LARGEST - _LEAST), 1)
    zero = jnp.round(_LEAST - low / scale)
    number = jnp.round(wide / scale) + zero
    rounded = (jnp.clip(number, _LEAST, _LARGEST) - zero) * scale
    inside = jnp.clip(wide, (_LEAST - zero) * scale, (_LARGEST - zero) * scale)
    result = inside + lax.stop_gradient(rounded - inside)
    return jnp.where(known, result, wide).astype(x.dtype)


def range_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest value of an array and 0, in float32 or wider."""
    wide = jnp.promote_types(jnp.float32, x.dtype)
    return (
        jnp.minimum(x.min(), 0).astype(wide),
        jnp.maximum(x.max(), 0).astype(wide),
    )
