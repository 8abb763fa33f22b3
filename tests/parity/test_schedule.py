"""The learning-rate schedules against torch.optim.lr_scheduler, step by step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from torch.optim import lr_scheduler

from mbv2_jax.configs import default, mobilenet_v2_8xb32_in1k
from mbv2_jax.data import loader
from mbv2_jax.training import optimizer
from tests.support import peers

STEPS_PER_EPOCH = 7
EPOCHS = 12
STEPS = EPOCHS * STEPS_PER_EPOCH
BASE = 0.3


@pytest.fixture
def config() -> ConfigDict:
    config = default.get_config()
    config.schedule.base_lr = BASE
    return config


def ours(config: ConfigDict, steps: int = STEPS) -> np.ndarray:
    """Returns the rate of each step, under jit as in training."""
    rate = jax.jit(optimizer.schedule(config, STEPS_PER_EPOCH, STEPS))
    return np.asarray([rate(jnp.int32(step)) for step in range(steps)])


def torchs(
    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], *, by_epoch: bool = False
) -> np.ndarray:
    """Returns each step's rate of a torch scheduler that is stepped after each step or epoch."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=BASE)
    scheduler = make(sgd)
    rates = []
    for step in range(1, STEPS + 1):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if not by_epoch or step % STEPS_PER_EPOCH == 0:
            scheduler.step()
    return np.asarray(rates)


def assert_close(ours: np.ndarray, theirs: np.ndarray | list[float]) -> None:
    # The rate is float32, torch's a Python float: factor, power and cosine each round by up to 6e-8
    # of their result, and a power of n carries n roundings of its base (n <= 12 here).
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-8)


def test_constant(config):
    np.testing.assert_array_equal(ours(config), np.full(STEPS, np.float32(BASE)))


def test_step_is_torchs_multi_step_by_epoch(config):
    config.schedule.name = "step"
    config.schedule.milestones = (3, 5, 10)
    config.schedule.factor = 0.2
    theirs = torchs(lambda sgd: lr_scheduler.MultiStepLR(sgd, [3, 5, 10], 0.2), by_epoch=True)
    assert_close(ours(config), theirs)


def test_exponential_is_torchs_by_epoch(config):
    config.schedule.name = "exponential"
    config.schedule.factor = 0.9
    theirs = torchs(lambda sgd: lr_scheduler.ExponentialLR(sgd, 0.9), by_epoch=True)
    assert_close(ours(config), theirs)


@pytest.mark.parametrize("min_lr", [0.0, 0.02])
def test_cosine_is_torchs_by_step(config, min_lr):
    config.schedule.name = "cosine"
    config.schedule.min_lr = min_lr
    theirs = torchs(lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, STEPS, min_lr))
    assert_close(ours(config), theirs)


def test_cosine_stays_at_its_end(config):
    config.schedule.name = "cosine"
    config.schedule.min_lr = 0.02
    # torch's would rise again. Rounded to float32 twice: base - (base - min_lr).
    np.testing.assert_allclose(ours(config, STEPS + 5)[STEPS:], np.full(5, 0.02), rtol=1e-6)


def test_warm_up_is_torchs_linear(config):
    config.schedule.warmup_epochs = 2.0
    config.schedule.warmup_start = 0.1
    theirs = torchs(
        lambda sgd: lr_scheduler.LinearLR(sgd, 0.1, total_iters=2 * STEPS_PER_EPOCH),
    )
    assert_close(ours(config), theirs)


def test_warm_up_starts_at_zero_by_default(config):
    config.schedule.warmup_epochs = (
        4 / STEPS_PER_EPOCH
    )  # 4 steps; a torch warm-up cannot start at 0
    expected = [0.0, BASE / 4, BASE / 2, BASE * 3 / 4, BASE, BASE]
    assert_close(ours(config, 6), expected)


def test_cosine_falls_over_what_the_warm_up_leaves(config):
    config.schedule.name = "cosine"
    config.schedule.min_lr = 0.02
    config.schedule.warmup_epochs = 2.0
    config.schedule.warmup_start = 0.1
    warmup = 2 * STEPS_PER_EPOCH

    def make(sgd: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(sgd, 0.1, total_iters=warmup)
        fall = lr_scheduler.CosineAnnealingLR(sgd, STEPS - warmup, 0.02)
        return lr_scheduler.SequentialLR(sgd, [rise, fall], [warmup])

    assert_close(ours(config), torchs(make))


def test_warm_up_multiplies_a_rate_that_falls_meanwhile(config):
    config.schedule.name = "exponential"
    config.schedule.factor = 0.9
    config.schedule.warmup_epochs = 3.0
    config.schedule.warmup_start = 0.1

    def make(sgd: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(sgd, 0.1, total_iters=3 * STEPS_PER_EPOCH)
        fall = lr_scheduler.StepLR(sgd, STEPS_PER_EPOCH, 0.9)
        return lr_scheduler.ChainedScheduler([rise, fall])

    assert_close(ours(config), torchs(make))


@pytest.mark.parametrize(("batch_size", "expected"), [(256, 0.1), (1024, 0.4), (96, 0.0375)])
def test_rate_follows_the_batch_if_a_reference_is_given(config, batch_size, expected):
    config.batch_size = batch_size
    config.schedule.base_lr = 0.1
    assert ours(config, 1)[0] == np.float32(0.1)
    config.schedule.reference_batch_size = 256
    assert ours(config, 1)[0] == np.float32(expected)


@pytest.mark.parametrize(("wide", "tolerance"), [(False, 1e-5), (True, 1e-12)])
def test_pages_recipe_is_mmengines_in_all_300_epochs(wide, tolerance):
    """Scheduler and rate are of mmpretrain's own file; at both ends of each epoch and inside."""
    from mmengine.registry import PARAM_SCHEDULERS

    recipe = peers.recipe()
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], recipe.optim_wrapper.optimizer.lr)
    scheduler = PARAM_SCHEDULERS.build(recipe.param_scheduler | {"optimizer": sgd})
    assert scheduler.by_epoch
    theirs = []
    for _ in range(recipe.train_cfg.max_epochs):
        theirs.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    assert theirs[:2] == [0.045, 0.045 * 0.98]

    config = mobilenet_v2_8xb32_in1k.get_config()
    steps_per_epoch = loader.steps_per_epoch(1_281_167, config.batch_size, config.data.last_batch)
    assert steps_per_epoch == 5_005 and config.num_epochs == len(theirs) == 300
    inside = np.array([0, 1, 2_500, 5_004])
    steps = np.arange(300)[:, None] * 5_005 + inside
    with jax.enable_x64(wide):
        rate = optimizer.schedule(config, steps_per_epoch, 300 * steps_per_epoch)
        ours = jax.jit(jax.vmap(rate))(jnp.asarray(steps.ravel(), jnp.int32))
    # 0.98 as a float32 is off by at most 3e-8 of it, which the power takes 299 times. In float64
    # mmengine's product of 300 factors rounds 300 times by 1e-16.
    expected = np.repeat(theirs, len(inside))
    np.testing.assert_allclose(ours, expected, rtol=tolerance)


def test_exponential_falls_after_every_so_many_epochs_counted_in_steps(config):
    """TensorFlow's ExponentialDecay(staircase=True): rate * factor ** floor(step / decay_steps)."""
    config.schedule.name = "exponential"
    config.schedule.factor = 0.9
    config.schedule.decay_epochs = 2.4  # of 7 steps: 16.8, that is 17
    expected = [BASE * 0.9 ** (step // 17) for step in range(STEPS)]
    assert_close(ours(config), expected)
    assert len(set(expected[:18])) == 2
    config.schedule.decay_epochs = 0.01  # shorter than a step: every step
    assert_close(ours(config, 5), [BASE * 0.9**step for step in range(5)])


def test_warm_up_and_staircase_are_hand_computed(config):
    config.schedule.name = "exponential"
    config.schedule.factor = 0.5
    config.schedule.decay_epochs = 1.5  # 10.5 steps, that is 10: halves go to the even number
    config.schedule.warmup_epochs = 3.0  # 21 steps
    # Counted from the start of training, as TensorFlow and timm count, too.
    expected = [BASE * 0.5 ** (step // 10) * min(1, step / 21) for step in range(STEPS)]
    assert_close(ours(config), expected)
