"""Training against mmpretrain's, from the same weights on the same uint8 batches.

Theirs: the classifier, loss and SGD that mmpretrain's own recipe file describes, and its
`train_step`. Ours: `train_step` as configs/mobilenet_v2_8xb32_in1k.py sets it up. Width 1.0, 1000
classes; running statistics, momentum and weight decay on. Statistics are over the whole batch on
both sides, which are one process each (test_batchnorm.py has the groups of replicas).

What can be compared is decided by ReLU6's kinks. An activation that rounding carries over one
changes its gradient by all of it, not by rounding's share, and of 20 million activations some
always lie within float32's rounding of a kink. So float64 is the judge. And float32 is judged from
"calm" weights, which keep the activations away from the kinks, and elsewhere by how far torch's
own float32 strays.
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
from tests.support import peers

BATCH, SIZE, STEPS = 16, 64, 20
RATE, LOW_RATE = 0.045, 0.0045  # the recipe's; and one at which errors grow slowly
WEIGHTS = ("ordinary", "calm")

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """Some steps of training: the loss of each, the first one's gradients, where it ended."""

    losses: np.ndarray
    gradients: Arrays
    params: Arrays
    statistics: Arrays


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The tests beside this one have the other cores; and sums are ordered the same everywhere."""
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
    """Returns the recipe's ImageClassifier, training, with weights that no port draws by itself.

    Fresh weights would do, but their tiny depthwise kernels make each step a long one: errors grow
    so fast that in one of three tries the 19th loss differed by 2e-5 (the other two: by 1e-9).
    """
    from mmengine.model import BaseDataPreprocessor

    recipe = peers.recipe()
    recipe.model.data_preprocessor = recipe.data_preprocessor
    model = peers.mmpretrain().models.build_classifier(recipe.model)
    if dtype == torch.float64:  # the recipe's own rounds the normalised pixels to float32
        model.data_preprocessor = BaseDataPreprocessor()
    peers.randomize(model, seed=1)
    # As mmpretrain draws it: with much larger ones a loss is 0 or 100, and says little.
    torch.nn.init.normal_(
        model.head.fc.weight, std=0.01, generator=torch.Generator().manual_seed(2)
    )
    if weights == "calm":
        for module in model.modules():
            if getattr(module, "with_activation", False):  # mmcv's convolution, norm and ReLU6
                # Three deviations or more from either kink, about the middle between them.
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
    """Returns the jitted step (state, batch, rate), and what makes the state of given variables.

    The rate is an argument, the recipe's scaled, so that it is compiled once for all rates.
    """
    config = mobilenet_v2_8xb32_in1k.get_config()
    config.model.dtype = dtype
    config.model.bn_group_size = 0
    config = config_lib.with_defaults(config)
    schedule = optimizer_lib.schedule(config, steps_per_epoch=5005, total_steps=300 * 5005)

    def step(state: Any, batch: Any, rate: Any) -> Any:
        def learning_rate(count: Any) -> Any:
            return schedule(count) * (rate / RATE)

        return step_lib.train_step(
            state,
            batch,
            jax.random.key(0),
            model=config_lib.model(config),
            optimizer=optimizer_lib.create(config, learning_rate, state.params),
            learning_rate=learning_rate,
            mean=config.data.mean,
            std=config.data.std,
            label_smoothing=config.label_smoothing,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            ema_decay=config.ema.decay,
            ema_every_steps=config.ema.every_steps,
        )

    def start(variables: Any) -> Any:
        optimizer = optimizer_lib.create(config, schedule, variables["params"])
        return state_lib.from_variables(variables, optimizer=optimizer, with_ema=False)

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
            # The first step's momentum is its gradient and the decay, 4e-5 times the parameter.
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
    """Returns each tensor's distance, relative to what is expected."""
    return {path: d / norm(expected[path]) for path, d in distances(got, expected).items()}


def gradient_errors(got: Arrays, expected: Arrays) -> dict[str, float]:
    """Returns the errors; those of a norm's bias relative to its scale's gradient if that is more.

    The next norm takes away what the bias of a bottleneck's norm adds to a channel, so that its
    gradient is zero but for rounding; from calm weights the same goes for most of a depthwise
    convolution's. Its scale's gradient is a sum over the same terms.
    """

    def size(path: str) -> float:
        if path.endswith("norm/bias"):
            return max(norm(expected[path]), norm(expected[path.replace("bias", "scale")]))
        return norm(expected[path])

    return {path: d / size(path) for path, d in distances(got, expected).items()}


def test_float64_twenty_steps_at_a_low_rate():
    mine, other = (run("ordinary", "float64", LOW_RATE, STEPS) for run in (ours, theirs))
    # Seen: 3e-13, 5e-13 and 2e-12. Momentum 0.899, decay 4.1e-5 or epsilon
    # 1.01e-5 give 3e-3 and more, the biased running variance 7e-3, a float32 rate 5e-3.
    np.testing.assert_allclose(mine.losses, other.losses, rtol=1e-7)
    assert max(errors(mine.params, other.params).values()) <= 1e-7
    assert max(errors(mine.statistics, other.statistics).values()) <= 1e-7


def test_float64_eight_losses_at_the_recipes_rate():
    mine, other = (run("ordinary", "float64", RATE, 8) for run in (ours, theirs))
    # Seen: 2e-10. Rounding grows about tenfold a step here; four steps later it has reached 1e-3.
    np.testing.assert_allclose(mine.losses, other.losses, rtol=1e-6)


def test_float32_first_step():
    """The loss, and every tensor's gradient; from calm weights, see the top of this file."""
    mine, other = (run("calm", "float32", LOW_RATE, 1) for run in (ours, theirs))
    # Seen: 1e-7 (a float32 ends there), and 9e-5 at most; one activation on the
    # other side of a kink would make some tensor's 6e-3.
    assert mine.losses[0] == pytest.approx(other.losses[0], rel=1e-5)
    assert max(gradient_errors(mine.gradients, other.gradients).values()) <= 1e-3


def test_float32_first_step_among_kinks():
    mine, other = (run("ordinary", "float32", LOW_RATE, 1) for run in (ours, theirs))
    exact = theirs("ordinary", "float64", LOW_RATE, STEPS)
    assert mine.losses[0] == pytest.approx(other.losses[0], rel=1e-5)
    # torch's own gradients are off by 7e-3 of a tensor on average, up to 1e-2; so are ours. Which
    # activations change sides is chance: only the tensors together can be compared.
    mine_off, other_off = (
        np.array(list(gradient_errors(run.gradients, exact.gradients).values()))
        for run in (mine, other)
    )
    assert norm(mine_off) <= 3 * norm(other_off)


def assert_as_near(mine: Run, other: Run, exact: Run) -> None:
    """Each quantity as a whole, L2, no farther from float64 than three times torch's own is."""
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
    # Seen, at 96 pixels: equal distances to 10 %: of losses up to 20 1.5e-5, of all parameters
    # 4e-5.
    assert_as_near(mine, other, exact)
    theirs_off = distances(other.params, exact.params)
    for path, distance in distances(mine.params, exact.params).items():
        assert distance <= 3 * theirs_off[path], path  # seen: 1.5 times


@pytest.mark.slow
@pytest.mark.parametrize("rate", [LOW_RATE, RATE])
def test_float32_twenty_steps_among_kinks(rate):
    """torch's float32 loses its way within four steps: no more can be asked than to go no farther.

    Seen, at 96 pixels: losses 1.0e-1 and torch's 0.9e-1 (at 0.045 2.3e-1 and 1.7e-1), parameters
    1.9 and 1.9 (20 and 20), statistics 11 and 12 (37 and 37).
    """
    mine, other = (run("ordinary", "float32", rate, STEPS) for run in (ours, theirs))
    assert_as_near(mine, other, theirs("ordinary", "float64", rate, STEPS))
