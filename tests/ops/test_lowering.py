"""Plain lowering: no CPU lowering is left in a program, and no cache mixes the two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mbv2_jax.ops import conv
from mbv2_jax.ops.lowering import lowering_for, plain_lowering
from mbv2_jax.ops.normalization import DeferredActivation, Normalization


def arrays() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 6, 4), np.float32)
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((3, 3, 1, 4), np.float32))


def depthwise(x, kernel):
    return conv.depthwise_convolution(x, kernel, stride=2)


def pointwise(x, kernel):
    return conv.convolution(x, jnp.ones((1, 1, 4, 3)) * kernel.sum())


def stem(x, kernel):
    return conv.convolution(x[..., :3], jnp.ones((3, 3, 3, 4)) * kernel)


def unit(x, kernel):
    ones = jnp.ones((1, 1, 1, 1, 4))
    deferred = DeferredActivation(x, Normalization(ones, ones, jnp.ones(4)))
    return conv.convolution_with_statistics(deferred, kernel, depthwise=True, groups=1)[0]


def lowered_for_cpu(function) -> str:
    """Returns the program that is traced where a mesh tells the platform, as in training."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arrays()).as_text()


@pytest.mark.parametrize("function", [depthwise, pointwise, stem, unit])
def test_a_program_has_xlas_convolutions_only_inside(function):
    assert "convolution" not in lowered_for_cpu(function)
    with plain_lowering():
        assert "convolution" in lowered_for_cpu(function)
    assert "convolution" not in lowered_for_cpu(function)


@pytest.mark.parametrize("function", [depthwise, pointwise, stem, unit])
def test_a_known_platform_decides_while_a_program_is_traced(function):
    jitted = jax.jit(function)
    with lowering_for("cpu"):
        fast = jitted(*arrays())
        text = jitted.lower(*arrays()).as_text()
        assert "convolution" not in text and "case" not in text
        with plain_lowering():
            assert "convolution" in jitted.lower(*arrays()).as_text()
        with lowering_for(None):
            assert "case" in jitted.lower(*arrays()).as_text()
    with lowering_for("tpu"):
        assert "convolution" in jitted.lower(*arrays()).as_text()
    np.testing.assert_array_equal(fast, jitted(*arrays()))


def test_one_jitted_function_is_traced_anew_for_either():
    traces: list[None] = []

    @jax.jit
    def gradient(x, kernel):
        traces.append(None)
        return jax.grad(lambda kernel: (depthwise(x, kernel) ** 2).sum())(kernel)

    fast = gradient(*arrays())
    with plain_lowering():
        plain = gradient(*arrays())
        plain_text = gradient.lower(*arrays()).as_text()
    again = gradient(*arrays())
    assert len(traces) == 2
    assert "platform_index" not in plain_text and "case" not in plain_text
    assert "case" in gradient.lower(*arrays()).as_text()
    np.testing.assert_array_equal(fast, again)
    # Float32 sums of 18 products of numbers about 1, squared.
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_plain_program_is_exported_without_the_cpu_lowerings(platform):
    x, kernel = arrays()
    with plain_lowering():
        exported = jax.export.export(jax.jit(depthwise), platforms=[platform])(x, kernel)
    assert exported.mlir_module().count("stablehlo.convolution") == 1
    assert "stablehlo.case" not in exported.mlir_module()
    if platform == "cpu":
        # Float32 sums of 9 products of numbers about 1.
        np.testing.assert_allclose(exported.call(x, kernel), depthwise(x, kernel), atol=1e-5)
