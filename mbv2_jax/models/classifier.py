"""The classifier on top of the backbone: average pool, dropout, and dense layers to logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbv2_jax.models.layers import parameter_dtype
from mbv2_jax.spec import TrainingMode


class Classifier(nn.Module):
    """The last two rows of Table 2: average pool and classifier.

    The paper's has one dense layer; others may come before it.

    Parameters: hidden_{i}/{kernel,bias}, classifier/{kernel,bias}. Training with dropout takes an
    rng named 'dropout'.

    Attributes:
      num_classes: number of logits.
      dropout: probability of dropping an input of a dense layer in training.
      dtype: compute dtype of the network. Pooled features and logits are always float32 or wider:
        they are few, so that bfloat16 would save no time, and only lose precision.
      hidden: widths of the dense layers with ReLU before the classifier.
    """

    num_classes: int
    dropout: float = TrainingMode.dropout
    dtype: Any = jnp.dtype(TrainingMode.dtype)
    hidden: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Classifies a feature map (N, H, W, C).

        Returns:
          Logits (N, num_classes), float32, or float64 where `dtype` is.
        """
        kept = parameter_dtype(self.dtype)
        x = features.astype(kept).mean((1, 2))  # (N, C)
        for i, width in enumerate(self.hidden):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.Dense(
                width,
                dtype=kept,
                param_dtype=kept,
                kernel_init=nn.initializers.he_normal(),
                name=f"hidden_{i}",
            )(x)
            x = nn.relu(x)  # (N, width)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(
            self.num_classes,
            dtype=kept,
            param_dtype=kept,
            kernel_init=nn.initializers.normal(0.01),
            name="classifier",
        )(x)
