"""Learning rates of this package's schedules over a short run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbv2_jax.training.schedule import schedule
from mbv2_jax.training.settings import Schedule

STEPS_PER_EPOCH = 7
EPOCHS = 12
STEPS = EPOCHS * STEPS_PER_EPOCH
BASE = 0.3


def ours(settings: Schedule, steps: int = STEPS, batch_size: int = 256) -> np.ndarray:
    """Returns the rate of each step, under jit as in training."""
    rate = jax.jit(schedule(settings, batch_size, STEPS_PER_EPOCH, STEPS))
    return np.asarray([rate(jnp.int32(step)) for step in range(steps)])


def settings(name: str = "constant", **fields: Any) -> Schedule:
    return Schedule(name=name, base_lr=BASE, **fields)


def assert_close(ours: np.ndarray, theirs: np.ndarray | list[float]) -> None:
    # The rate is float32, torch's is a Python float. Factor, power and cosine each round by up to
    # 6e-8 of their result, and a power of n carries n roundings of its base (n <= 12 here).
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-8)
