"""A training step on four devices against one on one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training.state import TrainState
from tests.support.train_steps import SIZE, assert_close, make_config, run

# For the runs on one device and on four.
SHAPED = {"model.dtype": "float32", "model.strides": (2, 1, 2, 2, 2, 1, 1, 1)}


def weights() -> Any:
    """Returns fresh variables, float32."""
    spec, task = config_lib.resolve(config_lib.read(make_config(**SHAPED)), None)
    network = task.network(spec.backbone, spec.mode)
    images = jnp.zeros((1, SIZE, SIZE, 3), jnp.float32)
    return jax.device_get(jax.jit(network.init)(jax.random.key(3), images))


def run_from(variables: Any, dtype: str, devices: int, count: int) -> tuple[list[Any], list[Any]]:
    """Returns the result of `run` in `dtype` on that many devices."""
    assert len(jax.devices()) == 4
    with jax.enable_x64(dtype == "float64"):
        mesh = mesh_lib.create(jax.devices()[:devices])
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
        return run(make_config(**SHAPED | {"model.dtype": dtype}), mesh, variables, count)


@pytest.mark.slow
def test_one_step_on_four_devices_equals_one_to_float32_rounding():
    """Takes all layers: with few layers chance decides whether rounding meets a kink."""
    runs, variables = (("float64", 1), ("float32", 1), ("float32", 4)), weights()
    exact, one, four = (run_from(variables, dtype, devices, 1)[0][0] for dtype, devices in runs)

    def distance(a: Any, b: Any) -> float:
        return float(optax.tree.norm(jax.tree.map(lambda x, y: np.float64(x) - y, a, b)))

    def gradients(state: TrainState) -> Any:  # the first step's momentum; the decay in it is small
        return optax.tree.get(state.opt_state, "trace")

    # The error of float32 on one device, through normalisations of few values and many kinks, is
    # measured here: 2 % of the gradient, 1e-6 of the statistics. Another order of sums may add as
    # much again. Statistics of each device's share alone would be far off.
    for part, share in ((gradients, 0.05), (lambda state: state.batch_stats, 1e-5)):
        rounding = distance(part(one), part(exact))
        assert rounding <= share * float(optax.tree.norm(part(exact)))
        assert distance(part(four), part(one)) <= 2 * rounding


def test_ten_steps_on_four_devices_equal_one_in_float64(few_layers):
    """Takes few layers: devices exchange the same for each."""
    variables = weights()
    (one, log_one), (four, log_four) = (
        run_from(variables, "float64", devices, 10) for devices in (1, 4)
    )
    for ours, theirs in zip(log_four, log_one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
    assert_close(four[-1].params, one[-1].params, 1e-9)
    assert_close(four[-1].batch_stats, one[-1].batch_stats, 1e-9)
    assert_close(four[-1].opt_state, one[-1].opt_state, 1e-9)
