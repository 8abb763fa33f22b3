"""Whole training steps against PyTorch's, and the same steps on one device and on four."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import Mesh

from mbv2_jax.configs import default
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib
from mbv2_jax.training.state import TrainState
from tests.support import peers

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CLASSES, BATCH, SIZE, WIDTH = 7, 8, 32, 0.25
# It is low, since training is chaotic: at 2**-8 rounding errors grow a thousandfold a step. It is
# exact in float32, in which the schedule computes.
RATE = 2.0**-12
# For the runs on one device and on four.
SHAPED = {"model.dtype": "float32", "model.strides": (2, 1, 2, 2, 2, 1, 1, 1)}


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


def test_three_steps_equal_torchs(few_layers):
    """Compares loss, optimizer and average; test_training.py has the whole network's gradients."""
    model = peers.short_torchvision(CLASSES, WIDTH)
    peers.randomize(model, seed=1)
    model = model.double().train()
    config = make_config(**{"model.dtype": "float64", "ema.decay": 0.5})
    with jax.enable_x64(True):
        variables = {"params": peers.parameters(model), "batch_stats": peers.statistics(model)}
        mesh = mesh_lib.create(jax.devices()[:1])
        (*_, state), log = run(config, mesh, peers.as_jax(variables), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=4e-5)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    averaged.update_parameters(model)  # the first call copies
    losses = []
    for batch in batches(3):
        images = (batch["image"].astype(np.float64) - MEAN) / STD
        logits = model(peers.nchw(images))
        labels = torch.from_numpy(batch["label"]).long()
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
        losses.append(loss.item())
    # Both are float64 and differ in the order of sums; 3e-13 was measured after one step.
    np.testing.assert_allclose([line["loss"] for line in log], losses, rtol=1e-9)
    assert_close(state.params, peers.parameters(model), 1e-9)
    assert_close(state.batch_stats, peers.statistics(model), 1e-9)
    assert_close(state.ema["params"], peers.parameters(averaged.module), 1e-9)
    assert_close(state.ema["batch_stats"], peers.statistics(averaged.module), 1e-9)


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
