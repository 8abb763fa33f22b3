"""Convolution, ReLU6 and channel counts; BatchNorm is tested against torch's in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mbv2_jax.models.layers import Conv, ConvNorm, make_divisible


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (32, 32),
        (16 * 0.35, 8),  # 5.6: never below the divisor
        (24 * 0.75, 24),  # 18 would become 16, which loses more than 10 %
        (32 * 0.35, 16),  # 11.2 would become 8
        (96 * 1.4, 136),  # 134.4
        (1280 * 1.3, 1664),
    ],
)
def test_make_divisible_by_hand(channels, expected):
    assert make_divisible(channels) == expected


def test_a_convolution_with_a_bias_begins_with_a_random_kernel():
    # Two layers of zeros, one after the other, would get no gradient.
    params = Conv(4, bias=True).init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
    assert params["kernel"].std() > 0.1 and not params["bias"].any()


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("padding", "xlas"), [("same", "SAME"), ("torch", ((1, 1), (1, 1)))])
def test_the_stems_convolution(size, padding, xlas):
    conv = Conv(4, kernel_size=3, stride=2, padding=padding)
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    y, variables = conv.init_with_output(jax.random.key(1), x)
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (3, 3, 3, 4)
    expected = lax.conv_general_dilated(
        x, kernel, (2, 2), xlas, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # Float32 sums of 27 products of numbers about 1.
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_relu6_and_the_linear_bottleneck():
    kernel = jnp.eye(3).reshape(1, 1, 3, 3)
    x = jnp.array([-1.0, 3.0, 9.0]).reshape(1, 1, 1, 3)
    for relu6, expected in ((True, [0, 3, 6]), (False, [-1, 3, 9])):
        layer = ConvNorm(3, relu6=relu6, bn_epsilon=0.0)
        variables = layer.init(jax.random.key(0), x, False)
        variables["params"]["conv"]["kernel"] = kernel
        y = jax.jit(layer.apply, static_argnums=2)(variables, x, False)
        np.testing.assert_allclose(y.ravel(), expected)
