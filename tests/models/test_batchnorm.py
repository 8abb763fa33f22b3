"""BatchNorm's precision and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax.models.layers import BatchNorm
from tests.support.activations import draw_arrays


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return draw_arrays()


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


def test_one_pass_over_rounded_values_costs_less_than_the_rounding():
    """Takes a mean of a hundred deviations, for which float32 loses four digits."""
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((64, 14, 14, 8)) + 100.0
    x = jnp.asarray(exact, jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16, momentum=0.0)
    variables = norm.init(jax.random.key(0), x, False)
    y, state = norm.apply(variables, x, True, mutable=["batch_stats"])

    axes, rounded = (0, 1, 2), np.asarray(x, np.float64)
    found = np.asarray(state["batch_stats"]["var"], np.float64)
    error = np.abs(found - rounded.var(axes, ddof=1)).max()
    rounding = np.abs(rounded.var(axes, ddof=1) - exact.var(axes, ddof=1)).min()
    assert error < rounding / 5
    # The result has the variance's error, and its own rounding to 2^-9 of its size, 4 at most.
    centred = (rounded - rounded.mean(axes)) / rounded.std(axes)
    np.testing.assert_allclose(np.asarray(y, np.float64), centred, atol=0.02)
