"""The classifier on top of the backbone: average pool, dropout, and dense layers to logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mbv2_jax.models.layers import Rounding, parameter_dtype
from mbv2_jax.ops import quantization
from mbv2_jax.spec import TrainingMode


class Classifier(nn.Module):
    """The last two rows of Table 2: average pool and classifier.

    The paper's has one dense layer; others may come before it.

    Parameters: hidden_{i}/{kernel,bias}, classifier/{kernel,bias}. Collection batch_stats, with
    `quantize`: pooled_range, hidden_{i}_range and classifier_range, see `layers.Rounding`. Training
    with dropout takes an rng named 'dropout'.

    Attributes:
      num_classes: number of logits.
      dropout: probability of dropping an input of a dense layer in training.
      dtype: compute dtype of the network. Pooled features and logits are always float32 or wider:
        they are few, so that bfloat16 would save no time, and only lose precision.
      hidden: widths of the dense layers with ReLU before the classifier.
      quantize: whether weights, and the results of the layers, are rounded to 8 bits.
    """

    num_classes: int
    dropout: float = TrainingMode.dropout
    dtype: Any = jnp.dtype(TrainingMode.dtype)
    hidden: tuple[int, ...] = ()
    quantize: bool = False

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Classifies a feature map (N, H, W, C).

        Returns:
          Logits (N, num_classes), float32, or float64 where `dtype` is.
        """
        kept = parameter_dtype(self.dtype)
        dense = partial(nn.Dense, dtype=kept, param_dtype=kept)
        if self.quantize:
            dense = partial(dense, dot_general=_rounded_dot_general)
        x = self._rounded(features.astype(kept).mean((1, 2)), "pooled_range")  # (N, C)
        for i, width in enumerate(self.hidden):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = dense(width, kernel_init=nn.initializers.he_normal(), name=f"hidden_{i}")(x)
            x = self._rounded(nn.relu(x), f"hidden_{i}_range")  # (N, width)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        init = nn.initializers.normal(0.01)
        x = dense(self.num_classes, kernel_init=init, name="classifier")(x)
        return self._rounded(x, "classifier_range")

    def _rounded(self, x: jax.Array, name: str) -> jax.Array:
        return Rounding(name=name)(x) if self.quantize else x


def _rounded_dot_general(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    return lax.dot_general(x, quantization.round_weights(kernel), *args, **options)
