"""The Triton kernels of benchmarks/gpu.py: in Pallas's interpreter against torch; lowered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_peers
from benchmarks.triton_depthwise import depthwise_conv


def task(x: Any, kernel: Any, gradient: Any, convolve: Any) -> Any:
    """The result and both gradients."""
    y, gradients = jax.vjp(convolve, x, kernel)
    return y, *gradients(gradient)


@pytest.mark.slow
def test_every_layer_is_lowered_to_triton():
    for layer in set(gpu_peers.depthwise_layers(224)):
        side = -(-layer.size // layer.stride)
        shapes = [(128, layer.size, layer.size, layer.channels), (3, 3, 1, layer.channels)]
        shapes.append((128, side, side, layer.channels))
        given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        convolve = partial(depthwise_conv, stride=layer.stride, interpret=False)
        traced = jax.jit(partial(task, convolve=convolve)).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 3
