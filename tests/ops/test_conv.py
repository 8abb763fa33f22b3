"""The convolutions on CPUs equal `lax.conv_general_dilated`'s, forward and backward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax import lax

from mbv2_jax.ops.conv import convolution, depthwise_convolution, explicit_padding, map_batch
from mbv2_jax.ops.cpu import pieces


def reference(
    x: jax.Array, kernel: jax.Array, stride: int, padding: str, dilation: int
) -> jax.Array:
    """XLA's own convolution, with its own SAME."""
    margin = dilation * (kernel.shape[0] // 2)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME" if padding == "same" else ((margin, margin),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def result_and_gradients(convolve: Callable, x: jax.Array, kernel: jax.Array) -> tuple:
    """The output, and the gradients of its product with fixed noise."""
    y, pull = jax.vjp(convolve, x, kernel)
    noise = np.random.default_rng(1).standard_normal(y.shape)
    return y, *pull(jnp.asarray(noise, y.dtype))


def arrays(height: int, width: int, *, kernel_size: int = 3) -> tuple:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, height, width, 5))
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((kernel_size, kernel_size, 1, 5)))


# Stride, padding, dilation, size, side of the kernel: even and odd sizes, sizes smaller than the
# kernel's span, rectangles, dilation, a 5x5 kernel.
CASES = [
    (1, "torch", 1, (8, 8), 3),
    (1, "same", 1, (7, 7), 3),
    (2, "torch", 1, (8, 8), 3),
    (2, "torch", 1, (7, 7), 3),
    (2, "same", 1, (8, 8), 3),
    (2, "same", 1, (7, 7), 3),
    (1, "torch", 1, (1, 1), 3),
    (2, "same", 1, (1, 1), 3),
    (2, "torch", 1, (2, 5), 3),
    (1, "same", 1, (2, 5), 3),
    (1, "torch", 2, (9, 8), 3),
    (2, "same", 2, (9, 8), 3),
    (2, "torch", 1, (9, 8), 5),
    (3, "same", 2, (11, 10), 3),
    *[
        (stride, padding, dilation, (11, 9), 3)
        for stride in (1, 2)
        for padding in ("torch", "same")
        for dilation in (1, 2, 3, 4)
    ],
]


@pytest.mark.parametrize(("stride", "padding", "dilation", "size", "kernel_size"), CASES)
def test_depthwise_is_the_convolution(stride, padding, dilation, size, kernel_size):
    with jax.enable_x64(True):
        x, kernel = arrays(*size, kernel_size=kernel_size)

        def ours(x, kernel):
            return depthwise_convolution(
                x, kernel, stride=stride, padding=padding, dilation=dilation
            )

        def plain(x, kernel):
            return reference(x, kernel, stride, padding, dilation)

        got, expected = jax.jit(
            lambda: [result_and_gradients(convolve, x, kernel) for convolve in (ours, plain)]
        )()
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape and a.dtype == jnp.float64
            # Sums of at most 3 x 11 x 10 products of numbers about 1: rounding stays below 1e-13.
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 3)])
def test_depthwise_gradients_are_finite_differences(stride, dilation):
    """Against nothing but the sums themselves: a bilinear map's differences are exact."""
    with jax.enable_x64(True):
        x, kernel = arrays(5, 6)

        def ours(x, kernel):
            y = depthwise_convolution(x, kernel, stride=stride, padding="torch", dilation=dilation)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

        # Differences over 1e-4 of numbers about 100 keep ten digits; there is no curvature.
        jax.test_util.check_grads(ours, (x, kernel), order=1, modes=("rev",), eps=1e-4, rtol=1e-8)


# Three channels are written out as sums; for eight, or a 1x1 with a stride, XLA's own is taken.
@pytest.mark.parametrize(("channels", "kernel_size"), [(3, 3), (8, 3), (8, 1)])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 2)])
@pytest.mark.parametrize("padding", ["torch", "same"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (2, 2)])
def test_full_convolutions(stride, dilation, padding, size, channels, kernel_size):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((2, *size, channels)))
        kernel = jnp.asarray(rng.standard_normal((kernel_size, kernel_size, channels, 5)))

        def plain(x, kernel):
            margin = dilation * (kernel_size // 2)
            return lax.conv_general_dilated(
                x,
                kernel,
                (stride,) * 2,
                "SAME" if padding == "same" else ((margin, margin),) * 2,
                rhs_dilation=(dilation,) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        def ours(x, kernel):
            return convolution(x, kernel, stride=stride, padding=padding, dilation=dilation)

        got, expected = jax.jit(
            lambda: [result_and_gradients(convolve, x, kernel) for convolve in (ours, plain)]
        )()
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            # Sums of at most 140 products of numbers about 1.
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("relu6", [False, True])
def test_bias_and_relu6_come_after_the_sums(relu6):
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x = jnp.asarray(3 * rng.standard_normal((2, 6, 7, 4)))
        bias = jnp.asarray(rng.standard_normal(4))

        def added(y):
            return np.clip(y + np.asarray(bias), 0, 6) if relu6 else y + np.asarray(bias)

        depthwise = jnp.asarray(rng.standard_normal((3, 3, 1, 4)))
        got = depthwise_convolution(x, depthwise, bias, stride=2, padding="same", relu6=relu6)
        expected = added(np.asarray(reference(x, depthwise, 2, "same", 1)))
        np.testing.assert_allclose(got, expected, atol=1e-12)  # 9 products of numbers about 1

        full = jnp.asarray(rng.standard_normal((3, 3, 4, 4)))
        got = convolution(x, full, bias, stride=1, padding="torch", relu6=relu6)
        y = lax.conv_general_dilated(
            x, full, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(got, added(np.asarray(y)), atol=1e-12)

        product = convolution(x, full[:1, :1], bias, relu6=relu6)
        np.testing.assert_allclose(product, added(np.asarray(x @ full[0, 0])), atol=1e-12)


def test_pointwise_is_the_convolution():
    with jax.enable_x64(True):
        x, _ = arrays(4, 3)
        kernel = jnp.asarray(np.random.default_rng(2).standard_normal((1, 1, 5, 7)))

        def plain(x, kernel):
            return lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        got = jax.jit(lambda: result_and_gradients(convolution, x, kernel))()
        expected = jax.jit(lambda: result_and_gradients(plain, x, kernel))()
        for a, b in zip(got, expected, strict=True):
            # Sums of at most 36 products of numbers about 1.
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_under_vmap_remat_and_without_jit(stride):
    with jax.enable_x64(True):
        x, kernel = arrays(5, 6)
        kernels = jnp.stack([kernel, -2 * kernel])

        def ours(x, kernel):
            return depthwise_convolution(x, kernel, stride=stride, padding="torch")

        def each(kernel):
            return result_and_gradients(jax.checkpoint(ours), x, kernel)

        for i, kernel in enumerate(kernels):
            expected = result_and_gradients(
                lambda x, k: reference(x, k, stride, "torch", 1), x, kernel
            )
            for a, b, c in zip(jax.vmap(each)(kernels), each(kernel), expected, strict=True):
                # Sums of at most 90 products of numbers about 1.
                np.testing.assert_allclose(a[i], c, atol=1e-12)
                np.testing.assert_allclose(b, c, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_in_bfloat16_is_as_good_as_the_convolution(stride):
    with jax.enable_x64(True):
        x, kernel = (a.astype(jnp.bfloat16) for a in arrays(8, 8))
        exact = result_and_gradients(
            lambda x, k: reference(x, k, stride, "torch", 1),
            x.astype(jnp.float64),
            kernel.astype(jnp.float64),
        )
    got = result_and_gradients(
        lambda x, k: depthwise_convolution(x, k, stride=stride, padding="torch"), x, kernel
    )
    for a, b in zip(got, map(np.asarray, exact), strict=True):
        assert a.dtype == jnp.bfloat16
        # bfloat16 keeps 8 bits: a rounding is at most 0.4 % of a value, and up to nine products and
        # partial sums are rounded, in both directions. The kernel's gradient has 192 terms and so
        # passes only because it is summed in float32.
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.02 * float(abs(b).max()))


def test_depthwise_differentiates_twice():
    with jax.enable_x64(True):
        x, kernel = arrays(4, 5)

        def gradient_norm(convolve: Callable) -> Callable:
            def loss(x, kernel):
                return (convolve(x, kernel) ** 3).sum()

            def norm(x, kernel):
                return sum((g**2).sum() for g in jax.grad(loss, argnums=(0, 1))(x, kernel))

            return jax.jit(jax.grad(norm, argnums=(0, 1)))

        got = gradient_norm(lambda x, k: depthwise_convolution(x, k, stride=2, padding="torch"))
        expected = gradient_norm(lambda x, k: reference(x, k, 2, "torch", 1))
        for a, b in zip(got(x, kernel), expected(x, kernel), strict=True):
            # Relative rounding of sums of some hundred products, with room for cancellation.
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * float(abs(b).max()))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_explicit_same_padding_is_xlas(size, stride):
    for dilation in (1, 2):
        expected = lax.padtype_to_pads((size,), (2 * dilation + 1,), (stride,), "SAME")[0]
        pads = explicit_padding("same", (size, 4), kernel_size=3, stride=stride, dilation=dilation)
        assert pads[0] == tuple(expected)


def test_same_padding_by_hand():
    # TensorFlow at an even size and stride 2 pads only after: the first output sees pixels 0, 1, 2.
    assert explicit_padding("same", (224, 7), kernel_size=3, stride=2) == ((0, 1), (1, 1))
    # PyTorch pads both sides: its first output sees a zero, then pixels 0 and 1.
    assert explicit_padding("torch", (224, 7), kernel_size=3, stride=2) == ((1, 1), (1, 1))
    x = jnp.arange(1.0, 5.0).reshape(1, 1, 4, 1)  # 1 2 3 4
    row = jnp.zeros((3, 3, 1, 1)).at[1].set(jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1))
    same = depthwise_convolution(x, row, stride=2, padding="same")
    assert same.ravel().tolist() == [321.0, 43.0]
    torch = depthwise_convolution(x, row, stride=2, padding="torch")
    assert torch.ravel().tolist() == [210.0, 432.0]


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="'valid'"):
        explicit_padding("valid", (8, 8), kernel_size=3, stride=1)


def test_a_batch_in_pieces_gives_the_results_of_the_whole(monkeypatch):
    monkeypatch.setattr(pieces, "PIXELS", 3 * 4 * 5)  # three images
    images = jnp.arange(6.0 * 4 * 5 * 2).reshape(6, 4, 5, 2)
    seen = []

    def function(images):
        seen.append(images.shape[0])
        return images.sum((1, 2)), images[:, ::2]

    got = jax.jit(lambda images: map_batch(function, images))(images)
    assert 3 in seen  # it was traced for pieces
    for a, b in zip(got, function(images), strict=True):
        np.testing.assert_array_equal(a, b)
