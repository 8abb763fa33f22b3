"""The optimizers against torch.optim in float64, RMSProp against TensorFlow's formula in numpy."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.training import optimizer
from mbv2_jax.training.settings import Optimizer

Arrays = dict[str, np.ndarray]

STEPS = 12
# The rate changes at every step: a constant one would hide whether it is inside the momentum.
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
NORMS_AND_BIASES = ("stem/norm/scale", "stem/norm/bias", "classifier/bias")
TORCH: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.04),
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.04),
}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


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
    """Returns the parameters after each step."""
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


def run_torch(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    params: Arrays,
    grads: list[Arrays],
    *,
    group: Callable[[str], Mapping[str, float]] = lambda name: {},
    factor: Callable[[str], float] = lambda name: 1.0,
    clip_norm: float | None = None,
) -> list[Arrays]:
    """Returns the parameters after each step.

    Args:
      make: returns the optimizer of parameter groups, of which each parameter has one.
      params: the parameters at first.
      grads: the gradients of each step.
      group: returns the options of a parameter's group.
      factor: returns the factor of a parameter's learning rate.
      clip_norm: the norm for clip_grad_norm_; None: it is not called.
    """
    tensors = {name: torch.nn.Parameter(torch.from_numpy(v.copy())) for name, v in params.items()}
    names = list(tensors)
    descent = make([{"params": [tensors[name]], **group(name)} for name in names])
    history = []
    for rate, gradient in zip(RATES, grads, strict=True):
        for name, options in zip(names, descent.param_groups, strict=True):
            tensors[name].grad = torch.from_numpy(gradient[name].copy())
            options["lr"] = rate * factor(name)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        descent.step()
        history.append({name: t.detach().numpy().copy() for name, t in tensors.items()})
    return history


def assert_same(
    ours: list[Arrays], theirs: list[Arrays], *, rtol: float = 1e-12, atol: float = 1e-13
) -> None:
    """Compares the parameters after each step.

    A float64 operation rounds by 1.1e-16 of its result, which is of order one, and a step has about
    ten of them; a wrong formula differs in the third digit.
    """
    assert len(ours) == len(theirs) == STEPS
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert mine.keys() == other.keys()
        for name in other:
            message = f"{name} after step {step}"
            np.testing.assert_allclose(
                mine[name], other[name], rtol=rtol, atol=atol, err_msg=message
            )


@pytest.mark.parametrize("weight_decay", [0.0, 0.04])
@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)], ids=str
)
def test_sgd_is_torchs(momentum, nesterov, weight_decay):
    settings = Optimizer(momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    theirs = run_torch(
        lambda groups: torch.optim.SGD(
            groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        ),
        draw(0),
        gradients(),
    )
    assert_same(run_ours(settings, draw(0), gradients()), theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_torchs(weight_decay):
    # Epsilon is so large that it matters where it is added.
    settings = Optimizer("adamw", betas=(0.8, 0.95), epsilon=1e-3, weight_decay=weight_decay)
    theirs = run_torch(
        lambda groups: torch.optim.AdamW(
            groups, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay
        ),
        draw(0),
        gradients(),
    )
    assert_same(run_ours(settings, draw(0), gradients()), theirs)


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


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_decay_spares_norms_and_the_bias_only_if_asked(name, norm, bias):
    settings = Optimizer(name, weight_decay=0.04, decay_norm=norm, decay_bias=bias)

    def group(parameter: str) -> dict[str, float]:
        decays = bias if parameter == "classifier/bias" else norm
        spared = parameter in NORMS_AND_BIASES and not decays
        return {"weight_decay": 0.0 if spared else 0.04}

    theirs = run_torch(TORCH[name], draw(0), gradients(), group=group)
    assert_same(run_ours(settings, draw(0), gradients()), theirs)


def test_clipping_by_global_norm_comes_before_the_decay():
    settings = Optimizer(clip_norm=250.0, weight_decay=0.04)
    # Every second gradient is longer than clip_norm, the others are shorter.
    grads = [draw(seed, 40.0 if seed % 2 else 10.0) for seed in range(STEPS)]
    norms = [np.sqrt(sum((g**2).sum() for g in gradient.values())) for gradient in grads]
    assert max(norms[::2]) < 250.0 < min(norms[1::2])

    theirs = run_torch(TORCH["sgd"], draw(0), grads, clip_norm=250.0)
    # torch divides by the norm + 1e-6, which changes it by 4e-9 at most; parameters move by 100.
    assert_same(run_ours(settings, draw(0), grads), theirs, rtol=0.0, atol=4e-7)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_learning_rate_per_part_is_that_of_torchs_parameter_groups(name):
    rules = (("classifier", 2.5), (".*/norm", 0.0), (".*", 0.1))
    settings = Optimizer(name, weight_decay=0.04, lr_multipliers=rules)

    def factor(parameter: str) -> float:
        if parameter.startswith("classifier"):
            return 2.5
        return 0.0 if "/norm/" in parameter else 0.1

    theirs = run_torch(TORCH[name], draw(0), gradients(), factor=factor)
    assert_same(run_ours(settings, draw(0), gradients()), theirs)


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


def test_gradients_of_frozen_stages_do_not_count_for_the_clipping():
    settings = Optimizer(clip_norm=250.0, weight_decay=0.04)
    grads = gradients(scale=40.0)
    trained = [name for name in SHAPES if not name.startswith("stem")]

    theirs = run_torch(
        TORCH["sgd"],
        {name: draw(0)[name] for name in trained},
        [{name: gradient[name] for name in trained} for gradient in grads],
        clip_norm=250.0,
    )
    ours = run_ours(settings, draw(0), grads, frozen_stages=0)  # the stem
    ours_trained = [{name: after[name] for name in trained} for after in ours]
    assert_same(ours_trained, theirs, rtol=0.0, atol=4e-7)  # as in the test before
