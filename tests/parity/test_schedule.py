"""The learning-rate schedules against torch.optim.lr_scheduler, step by step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from mbv2_jax.configs import mobilenet_v2_8xb32_in1k
from mbv2_jax.data import loader
from mbv2_jax.training import config as config_lib
from mbv2_jax.training.schedule import schedule
from tests.support import peers
from tests.support.schedules import BASE, STEPS, STEPS_PER_EPOCH, assert_close, ours, settings


def torchs(
    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler],
    *,
    by_epoch: bool = False,
    steps: int = STEPS,
) -> np.ndarray:
    """Returns each step's rate of a torch scheduler that is stepped after each step or epoch."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=BASE)
    scheduler = make(sgd)
    rates = []
    for step in range(1, steps + 1):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if not by_epoch or step % STEPS_PER_EPOCH == 0:
            scheduler.step()
    return np.asarray(rates)


def test_step_is_torchs_multi_step_by_epoch():
    theirs = torchs(lambda sgd: lr_scheduler.MultiStepLR(sgd, [3, 5, 10], 0.2), by_epoch=True)
    assert_close(ours(settings("step", milestones=(3, 5, 10), factor=0.2)), theirs)


def test_exponential_is_torchs_by_epoch():
    theirs = torchs(lambda sgd: lr_scheduler.ExponentialLR(sgd, 0.9), by_epoch=True)
    assert_close(ours(settings("exponential", factor=0.9)), theirs)


@pytest.mark.parametrize("min_lr", [0.0, 0.02])
def test_cosine_is_torchs_by_step(min_lr):
    theirs = torchs(lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, STEPS, min_lr))
    assert_close(ours(settings("cosine", min_lr=min_lr)), theirs)


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_poly_is_torchs_by_step(power):
    # torch's stays at 0 after the last step, too.
    theirs = torchs(lambda sgd: lr_scheduler.PolynomialLR(sgd, STEPS, power), steps=STEPS + 5)
    assert_close(ours(settings("poly", power=power), STEPS + 5), theirs)


def test_poly_is_mmengines_by_step():
    """Takes the PolyLR of mmseg's recipes: eta_min above 0, power 0.9."""
    from mmengine.optim.scheduler import PolyLR

    # Theirs reaches eta_min one step before its end, in the last step of training; ours, torch's
    # and TensorFlow's reach it after the last step.
    end = STEPS + 1
    theirs = torchs(
        lambda sgd: PolyLR(sgd, power=0.9, eta_min=0.001, begin=0, end=end, by_epoch=False)
    )
    assert_close(ours(settings("poly", power=0.9, min_lr=0.001)), theirs)


def test_warm_up_in_steps_multiplies_poly_as_torchs_chain():
    def make(sgd: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(sgd, 0.1, total_iters=5)
        return lr_scheduler.ChainedScheduler([rise, lr_scheduler.PolynomialLR(sgd, STEPS, 0.9)])

    assert_close(ours(settings("poly", warmup_steps=5, warmup_start=0.1)), torchs(make))


def test_warm_up_is_torchs_linear():
    theirs = torchs(
        lambda sgd: lr_scheduler.LinearLR(sgd, 0.1, total_iters=2 * STEPS_PER_EPOCH),
    )
    assert_close(ours(settings(warmup_epochs=2.0, warmup_start=0.1)), theirs)
    # Counted in steps it is the same, and warmup_epochs does not matter.
    in_steps = settings(warmup_epochs=9.0, warmup_steps=2 * STEPS_PER_EPOCH, warmup_start=0.1)
    assert_close(ours(in_steps), theirs)


@pytest.mark.parametrize("warmup", [{"warmup_epochs": 2.0}, {"warmup_steps": 2 * STEPS_PER_EPOCH}])
def test_cosine_falls_over_what_the_warm_up_leaves(warmup):
    steps = 2 * STEPS_PER_EPOCH

    def make(sgd: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(sgd, 0.1, total_iters=steps)
        fall = lr_scheduler.CosineAnnealingLR(sgd, STEPS - steps, 0.02)
        return lr_scheduler.SequentialLR(sgd, [rise, fall], [steps])

    cosine = settings("cosine", min_lr=0.02, warmup_start=0.1, **warmup)
    assert_close(ours(cosine), torchs(make))


def test_warm_up_multiplies_a_rate_that_falls_meanwhile():
    def make(sgd: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(sgd, 0.1, total_iters=3 * STEPS_PER_EPOCH)
        fall = lr_scheduler.StepLR(sgd, STEPS_PER_EPOCH, 0.9)
        return lr_scheduler.ChainedScheduler([rise, fall])

    falling = settings("exponential", factor=0.9, warmup_epochs=3.0, warmup_start=0.1)
    assert_close(ours(falling), torchs(make))


@pytest.mark.parametrize(("wide", "tolerance"), [(False, 1e-5), (True, 1e-12)])
def test_pages_recipe_is_mmengines_in_all_300_epochs(wide, tolerance):
    """Compares with mmpretrain's own file, at both ends of each epoch and inside."""
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
    section = config_lib.read(config).schedule
    with jax.enable_x64(wide):
        rate = schedule(section, config.batch_size, steps_per_epoch, 300 * steps_per_epoch)
        ours = jax.jit(jax.vmap(rate))(jnp.asarray(steps.ravel(), jnp.int32))
    # 0.98 as a float32 is off by at most 3e-8 of it, which the power takes 299 times. In float64
    # mmengine's product of 300 factors rounds 300 times by 1e-16.
    expected = np.repeat(theirs, len(inside))
    np.testing.assert_allclose(ours, expected, rtol=tolerance)
