"""The Triton kernels of benchmarks/gpu.py, in Pallas's interpreter, against torch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.triton_depthwise import depthwise_conv
from tests.support import peers


def task(x: Any, kernel: Any, gradient: Any, convolve: Any) -> Any:
    """The result and both gradients."""
    y, gradients = jax.vjp(convolve, x, kernel)
    return y, *gradients(gradient)


def torchs(x: Any, kernel: Any, gradient: Any, *, stride: int) -> list[np.ndarray]:
    """Returns the result of `task` by torch's convolution in float64."""
    pixels = peers.nchw(x).requires_grad_()
    weights = torch.from_numpy(kernel.transpose(3, 2, 0, 1)).requires_grad_()  # HWIO -> OIHW
    y = torch.nn.functional.conv2d(pixels, weights, None, stride, padding=1, groups=x.shape[-1])
    y.backward(peers.nchw(gradient))
    assert pixels.grad is not None and weights.grad is not None
    return [peers.nhwc(y), peers.nhwc(pixels.grad), weights.grad.numpy().transpose(2, 3, 1, 0)]


# Odd and even sides; more rows, columns and channels than a program's, and no multiple of them.
@pytest.mark.parametrize(
    # Relative to the largest value. float32 sums of up to 300 products; bfloat16, whose sums are
    # float32, is rounded once, by 2^-8 at most.
    ("shape", "stride", "dtype", "bound"),
    [
        ((1, 8, 20, 9), 1, "float32", 3e-6),
        ((2, 7, 9, 16), 2, "float32", 3e-6),
        ((2, 8, 6, 8), 2, "float32", 3e-6),
        ((1, 9, 20, 24), 1, "bfloat16", 2.0**-8),
    ],
)
def test_is_torchs_convolution_forwards_and_backwards(shape, stride, dtype, bound):
    rng = np.random.default_rng(0)
    count, height, width, channels = shape
    shapes = [shape, (3, 3, 1, channels)]
    shapes.append((count, -(-height // stride), -(-width // stride), channels))
    arrays = [jnp.asarray(rng.standard_normal(each), dtype) for each in shapes]
    convolve = partial(depthwise_conv, stride=stride, interpret=True)
    found = jax.jit(partial(task, convolve=convolve))(*arrays)
    expected = torchs(*(np.asarray(array, np.float64) for array in arrays), stride=stride)
    for got, right in zip(found, expected, strict=True):
        assert got.dtype == dtype
        error = np.abs(np.asarray(got, np.float64) - right).max()
        assert error <= bound * np.abs(right).max()
