"""A batch that goes through a layer piece by piece gives what the whole batch gives."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mbv2_jax.ops.conv import convolution_with_statistics
from mbv2_jax.ops.cpu import training_unit
from mbv2_jax.ops.normalization import DeferredActivation, Normalization


class Convolution(NamedTuple):
    """One of the network's convolutions."""

    shape: tuple[int, ...]  # of its kernel
    stride: int = 1
    padding: str = "torch"
    dilation: int = 1

    @property
    def depthwise(self) -> bool:
        return self.shape[2] == 1


DEPTHWISE = (3, 3, 1, 4)
CONVOLUTIONS = {
    "expand": Convolution((1, 1, 4, 6)),
    "project": Convolution((1, 1, 4, 3)),
    "depthwise": Convolution(DEPTHWISE),
    "depthwise, stride 2": Convolution(DEPTHWISE, stride=2),
    "depthwise, stride 2, same": Convolution(DEPTHWISE, stride=2, padding="same"),
    "depthwise, dilation 2": Convolution(DEPTHWISE, dilation=2),
}
DILATED = [
    Convolution(DEPTHWISE, stride, padding, dilation)
    for stride in (1, 2)
    for padding in ("torch", "same")
    for dilation in (2, 3, 4)
]


def by_the_book(x, norm, kernel, convolution, groups):
    """The same with Flax's relu6, XLA's convolution, and jax.numpy's mean and var."""
    grouped = x.reshape(groups, -1, *x.shape[1:])
    if norm is not None:
        grouped = nn.relu6((grouped - norm.mean) * norm.factor + norm.bias)
    margin = convolution.dilation * (kernel.shape[0] // 2)
    y = lax.conv_general_dilated(
        grouped.reshape(x.shape),
        kernel,
        (convolution.stride,) * 2,
        "SAME" if convolution.padding == "same" else ((margin, margin),) * 2,
        rhs_dilation=(convolution.dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if convolution.depthwise else 1,
    )
    results = y.reshape(groups, -1, *y.shape[1:])
    axes = (1, 2, 3)
    return y, results.mean(axes, keepdims=True), results.var(axes, keepdims=True)


def with_gradients(function, x, norm, kernel):
    """Returns a function's results, and the gradients that noise in them gives."""
    results, pull = jax.vjp(function, x, norm, kernel)
    rng = np.random.default_rng(1)
    noise = [jnp.asarray(rng.standard_normal(result.shape)) for result in results]
    return results, pull(tuple(noise))


# At module level, so that all pieces and devices share a program.
@functools.partial(jax.jit, static_argnames=("convolution", "groups"))
def expected(x, norm, kernel, convolution, groups):
    book = functools.partial(by_the_book, convolution=convolution, groups=groups)
    return with_gradients(book, x, norm, kernel)


def check(x, norm, kernel, convolution, groups, devices=1):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def ours(x, norm, kernel):
        return convolution_with_statistics(
            x if norm is None else DeferredActivation(x, norm),
            kernel,
            stride=convolution.stride,
            padding=convolution.padding,
            dilation=convolution.dilation,
            depthwise=convolution.depthwise,
            groups=groups,
        )

    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        got = jax.jit(functools.partial(with_gradients, ours))(placed, norm, kernel)
    book = expected(x, norm, kernel, convolution, groups)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(book), strict=True):
        assert a.shape == b.shape and a.dtype == jnp.float64
        # Sums of at most some thousand products of numbers about 1.
        np.testing.assert_allclose(a, b, atol=1e-11)


# Groups of 12 images, images of a piece, and devices. On several devices each has groups of its
# own, or a share of one; 3 groups have no place on 2 devices.
EVERY = [
    (1, 1, 1),
    (1, 4, 1),
    (1, 12, 1),
    (2, 2, 1),
    (1, 1, 4),
    (1, 3, 4),
    (2, 1, 4),
    (4, 1, 2),
    (3, 1, 2),
]
# The division into pieces does not depend on the convolution: one of each kind has every one.
SOME = [(1, 4, 1), (2, 2, 1), (1, 3, 4), (4, 1, 2)]
CASES = [
    (name, *case)
    for name in CONVOLUTIONS
    for case in (EVERY if name in ("project", "depthwise, stride 2") else SOME)
]


@pytest.mark.parametrize(("name", "groups", "piece", "devices"), CASES)
def test_pieces_are_the_whole_forwards_and_backwards(name, groups, piece, devices, monkeypatch):
    convolution = CONVOLUTIONS[name]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        # Far from 0 on one side, so that a variance from differences of large numbers would show.
        x = jnp.asarray(rng.standard_normal((12, 7, 8, 4)) + 3)
        kernel = jnp.asarray(rng.standard_normal(convolution.shape))
        norm = Normalization(
            jnp.asarray(rng.standard_normal((groups, 1, 1, 1, 4)) + 2),
            jnp.asarray(rng.standard_normal((groups, 1, 1, 1, 4)) * 3),
            jnp.asarray(rng.standard_normal(4) + 2),
        )
        wider = 7 * 8 * max(4, kernel.shape[-1])
        monkeypatch.setattr(training_unit, "PIECE_BYTES", piece * wider * x.dtype.itemsize)
        check(x, norm, kernel, convolution, groups, devices)
        if (groups, piece) in ((1, 1), (2, 2)):  # as after a linear bottleneck
            check(x, None, kernel, convolution, groups, devices)


@pytest.mark.parametrize("convolution", DILATED)
def test_dilated_pieces_are_the_whole(convolution, monkeypatch):
    monkeypatch.setattr(training_unit, "PIECE_BYTES", 1)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((3, 7, 8, 4)))
        norm = Normalization(
            jnp.asarray(rng.standard_normal((1, 1, 1, 1, 4))),
            jnp.asarray(rng.standard_normal((1, 1, 1, 1, 4)) * 3),
            jnp.asarray(rng.standard_normal(4) + 2),
        )
        check(x, norm, jnp.asarray(rng.standard_normal(convolution.shape)), convolution, 1)


# None of these has a lowering of its own: XLA's convolution has to take their place.
@pytest.mark.parametrize(
    "convolution",
    [Convolution((3, 3, 8, 5)), Convolution((1, 1, 8, 5), stride=2), Convolution((3, 3, 3, 5))],
)
def test_other_convolutions_are_xlas(convolution):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        channels = convolution.shape[2]
        x = jnp.asarray(rng.standard_normal((4, 5, 6, channels)))
        norm = Normalization(
            jnp.asarray(rng.standard_normal((2, 1, 1, 1, channels))),
            jnp.asarray(rng.standard_normal((2, 1, 1, 1, channels))),
            jnp.asarray(rng.standard_normal(channels)),
        )
        kernel = jnp.asarray(rng.standard_normal(convolution.shape))
        check(x, norm, kernel, convolution, 2)


@pytest.mark.parametrize("padding", ["torch", "same"])
def test_the_stem_in_pieces(padding, monkeypatch):
    monkeypatch.setattr(training_unit, "PIECE_BYTES", 1)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((4, 8, 7, 3)))
        kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 5)))
        convolution = Convolution(kernel.shape, stride=2, padding=padding)
        check(x, None, kernel, convolution, 1)


def test_the_variance_keeps_its_digits_far_from_zero(monkeypatch):
    """Means of ten thousand deviations, as numpy has them in float64."""
    monkeypatch.setattr(training_unit, "PIECE_BYTES", 1)
    x = np.random.default_rng(0).standard_normal((8, 5, 5, 2)) + np.array([1e4, -1e4])
    x = x.astype(np.float32)
    kernel = jnp.eye(2, dtype=jnp.float32)[None, None]

    @jax.jit
    def ours(x):
        return convolution_with_statistics(x, kernel, groups=1)

    _, mean, var = ours(x)
    wide = x.astype(np.float64)
    # A float32 near 1e4 is exact to 5e-4, and so is a difference from it.
    np.testing.assert_allclose(mean.ravel(), wide.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(var.ravel(), wide.var((0, 1, 2)), rtol=1e-3)
