"""Training against mmpretrain's, from the same weights on the same uint8 batches.

Their side is the classifier, loss and SGD that mmpretrain's own recipe file describes, and its
`train_step`; our side is `train_step` with configs/mobilenet_v2_8xb32_in1k.py. The width is 1.0 and
there are 1000 classes; running statistics, momentum and weight decay are on. Both sides are one
process each, with statistics over the whole batch (test_batchnorm.py has the groups of replicas).

ReLU6's kinks limit the comparison. An activation that rounding carries across a kink changes its
gradient by all of it, not by rounding's share, and of 20 million activations some always lie within
float32's rounding of a kink. The exact comparison is therefore in float64. float32 is compared from
"calm" weights, which keep the activations away from the kinks, and elsewhere by its distance from
float64, beside that of torch's own float32.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict

from mbv2_jax.configs import mobilenet_v2_8xb32_in1k
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import optimizer as optimizer_lib
from mbv2_jax.training import state as state_lib
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.schedule import schedule
from tests.support import peers

BATCH, SIZE, STEPS = 16, 64, 20
RATE, LOW_RATE = 0.045, 0.0045  # the recipe's, and one at which errors grow slowly
WEIGHTS = ("ordinary", "calm")

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """Some steps of training: the losses, the gradients of the first, and the final variables."""

    losses: np.ndarray
    gradients: Arrays
    params: Arrays
    statistics: Arrays


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Leaves the other cores to other tests, and gives sums the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
            "label": rng.integers(0, 1000, BATCH).astype(np.int32),
        }
        for _ in range(count)
    ]


def classifier(weights: str, dtype: torch.dtype) -> torch.nn.Module:
    """Returns the recipe's ImageClassifier in training mode, with larger weights than fresh ones.

    With fresh weights' tiny depthwise kernels the steps are long, and errors grow so fast that in
    one of three tries the 19th loss differed by 2e-5 (in the other two by 1e-9).
    """
    from mmengine.model import BaseDataPreprocessor

    recipe = peers.recipe()
    recipe.model.data_preprocessor = recipe.data_preprocessor
    model = peers.mmpretrain().models.build_classifier(recipe.model)
    if dtype == torch.float64:  # the recipe's own rounds the normalised pixels to float32
        model.data_preprocessor = BaseDataPreprocessor()
    peers.randomize(model, seed=1)
    # As mmpretrain draws it: with much larger weights a loss is 0 or 100, whatever the error.
    torch.nn.init.normal_(
        model.head.fc.weight, std=0.01, generator=torch.Generator().manual_seed(2)
    )
    if weights == "calm":
        for module in model.modules():
            if getattr(module, "with_activation", False):  # mmcv's convolution, norm and ReLU6
                # Activations are in the middle between the kinks, three deviations from either.
                module.bn.weight.data.mul_(0.5)
                module.bn.bias.data.add_(3.0)
    return model.to(dtype).train()


@functools.cache
def theirs(weights: str, dtype: str, rate: float, steps: int) -> Run:
    from mmengine.optim import build_optim_wrapper
    from mmpretrain.structures import DataSample

    recipe = peers.recipe()
    recipe.optim_wrapper.optimizer.lr = rate
    model = classifier(weights, getattr(torch, dtype))
    wrapper = build_optim_wrapper(model, recipe.optim_wrapper)
    losses: list[float] = []
    gradients: Arrays = {}

    def keep_first(*_: Any) -> None:
        gradients.update({} if gradients else flat(peers.gradients(model)))

    wrapper.optimizer.register_step_pre_hook(keep_first)
    for batch in batches(steps):
        images = batch["image"][..., ::-1]  # BGR, as its pipeline loads them
        if dtype == "float64":
            mean, std = (np.array(recipe.data_preprocessor[name]) for name in ("mean", "std"))
            images = (batch["image"].astype(np.float64) - mean) / std
        samples = [DataSample().set_gt_label(int(label)) for label in batch["label"]]
        data = {"inputs": peers.nchw(images), "data_samples": samples}
        losses.append(model.train_step(data, wrapper)["loss"].item())
    after = flat(peers.parameters(model)), flat(peers.statistics(model))
    return Run(np.array(losses), gradients, *after)


@functools.cache
def our_step(dtype: str) -> Any:
    """Returns the jitted step (state, batch, rate), and a function of variables to a state.

    The recipe's rate is scaled to the argument `rate`, so that the step is compiled once.
    """
    config = mobilenet_v2_8xb32_in1k.get_config()
    config.model.dtype = dtype
    config.model.bn_group_size = 0
    settings = config_lib.read(config)
    spec, task = config_lib.resolve(settings, None)
    recipes_rate = schedule(
        settings.schedule, settings.run.batch_size, steps_per_epoch=5005, total_steps=300 * 5005
    )

    def optimizer(rate: optax.Schedule, params: Any) -> optax.GradientTransformation:
        return optimizer_lib.create(settings.optimizer, rate, params, spec.mode.frozen_stages)

    def step(state: Any, batch: Any, rate: Any) -> Any:
        def learning_rate(count: Any) -> Any:
            return recipes_rate(count) * (rate / RATE)

        recipe = step_lib.Recipe(
            task=task,
            network=task.network(spec.backbone, spec.mode),
            preprocessing=spec.preprocessing,
            optimizer=optimizer(learning_rate, state.params),
            learning_rate=learning_rate,
            ema=settings.ema,
        )
        return step_lib.train_step(state, batch, jax.random.key(0), recipe)

    def start(variables: Any) -> Any:
        return state_lib.from_variables(
            variables,
            optimizer=optimizer(recipes_rate, variables["params"]),
            with_ema=settings.ema.decay is not None,
        )

    return jax.jit(step), start


@functools.cache
def ours(weights: str, dtype: str, rate: float, steps: int) -> Run:
    model = classifier(weights, getattr(torch, dtype))
    params, statistics = peers.parameters(model), peers.statistics(model)
    losses: list[float] = []
    gradients: dict[str, Any] = {}
    with jax.enable_x64(dtype == "float64"):
        step, start = our_step(dtype)
        state = start(peers.as_jax({"params": params, "batch_stats": statistics}))
        for batch in batches(steps):
            state, metrics = step(state, batch, rate)
            losses.append(float(metrics["loss"]))
            # The first step's momentum is its gradient plus the decay, 4e-5 times the parameter.
            momentum = optax.tree.get(state.opt_state, "trace")
            gradients = gradients or jax.tree.map(
                lambda m, p: m - 4e-5 * p.astype(np.float64), jax.device_get(momentum), params
            )
        after = flat(jax.device_get(state.params)), flat(jax.device_get(state.batch_stats))
    assert {value.dtype for part in after for value in part.values()} == {np.dtype(dtype)}
    return Run(np.array(losses), flat(gradients), *after)


def flat(tree: Any) -> Arrays:
    return {path: np.asarray(value) for path, value in flatten_dict(tree, sep="/").items()}


def norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(value.astype(np.float64).ravel()))


def distances(got: Arrays, expected: Arrays) -> dict[str, float]:
    """Returns the L2 norm of each tensor's difference."""
    assert got.keys() == expected.keys()
    return {path: norm(got[path] - value.astype(np.float64)) for path, value in expected.items()}


def errors(got: Arrays, expected: Arrays) -> dict[str, float]:
    """Returns each tensor's distance, relative to the norm of the expected tensor."""
    return {path: d / norm(expected[path]) for path, d in distances(got, expected).items()}


def gradient_errors(got: Arrays, expected: Arrays) -> dict[str, float]:
    """Returns the errors; a bias's is relative to its scale's gradient where that is larger.

    The next norm subtracts what the bias of a bottleneck's norm adds to a channel, so that the
    bias's gradient is zero but for rounding; with calm weights so is most of a depthwise
    convolution's. The gradient of the scale is a sum over the same terms.
    """

    def size(path: str) -> float:
        if path.endswith("norm/bias"):
            return max(norm(expected[path]), norm(expected[path.replace("bias", "scale")]))
        return norm(expected[path])

    return {path: d / size(path) for path, d in distances(got, expected).items()}


def test_float64_twenty_steps_at_a_low_rate():
    mine, other = (run("ordinary", "float64", LOW_RATE, STEPS) for run in (ours, theirs))
    # Measured: 3e-13, 5e-13 and 2e-12. Momentum 0.899, decay 4.1e-5 or epsilon
    # 1.01e-5 give 3e-3 and more, the biased running variance 7e-3, a float32 rate 5e-3.
    np.testing.assert_allclose(mine.losses, other.losses, rtol=1e-7)
    assert max(errors(mine.params, other.params).values()) <= 1e-7
    assert max(errors(mine.statistics, other.statistics).values()) <= 1e-7


def test_float64_eight_losses_at_the_recipes_rate():
    mine, other = (run("ordinary", "float64", RATE, 8) for run in (ours, theirs))
    # Measured: 2e-10. Rounding grows about tenfold a step here, and reaches 1e-3 four steps later.
    np.testing.assert_allclose(mine.losses, other.losses, rtol=1e-6)


def test_float32_first_step():
    """Compares the loss and every tensor's gradient, from calm weights (see the module)."""
    mine, other = (run("calm", "float32", LOW_RATE, 1) for run in (ours, theirs))
    # Measured: 1e-7, float32's precision, and at most 9e-5. One activation on the other side of a
    # kink would give some tensor an error of 6e-3.
    assert mine.losses[0] == pytest.approx(other.losses[0], rel=1e-5)
    assert max(gradient_errors(mine.gradients, other.gradients).values()) <= 1e-3


def test_float32_first_step_among_kinks():
    mine, other = (run("ordinary", "float32", LOW_RATE, 1) for run in (ours, theirs))
    exact = theirs("ordinary", "float64", LOW_RATE, STEPS)
    assert mine.losses[0] == pytest.approx(other.losses[0], rel=1e-5)
    # torch's own gradients are off by 7e-3 of a tensor on average, and at most 1e-2; so are ours.
    # Chance decides which activations change sides: only all tensors together can be compared.
    mine_off, other_off = (
        np.array(list(gradient_errors(run.gradients, exact.gradients).values()))
        for run in (mine, other)
    )
    assert norm(mine_off) <= 3 * norm(other_off)


def assert_as_near(mine: Run, other: Run, exact: Run) -> None:
    """Asserts that each quantity's L2 distance from float64 is at most three times torch's own."""
    assert norm(mine.losses - exact.losses) <= 3 * norm(other.losses - exact.losses)
    for part in ("params", "statistics"):
        expected = getattr(exact, part)
        mine_off, other_off = (
            np.array(list(distances(getattr(run, part), expected).values()))
            for run in (mine, other)
        )
        assert norm(mine_off) <= 3 * norm(other_off), part


@pytest.mark.slow
def test_float32_twenty_steps_are_as_near_to_float64_as_torchs():
    mine, other = (run("calm", "float32", LOW_RATE, STEPS) for run in (ours, theirs))
    exact = theirs("calm", "float64", LOW_RATE, STEPS)
    # Measured at 96 pixels: distances are equal within 10 %; 1.5e-5 for losses up to 20, and 4e-5
    # for all parameters.
    assert_as_near(mine, other, exact)
    theirs_off = distances(other.params, exact.params)
    for path, distance in distances(mine.params, exact.params).items():
        assert distance <= 3 * theirs_off[path], path  # measured: 1.5 times


@pytest.mark.slow
@pytest.mark.parametrize("rate", [LOW_RATE, RATE])
def test_float32_twenty_steps_among_kinks(rate):
    """Bounds our distance by torch's, whose own float32 run is far from float64 after four steps.

    Measured at 96 pixels, ours and torch's: losses 1.0e-1 and 0.9e-1 (at rate 0.045 2.3e-1 and
    1.7e-1), parameters 1.9 and 1.9 (20 and 20), statistics 11 and 12 (37 and 37).
    """
    mine, other = (run("ordinary", "float32", rate, STEPS) for run in (ours, theirs))
    assert_as_near(mine, other, theirs("ordinary", "float64", rate, STEPS))
