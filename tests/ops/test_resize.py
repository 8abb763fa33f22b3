"""Bilinear resizing of maps: values worked out by hand (tests/parity/ops compares with torch)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax.ops.lowering import plain_lowering
from mbv2_jax.ops.resize import resize_bilinear

ROW = [0.0, 4.0, 8.0]


def resize_row(row: list[float], width: int, align_corners: bool) -> list[float]:
    image = jnp.asarray(row).reshape(1, 1, -1, 1)
    return resize_bilinear(image, (1, width), align_corners=align_corners).ravel().tolist()


@pytest.mark.parametrize(
    ("width", "align_corners", "expected"),
    [
        # The corner pixels' centres are on each other: steps of (3 - 1) / (5 - 1) pixels.
        (5, True, [0, 2, 4, 6, 8]),
        (2, True, [0, 8]),
        (1, True, [0]),
        # The outer corners are: centres at (i + 0.5) * 3 / 6 - 0.5 = -0.25, 0.25, 0.75, ...
        (6, False, [0, 1, 3, 5, 7, 8]),
        (1, False, [4]),
        # Without antialiasing: at 0.25 and 1.75.
        (2, False, [1, 7]),
        (3, True, ROW),
        (3, False, ROW),
    ],
)
def test_row(width, align_corners, expected):
    # Multiples of 1/4 are exact in float32.
    assert resize_row(ROW, width, align_corners) == expected


def test_axes_and_channels_are_apart():
    rows = np.arange(3.0)[:, None, None]
    columns = 10 * np.arange(4.0)[None, :, None]
    image = np.concatenate([rows + columns, -rows - columns], -1)[None]  # (1, 3, 4, 2)
    resized = resize_bilinear(jnp.asarray(image, jnp.float32), (5, 7), align_corners=True)
    expected = np.arange(5.0)[:, None] / 2 + 5 * np.arange(7.0)
    # A plane is interpolated exactly; its values are exact in float32.
    np.testing.assert_array_equal(np.asarray(resized[0, :, :, 0]), expected)
    np.testing.assert_array_equal(np.asarray(resized[0, :, :, 1]), -expected)


def test_bfloat16_stays_and_a_constant_too():
    """Weights in bfloat16 would not add up to 1."""
    image = jnp.full((1, 5, 7, 1), 3.0, jnp.bfloat16)
    resized = resize_bilinear(image, (32, 23), align_corners=False)
    assert resized.dtype == jnp.bfloat16
    assert (resized == 3).all()


@pytest.mark.parametrize("align_corners", [True, False])
def test_a_composite_names_the_operation_and_computes_the_same(align_corners):
    image = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32))

    def resize(x):
        return resize_bilinear(x, (5, 7), align_corners=align_corners)

    def both(x):
        return resize(x), jax.grad(lambda x: (resize(x) ** 2).sum())(x)

    expected = jax.jit(both)(image)
    with plain_lowering(composites=True):
        found = jax.jit(both)(image)
        text = jax.jit(resize).lower(image).as_text()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # The attributes by which LiteRT's converter recognises it.
    assert 'stablehlo.composite "odml.upsample_bilinear2d"' in text
    assert f"align_corners = {str(align_corners).lower()}, is_nchw_op = false" in text
    assert "size = dense<[5, 7]> : tensor<2xi64>" in text
    with plain_lowering():
        assert "odml" not in jax.jit(resize).lower(image).as_text()
