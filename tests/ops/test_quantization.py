"""Rounding to 8 bits: values by hand, from the rules of LiteRT's quantization specification."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax.ops.quantization import range_of, round_activations, round_weights

# A step in float32: products and quotients round at 6e-8.
EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}


def test_each_output_channel_has_its_own_steps():
    kernel = jnp.array([[1.27, -254.0, 0.0], [0.014, 3.0, 0.0], [-0.006, 2.9, 0.0]])
    expected = [[1.27, -254, 0], [0.01, 4, 0], [-0.01, 2, 0]]  # steps of 0.01, 2, none; 1.5 is even
    np.testing.assert_allclose(round_weights(kernel), expected, **EXACT)
    depthwise = round_weights(kernel.reshape(3, 1, 1, 3))
    np.testing.assert_allclose(depthwise.reshape(3, 3), expected, **EXACT)


@pytest.mark.parametrize(
    ("low", "high", "values", "expected"),
    [
        # Steps of 0.01, and zero point 0.
        (-1.28, 1.27, [0.004, 0.006, -1.0, 2.0, -3.0], [0, 0.01, -1.0, 1.27, -1.28]),
        # ReLU6: steps of 6 / 255, zero point -128.
        (0.0, 6.0, [0.01, 0.02, 3.0, 6.5, -1.0], [0, 6 / 255, 3.011764706, 6, 0]),
        # Only negative values: 0 is still a number.
        (-255.0, 0.0, [0.0, -0.6, -300.0, 9.0], [0, -1, -255, 0]),
        # The range moves so that 0 is a number: zero point -128 + 0.4 / 1 is -128.
        (-0.4, 254.6, [0.0, -0.4, 0.6, 254.6], [0, 0, 1, 255]),
        # No range yet.
        (0.0, 0.0, [0.004, -7.123], [0.004, -7.123]),
    ],
)
def test_activations_by_hand(low, high, values, expected):
    found = round_activations(jnp.array(values), jnp.float32(low), jnp.float32(high))
    np.testing.assert_allclose(found, expected, **EXACT)


def test_gradients_pass_through_where_nothing_was_cut_off():
    x, low, high = jnp.array([-2.0, -1.0, 0.3, 1.0, 2.0]), jnp.float32(-1.28), jnp.float32(1.27)
    slopes = jax.grad(lambda x: (round_activations(x, low, high) * jnp.arange(1.0, 6.0)).sum())(x)
    np.testing.assert_array_equal(slopes, [0, 2, 3, 4, 0])
    slopes = jax.grad(lambda x: round_activations(x, 0 * low, 0 * low).sum())(x)
    np.testing.assert_array_equal(slopes, np.ones(5))
    kernel = jnp.array([[1.27, 3.0], [0.014, -7.0]])
    np.testing.assert_array_equal(
        jax.grad(lambda k: round_weights(k).sum())(kernel), np.ones((2, 2))
    )


def test_bfloat16_is_rounded_in_float32():
    x = jnp.array([0.3, 5.9, -1.0], jnp.bfloat16)
    found = round_activations(x, jnp.float32(0), jnp.float32(6))
    assert found.dtype == jnp.bfloat16
    wide = round_activations(x.astype(jnp.float32), jnp.float32(0), jnp.float32(6))
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, 3.0], (0, 3)), ([-2.0, -1.0], (-2, 0)), ([-2.0, 4.0], (-2, 4))]
)
def test_a_range_holds_0(values, expected):
    found = range_of(jnp.array(values, jnp.bfloat16))
    assert found == expected and {end.dtype for end in found} == {jnp.dtype("float32")}
