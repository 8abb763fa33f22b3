"""Training steps of a narrow network."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mbv2_jax.configs import default
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib

CLASSES, BATCH, SIZE, WIDTH = 7, 8, 32, 0.25
# Low, since training is chaotic: at 2**-8, rounding errors grow a thousandfold per step. A power of
# two, since it is exact in float32, in which the schedule computes.
RATE = 2.0**-12


def make_config(**fields: Any) -> Any:
    config = default.get_config()
    config.batch_size = BATCH
    config.model.width = WIDTH
    config.model.num_classes = CLASSES
    config.optimizer.weight_decay = 4e-5
    config.schedule.base_lr = RATE
    config.label_smoothing = 0.1
    config.update_from_flattened_dict(fields)
    return config


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
            "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        }
        for _ in range(count)
    ]


def run(
    config: Any, mesh: Mesh, variables: Any, count: int
) -> tuple[list[Any], list[dict[str, float]]]:
    """Returns the state after each of `count` steps, and their metrics."""
    settings = config_lib.read(config)
    spec, task = config_lib.resolve(settings, None)
    program = program_lib.build(settings, spec, task, mesh, steps_per_epoch=1000, total_steps=1000)
    state, key, log, after = program.restart(variables), jax.random.key(0), [], []
    for batch in batches(count):
        state, metrics = program.step(state, batch, key)
        after.append(jax.device_get(state))
        log.append({name: float(value) for name, value in metrics.items()})
    return after, log


def assert_close(ours: Any, theirs: Any, bound: float) -> None:
    """Asserts that no difference exceeds `bound` times the array's largest value."""

    def check(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)
        assert error <= bound, f"{jax.tree_util.keystr(path)}: {error:.2e}"

    jax.tree_util.tree_map_with_path(check, ours, theirs)
