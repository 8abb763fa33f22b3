"""The arithmetic of batch normalisation, and activations that the next convolution computes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Normalization(NamedTuple):
    """A normalisation, (x - mean) * factor + bias, of a batch in G groups.

    Attributes:
      mean: (G, 1, 1, 1, C).
      factor: (G, 1, 1, 1, C).
      bias: (C,).
    """

    mean: jax.Array
    factor: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeferredActivation:
    """A convolution's result whose normalisation and ReLU6 are still pending.

    In training the next convolution applies both while it reads the result
    (`conv.convolution_with_statistics`), so that the activation itself is never stored. To other
    code it looks like an array: `shape`, `dtype`, `astype` and `+` are those of the activation.

    Attributes:
      x: (N, H, W, C), the convolution's result.
      norm: its normalisation, with ReLU6 after it.
    """

    x: jax.Array
    norm: Normalization

    @property
    def shape(self) -> tuple[int, ...]:
        """The activation's shape, (N, H, W, C)."""
        return self.x.shape

    @property
    def dtype(self) -> Any:
        """The activation's dtype."""
        return self.x.dtype

    def astype(self, dtype: Any) -> "Activation":
        """Returns the activation in `dtype`, still deferred if it has this dtype already."""
        return self if dtype == self.dtype else materialize(self).astype(dtype)

    def __add__(self, other: jax.Array) -> jax.Array:
        return materialize(self) + other


Activation = jax.Array | DeferredActivation


def materialize(x: Activation) -> jax.Array:
    """Applies the pending normalisation and ReLU6, if any."""
    if isinstance(x, DeferredActivation):
        return jax.nn.relu6(normalize(x.x, x.norm))
    return x


def normalize(x: jax.Array, norm: Normalization) -> jax.Array:
    """Normalises (N, H, W, C) group by group.

    Returns:
      (N, H, W, C) in x's dtype; the arithmetic has the dtype of `norm`.
    """
    wide = x.reshape(norm.mean.shape[0], -1, *x.shape[1:]).astype(norm.factor.dtype)
    if x.dtype == norm.factor.dtype:
        y = (wide - norm.mean) * norm.factor + norm.bias
    else:
        y = wide * norm.factor + (norm.bias - norm.mean * norm.factor)
    return y.reshape(x.shape).astype(x.dtype)


def batch_statistics(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the biased variance of (N, H, W, C) in consecutive groups.

    In float32 and wider, the variance takes a second pass over x, because E[x^2] - E[x]^2 cancels:
    it loses four digits if a channel's mean is a hundred times its standard deviation, and all of
    them at some thousand times, as with a frozen or badly scaled input. A bfloat16 x is rounded to
    2^-9 of its size already, which loses more than the cancellation in float32. Both sums are then
    taken in one pass: it is bound by memory bandwidth, and neither the pass nor its gradient reads
    x a second time (docs/tpu_step.md).

    Returns:
      Two arrays (groups, 1, 1, 1, C), float32 or wider.
    """
    wide = x.reshape(groups, -1, *x.shape[1:]).astype(jnp.promote_types(jnp.float32, x.dtype))
    mean = wide.mean((1, 2, 3), keepdims=True)
    if x.dtype == wide.dtype:
        return mean, lax.square(wide - mean).mean((1, 2, 3), keepdims=True)
    square = lax.square(wide).mean((1, 2, 3), keepdims=True)
    return mean, jnp.maximum(square - lax.square(mean), 0)
