"""Learning rates computed by hand."""

import dataclasses

import numpy as np
import pytest

from mbv2_jax.training.settings import Schedule
from tests.support.schedules import BASE, STEPS, STEPS_PER_EPOCH, assert_close, ours, settings


def test_constant():
    np.testing.assert_array_equal(ours(settings()), np.full(STEPS, np.float32(BASE)))


@pytest.mark.parametrize("name", ["cosine", "poly"])
def test_cosine_and_poly_stay_at_their_end(name):
    found = ours(settings(name, min_lr=0.02), STEPS + 5)[STEPS:]
    # torch's cosine would rise again. Rounded to float32 twice: base - (base - min_lr).
    np.testing.assert_allclose(found, np.full(5, 0.02), rtol=1e-6)


def test_warm_up_starts_at_zero_by_default():
    # A torch warm-up cannot start at 0.
    expected = [0.0, BASE / 4, BASE / 2, BASE * 3 / 4, BASE, BASE]
    assert_close(ours(settings(warmup_epochs=4 / STEPS_PER_EPOCH), 6), expected)
    assert_close(ours(settings(warmup_steps=4), 6), expected)


def test_warm_up_of_no_steps_is_none():
    none = settings(warmup_epochs=2.0, warmup_steps=0)
    np.testing.assert_array_equal(ours(none), ours(settings()))


@pytest.mark.parametrize(("batch_size", "expected"), [(256, 0.1), (1024, 0.4), (96, 0.0375)])
def test_rate_follows_the_batch_if_a_reference_is_given(batch_size, expected):
    fixed = Schedule(base_lr=0.1)
    assert ours(fixed, 1, batch_size)[0] == np.float32(0.1)
    scaled = dataclasses.replace(fixed, reference_batch_size=256)
    assert ours(scaled, 1, batch_size)[0] == np.float32(expected)


def test_exponential_falls_after_every_so_many_epochs_counted_in_steps():
    """TensorFlow's ExponentialDecay(staircase=True): rate * factor ** floor(step / decay_steps)."""
    # 2.4 epochs of 7 steps are 16.8 steps, rounded to 17.
    expected = [BASE * 0.9 ** (step // 17) for step in range(STEPS)]
    assert_close(ours(settings("exponential", factor=0.9, decay_epochs=2.4)), expected)
    assert len(set(expected[:18])) == 2
    # A duration shorter than a step is one step.
    short = settings("exponential", factor=0.9, decay_epochs=0.01)
    assert_close(ours(short, 5), [BASE * 0.9**step for step in range(5)])


def test_warm_up_and_staircase_are_hand_computed():
    # 1.5 epochs are 10.5 steps, rounded to the even 10; 3 epochs are 21 steps.
    staircase = settings("exponential", factor=0.5, decay_epochs=1.5, warmup_epochs=3.0)
    # Both count from the start of training, as in TensorFlow and timm.
    expected = [BASE * 0.5 ** (step // 10) * min(1, step / 21) for step in range(STEPS)]
    assert_close(ours(staircase), expected)
