"""A batch that goes through a layer piece by piece gives what the whole batch gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mbv2_jax.ops import normalized_conv as module
from mbv2_jax.ops.normalized_conv import Norm, normalized_conv

# What is convolved: kernel's shape, stride, padding, depthwise.
CONVOLUTIONS = {
    "expand": ((1, 1, 4, 6), 1, "torch", False),
    "project": ((1, 1, 4, 3), 1, "torch", False),
    "depthwise": ((3, 3, 1, 4), 1, "torch", True),
    "depthwise, stride 2": ((3, 3, 1, 4), 2, "torch", True),
    "depthwise, stride 2, same": ((3, 3, 1, 4), 2, "same", True),
}


def by_the_book(x, norm, kernel, stride, padding, depthwise, groups):
    """Flax's words for it, and jax.numpy's mean and var; XLA's convolution."""
    grouped = x.reshape(groups, -1, *x.shape[1:])
    if norm is not None:
        grouped = nn.relu6((grouped - norm.mean) * norm.factor + norm.bias)
    margin = kernel.shape[0] // 2
    y = lax.conv_general_dilated(
        grouped.reshape(x.shape),
        kernel,
        (stride, stride),
        "SAME" if padding == "same" else ((margin, margin),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if depthwise else 1,
    )
    results = y.reshape(groups, -1, *y.shape[1:])
    axes = (1, 2, 3)
    return y, results.mean(axes, keepdims=True), results.var(axes, keepdims=True)


def check(x, norm, kernel, stride, padding, depthwise, groups, devices=1):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    def of(function):
        results, pull = jax.vjp(function, x, norm, kernel)
        rng = np.random.default_rng(1)
        noise = [jnp.asarray(rng.standard_normal(result.shape)) for result in results]
        return results, pull(tuple(noise))

    def ours(x, norm, kernel):
        return normalized_conv(
            x, norm, kernel, stride=stride, padding=padding, depthwise=depthwise, groups=groups
        )

    def book(x, norm, kernel):
        return by_the_book(x, norm, kernel, stride, padding, depthwise, groups)

    with jax.set_mesh(mesh):
        got = jax.jit(lambda: of(ours))()
    expected = jax.jit(lambda: of(book))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == jnp.float64
        # Sums of at most some thousand products of numbers about 1.
        np.testing.assert_allclose(a, b, atol=1e-11)


# Of 12 images: on several devices each has groups of its own, or a share of one; 3 groups have no
# place on 2 devices.
@pytest.mark.parametrize(
    ("groups", "piece", "devices"),
    [
        (1, 1, 1),
        (1, 4, 1),
        (1, 12, 1),
        (2, 2, 1),
        (1, 1, 4),
        (1, 3, 4),
        (2, 1, 4),
        (4, 1, 2),
        (3, 1, 2),
    ],
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pieces_are_the_whole_forwards_and_backwards(name, groups, piece, devices, monkeypatch):
    shape, stride, padding, depthwise = CONVOLUTIONS[name]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        # Far from 0 on one side, so that a variance from differences of large numbers would show.
        x = jnp.asarray(rng.standard_normal((12, 7, 8, 4)) + 3)
        kernel = jnp.asarray(rng.standard_normal(shape))
        norm = Norm(
            jnp.asarray(rng.standard_normal((groups, 1, 1, 1, 4)) + 2),
            jnp.asarray(rng.standard_normal((groups, 1, 1, 1, 4)) * 3),
            jnp.asarray(rng.standard_normal(4) + 2),
        )
        wider = 7 * 8 * max(4, kernel.shape[-1])
        monkeypatch.setattr(module, "PIECE_BYTES", piece * wider * x.dtype.itemsize)
        check(x, norm, kernel, stride, padding, depthwise, groups, devices)
        if (groups, piece) in ((1, 1), (2, 2)):  # as after a linear bottleneck
            check(x, None, kernel, stride, padding, depthwise, groups, devices)


@pytest.mark.parametrize("padding", ["torch", "same"])
def test_the_stem_in_pieces(padding, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((4, 8, 7, 3)))
        kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 5)))
        check(x, None, kernel, 2, padding, False, 1)


def test_the_variance_keeps_its_digits_far_from_zero(monkeypatch):
    """Means of ten thousand deviations, as numpy has them in float64."""
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    x = np.random.default_rng(0).standard_normal((8, 5, 5, 2)) + np.array([1e4, -1e4])
    x = x.astype(np.float32)
    kernel = jnp.eye(2, dtype=jnp.float32)[None, None]

    @jax.jit
    def ours(x):
        return normalized_conv(
            x, None, kernel, stride=1, padding="torch", depthwise=False, groups=1
        )

    _, mean, var = ours(x)
    wide = x.astype(np.float64)
    # A float32 near 1e4 is exact to 5e-4, and so is a difference from it.
    np.testing.assert_allclose(mean.ravel(), wide.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(var.ravel(), wide.var((0, 1, 2)), rtol=1e-3)
