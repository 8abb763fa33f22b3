"""The state that a training run carries from step to step, and checkpoints save."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mbv2_jax.models.mobilenet_v2 import MobileNetV2


@flax.struct.dataclass
class TrainState:
    """Everything that step N + 1 needs to know of the steps before it.

    Attributes:
      step: () int32, the number of steps done. Randomness and data position follow from it.
      params: the network's parameters, float32.
      batch_stats: BatchNorm's running means and variances, float32.
      opt_state: the optimizer's, one optax state.
      ema: {"params", "batch_stats"}, the exponential moving average of both; None without one.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: dict[str, Any] | None

    def evaluated(self) -> dict[str, Any]:
        """Returns the variables that are evaluated and shipped: the average where there is one."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create(
    key: jax.Array,
    *,
    model: MobileNetV2,
    optimizer: optax.GradientTransformation,
    image_size: int,
    with_ema: bool,
) -> TrainState:
    """Returns the state of step 0. Pure, so that under jit the arrays are born sharded.

    Args:
      key: a jax.random key.
      model: the network.
      optimizer: from training/optimizer.py.
      image_size: pixels a side; parameters do not depend on it.
      with_ema: whether an average is kept.
    """
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32))
    return from_variables(variables, optimizer=optimizer, with_ema=with_ema)


def from_variables(
    variables: Any, *, optimizer: optax.GradientTransformation, with_ema: bool
) -> TrainState:
    """Returns the state of step 0 with the given {"params", "batch_stats"}."""
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


def average(old: Any, new: Any, step: jax.Array, decay: float, every_steps: int) -> Any:
    """Returns the exponential moving average after a step.

    Args:
      old: the average before.
      new: what is averaged.
      step: () int, the number of steps done.
      decay: share of the old average that an update keeps.
      every_steps: steps between two updates; in between the average stays as it is.
    """
    updated = optax.incremental_update(new, old, 1.0 - decay)
    # Not lax.cond: it would copy what it returns, and on a GPU may wait for the host.
    due = step % every_steps == 0
    return jax.tree.map(lambda after, before: jnp.where(due, after, before), updated, old)
