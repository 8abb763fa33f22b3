"""The state that a training run carries from step to step, and that checkpoints save."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mbv2_jax.models.layers import is_range
from mbv2_jax.training.settings import Ema


@flax.struct.dataclass
class TrainState:
    """Everything that step N + 1 depends on.

    Attributes:
      step: () int32, the number of steps done, which determines the randomness of the next step
        and its position in the data.
      params: the network's parameters, float32.
      batch_stats: BatchNorm's running means and variances, and the ranges of activations of a
        network that rounds to 8 bits; float32.
      opt_state: the state of the optax optimizer.
      ema: {"params", "batch_stats"}, the exponential moving average of both; None without one.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: dict[str, Any] | None

    def evaluated(self) -> dict[str, Any]:
        """Returns the variables to evaluate and ship: the average where there is one."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create(
    key: jax.Array,
    *,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    with_ema: bool,
) -> TrainState:
    """Returns the state of step 0; under jit, its arrays are created with their sharding.

    Args:
      key: a jax.random key.
      network: the linen module.
      optimizer: from training/optimizer.py.
      image_size: side of the input in pixels, which does not change the parameters.
      with_ema: whether the state has a moving average.
    """
    variables = network.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32))
    return from_variables(variables, optimizer=optimizer, with_ema=with_ema)


def from_variables(
    variables: Any, *, optimizer: optax.GradientTransformation, with_ema: bool = False
) -> TrainState:
    """Returns the state of step 0 with the given {"params", "batch_stats"}.

    Args:
      variables: arrays of jax or of numpy. They are part of the state, and thus deleted with it
        where a step donates it.
      optimizer: any optax optimizer.
      with_ema: whether the state has a moving average.
    """
    params, batch_stats = variables["params"], variables["batch_stats"]
    # The average starts as a copy: a donated buffer must not be in the state twice.
    ema = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=ema if with_ema else None,
    )


def average(old: Any, new: Any, step: jax.Array, ema: Ema) -> Any:
    """Returns the exponential moving average after a step.

    Ranges of activations (`layers.Rounding`), which are running averages already, are those of the
    step: one that started at 0 would be too small for thousands of steps.

    Args:
      old: the average before.
      new: the parameters and statistics after the step.
      step: () int, the number of steps done.
      ema: the share of the old average that an update keeps, and the steps between two updates; in
        between the average stays as it is.
    """
    assert ema.decay is not None
    updated = jax.tree_util.tree_map_with_path(
        lambda path, after, mean: after if is_range(path) else mean,
        new,
        optax.incremental_update(new, old, 1.0 - ema.decay),
    )
    # Not lax.cond: it would copy its result, and on a GPU may wait for the host.
    due = step % ema.every_steps == 0
    return jax.tree.map(lambda after, before: jnp.where(due, after, before), updated, old)
