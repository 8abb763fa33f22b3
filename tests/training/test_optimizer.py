"""RMSProp by TensorFlow's rule, the parameters that decay, frozen stages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.training import optimizer
from mbv2_jax.training.settings import Optimizer
from tests.support.optimizer_steps import (
    RATES,
    assert_same,
    draw,
    flat,
    gradients,
    nested,
    run_ours,
)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_is_tensorflows(momentum):
    """Compares with the formula of ApplyRMSProp, which trained the paper's network in TF-slim."""
    # Epsilon is so large that it matters where it is added.
    settings = Optimizer(
        "rmsprop", momentum=momentum, rms_decay=0.8, epsilon=0.1, weight_decay=0.04
    )
    w = draw(0)
    mean_square = {name: np.ones_like(value) for name, value in w.items()}
    moment = {name: np.zeros_like(value) for name, value in w.items()}
    expected = []
    for rate, gradient in zip(RATES, gradients(), strict=True):
        for name in w:
            g = gradient[name] + 0.04 * w[name]
            mean_square[name] = 0.8 * mean_square[name] + 0.2 * g**2
            moment[name] = momentum * moment[name] + rate * g / np.sqrt(mean_square[name] + 0.1)
            w[name] = w[name] - moment[name]
        expected.append(dict(w))
    assert_same(run_ours(settings, draw(0), gradients()), expected)


def test_nesterov_is_of_sgd_only():
    plain = run_ours(Optimizer("rmsprop"), draw(0), gradients())
    nesterov = run_ours(Optimizer("rmsprop", nesterov=True), draw(0), gradients())
    assert_same(nesterov, plain, rtol=0.0, atol=0.0)


def test_first_rule_that_matches_from_the_beginning_decides():
    rules = (
        ("classifier/bias", 3.0),
        ("classifier", 2.0),
        ("layer1", 0.5),
        ("norm", 7.0),  # no path begins with it
        ("stem/conv", 0.25),
    )
    assert optimizer.multipliers(nested(draw(0)), rules) == {
        "stem": {"conv": {"kernel": 0.25}, "norm": {"scale": 1.0, "bias": 1.0}},
        "layer1_0": {"project": {"conv": {"kernel": 0.5}}},
        "classifier": {"kernel": 2.0, "bias": 3.0},
    }


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adamw"])
def test_frozen_stages_of_the_network_stay_bit_for_bit(name):
    network = MobileNetV2(num_classes=3, width=0.1)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.eval_shape(jax.random.key, 0), image)["params"]
    zeros = flat(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))
    sizes = {path: value.shape for path, value in zeros.items()}
    params, gradient = draw(0, shapes=sizes), draw(1, shapes=sizes)

    rules = (("classifier", 1.0), (".*", 0.1))
    settings = Optimizer(name, weight_decay=0.1, lr_multipliers=rules)
    after = run_ours(settings, params, [gradient] * 2, frozen_stages=2)[-1]

    frozen = {path for path in params if re.match("stem/|layer[12]_", path)}
    assert len(frozen) == 3 + 6 + 2 * 9  # stem; layer1's block without expansion; layer2's two
    moved = {path for path in params if not np.array_equal(after[path], params[path])}
    assert moved == params.keys() - frozen
