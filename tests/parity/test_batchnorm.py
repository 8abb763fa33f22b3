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

SHAPE = (12, 3, 5, 4)  # N, H, W, C
NAMES = ("output", "input gradient", "scale gradient", "bias gradient", "mean", "var")


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Random float64 input, output gradient, parameters and running statistics."""
    rng = np.random.default_rng(0)
    return {
        "x": 3 * rng.standard_normal(SHAPE) + rng.standard_normal(SHAPE[-1]),
        "gradient": rng.standard_normal(SHAPE),
        "scale": rng.uniform(0.5, 2, SHAPE[-1]),
        "bias": rng.standard_normal(SHAPE[-1]),
        "mean": rng.standard_normal(SHAPE[-1]),
        "var": rng.uniform(0.5, 2, SHAPE[-1]),
    }


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


def test_float32_survives_a_large_mean(arrays):
    # The mean is 10,000 times the deviation: E[x^2] - E[x]^2 in float32 would be off by
    # 1e8 x 6e-8 = 6 times the variance, mostly as a negative number or a 0.
    x = (10_000 + arrays["x"] / 3).astype(np.float32)
    norm = BatchNorm(momentum=0.0)
    variables = {
        "params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
    }
    y, state = jax.jit(
        lambda variables, x: norm.apply(variables, x, True, mutable=["batch_stats"])
    )(variables, x)
    exact = x.astype(np.float64)
    centred = exact - exact.mean((0, 1, 2))
    # A sum of 180 values grows to 1.8e6, where float32 steps by 1/8. 180 random roundings of that
    # size put the mean off by 1/8 / sqrt(12) / sqrt(180), 3e-3 (at most six times that here), and
    # so the normalised values; the error of the variance is its square.
    np.testing.assert_allclose(y, centred / exact.std((0, 1, 2)), atol=2e-2)
    np.testing.assert_allclose(state["batch_stats"]["var"], exact.var((0, 1, 2), ddof=1), rtol=4e-4)


def test_bfloat16_has_float32_statistics(arrays):
    x = jnp.asarray(arrays["x"], jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    y, variables = norm.init_with_output(jax.random.key(0), x, False)
    assert y.dtype == jnp.bfloat16
    y, state = norm.apply(variables, x, True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    statistics = state["batch_stats"]
    assert {s.dtype for s in statistics.values()} == {jnp.dtype("float32")}
    exact = np.asarray(x, np.float64)
    # The rounding of float32 sums of 180 values; bfloat16's would be 4e-3.
    np.testing.assert_allclose(statistics["mean"], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(
        statistics["var"], 0.9 + 0.1 * exact.var((0, 1, 2), ddof=1), rtol=1e-5
    )


def test_statistics_rest_where_the_collection_is_not_mutable(arrays):
    norm = BatchNorm()
    x = jnp.asarray(arrays["x"], jnp.float32)
    variables = norm.init(jax.random.key(0), x, True)
    assert variables["batch_stats"]["mean"].tolist() == [0, 0, 0, 0]  # initialising learns nothing
    y = norm.apply(variables, x, True)
    # The batch still normalises it: mean 0, deviation 1, within epsilon and rounding.
    np.testing.assert_allclose(np.std(np.asarray(y), axis=(0, 1, 2)), 1, atol=1e-4)


def test_a_batch_that_does_not_divide_is_refused(arrays):
    norm = BatchNorm(group_size=5)
    variables = norm.init(jax.random.key(0), arrays["x"], False)
    with pytest.raises(ValueError, match="batch of 12 does not divide into groups of 5"):
        norm.apply(variables, arrays["x"], True, mutable=["batch_stats"])


def test_one_value_per_channel_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.BatchNorm2d(4)(torch.zeros(1, 4, 1, 1))
    x = jnp.zeros((2, 1, 1, 4))
    for group_size, images in ((0, x[:1]), (1, x)):
        norm = BatchNorm(group_size=group_size)
        variables = norm.init(jax.random.key(0), images, True)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm.apply(variables, images, True, mutable=["batch_stats"])
