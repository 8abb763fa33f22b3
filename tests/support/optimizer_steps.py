"""Steps of this package's optimizers on a few arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbv2_jax.training import optimizer
from mbv2_jax.training.settings import Optimizer

Arrays = dict[str, np.ndarray]

STEPS = 12
# The rate changes at every step: a constant one would not show whether momentum includes it.
RATES = 0.05 * np.random.default_rng(0).uniform(0.5, 1.5, STEPS)
# Named as the network's parameters: kernels are not vectors, norms and biases are.
SHAPES = {
    "stem/conv/kernel": (3, 3, 3, 4),
    "stem/norm/scale": (4,),
    "stem/norm/bias": (4,),
    "layer1_0/project/conv/kernel": (1, 1, 4, 6),
    "classifier/kernel": (6, 5),
    "classifier/bias": (5,),
}


def draw(seed: int, scale: float = 1.0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: scale * generator.standard_normal(shape) for name, shape in shapes.items()}


def gradients(scale: float = 1.0) -> list[Arrays]:
    return [draw(seed, scale) for seed in range(1, STEPS + 1)]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(value)
    return tree


def flat(tree: Any) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def run_ours(
    settings: Optimizer, params: Arrays, grads: list[Arrays], frozen_stages: int = -1
) -> list[Arrays]:
    """Returns the parameters after each step, in float64."""
    with jax.enable_x64(True):
        return _run(settings, params, grads, frozen_stages)


def _run(
    settings: Optimizer, params: Arrays, grads: list[Arrays], frozen_stages: int
) -> list[Arrays]:
    tree = nested(params)
    transformation = optimizer.create(
        settings, lambda step: jnp.asarray(RATES)[step], tree, frozen_stages
    )

    @jax.jit
    def step(tree: Any, state: Any, grads: Any) -> Any:
        updates, state = transformation.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    state, history = transformation.init(tree), []
    for gradient in grads:
        tree, state = step(tree, state, nested(gradient))
        history.append(flat(tree))
    assert all(value.dtype == np.float64 for value in history[-1].values())
    return history


def assert_same(
    ours: list[Arrays], theirs: list[Arrays], *, rtol: float = 1e-12, atol: float = 1e-13
) -> None:
    """Compares the parameters after each step.

    A float64 operation rounds by 1.1e-16 of its result, which is of order one, and a step has about
    ten operations; a wrong formula differs in the third digit.
    """
    assert len(ours) == len(theirs) == STEPS
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert mine.keys() == other.keys()
        for name in other:
            message = f"{name} after step {step}"
            np.testing.assert_allclose(
                mine[name], other[name], rtol=rtol, atol=atol, err_msg=message
            )
