"""Our BatchNorm against torch.nn.BatchNorm2d: whole batch, groups, devices, and numerics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from mbv2_jax.models.layers import BatchNorm
from tests.support import peers
from tests.support.activations import SHAPE, draw_arrays


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return draw_arrays()


NAMES = ("output", "input gradient", "scale gradient", "bias gradient", "mean", "var")


def torchs(a: dict[str, np.ndarray], train: bool, rows: slice = slice(None)) -> list[np.ndarray]:
    """Returns output, gradients of input, scale and bias, and new statistics of those rows."""
    norm = torch.nn.BatchNorm2d(SHAPE[-1]).double().train(train)
    assert norm.running_mean is not None and norm.running_var is not None
    for tensor, name in (
        (norm.weight, "scale"),
        (norm.bias, "bias"),
        (norm.running_mean, "mean"),
        (norm.running_var, "var"),
    ):
        tensor.data.copy_(torch.from_numpy(a[name]))
    x = peers.nchw(a["x"][rows]).requires_grad_()
    y = norm(x)
    y.backward(peers.nchw(a["gradient"][rows]))
    results = [norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    return [peers.nhwc(y), peers.nhwc(x.grad), *(r.numpy() for r in results)]


def ours(
    a: dict[str, np.ndarray], train: bool, sharding: Any = None, **fields: Any
) -> list[np.ndarray]:
    """Returns the same arrays of our layer, in float64, with the batch sharded by `sharding`."""
    norm = BatchNorm(dtype=jnp.float64, **fields)

    @jax.jit
    def run(x, gradient, params, stats):
        def forward(x, params):
            return norm.apply(
                {"params": params, "batch_stats": stats}, x, train, mutable=["batch_stats"]
            )

        y, pull, state = jax.vjp(forward, x, params, has_aux=True)
        dx, dparams = pull(gradient)
        stats_after = state["batch_stats"]
        return [y, dx, dparams["scale"], dparams["bias"], stats_after["mean"], stats_after["var"]]

    x, gradient = (jax.device_put(a[name], sharding) for name in ("x", "gradient"))
    results = run(
        x,
        gradient,
        {"scale": a["scale"], "bias": a["bias"]},
        {"mean": a["mean"], "var": a["var"]},
    )
    return [np.asarray(r) for r in results]


def assert_same(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        # The order of sums of 180 float64 terms of size about 1 differs.
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("train", [True, False])
def test_is_torchs(arrays, train):
    with jax.enable_x64(True):
        assert_same(ours(arrays, train), torchs(arrays, train))


@pytest.mark.parametrize("group_size", [1, 3, 12])
def test_each_group_is_a_torch_replica(arrays, group_size):
    """Compares with replicas without synchronised BatchNorm, whose statistics are averaged."""
    replicas = [
        torchs(arrays, True, slice(start, start + group_size))
        for start in range(0, SHAPE[0], group_size)
    ]
    expected = [np.concatenate([r[i] for r in replicas]) for i in (0, 1)]
    expected += [np.sum([r[i] for r in replicas], axis=0) for i in (2, 3)]
    expected += [np.mean([r[i] for r in replicas], axis=0) for i in (4, 5)]
    with jax.enable_x64(True):
        assert_same(ours(arrays, True, group_size=group_size), expected)


@pytest.mark.parametrize("group_size", [0, 3])
def test_a_batch_over_four_devices_is_one_batch(arrays, group_size):
    assert len(jax.devices()) == 4
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with jax.enable_x64(True):
        got = ours(arrays, True, sharding, group_size=group_size)
        if group_size == 0:
            assert_same(got, torchs(arrays, True))
        else:
            assert_same(got, ours(arrays, True, group_size=group_size))


def test_one_value_per_channel_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.BatchNorm2d(4)(torch.zeros(1, 4, 1, 1))
    x = jnp.zeros((2, 1, 1, 4))
    for group_size, images in ((0, x[:1]), (1, x)):
        norm = BatchNorm(group_size=group_size)
        variables = norm.init(jax.random.key(0), images, True)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm.apply(variables, images, True, mutable=["batch_stats"])
