"""The parts of a training step besides the network: mixing, the average, and their randomness.

The network is a stand-in that compiles in a second; tests/parity/ has the real one.
"""

import jax
import numpy as np

from tests.support.pixel_step import BATCH, batch, run

MIXING = (0.2, 1.0)  # the alphas of mixup and cutmix


def test_mixing_on_four_devices_is_as_on_one():
    batches = [batch(seed) for seed in range(4)]
    one, losses = run(batches, devices=1, mixing=MIXING)
    four, losses_of_four = run(batches, devices=4, mixing=MIXING)
    _, without = run(batches)
    # float32 sums over the batch in another order, through four steps.
    np.testing.assert_allclose(losses_of_four, losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        four[-1].params,
        one[-1].params,
    )
    assert all(abs(mixed - plain) > 1e-3 for mixed, plain in zip(losses, without, strict=True))


def test_a_run_that_goes_on_mixes_as_the_one_that_was_not_stopped():
    batches = [batch(seed) for seed in range(4)]
    states, losses = run(batches, mixing=MIXING)
    _, rest = run(batches[2:], start=states[2], mixing=MIXING)
    assert rest == losses[2:]
    # At another step the same images are mixed differently.
    _, shifted = run(batches[2:], start=states[1], mixing=MIXING)
    assert all(abs(a - b) > 1e-3 for a, b in zip(shifted, rest, strict=True))


def test_dropout_draws_the_same_with_and_without_mixing():
    batches = [batch(seed) | {"label": np.full(BATCH, 1, np.int32)} for seed in range(3)]
    # With images of one class and a network that does not see them, only dropout's mask matters.
    _, mixed = run(batches, blind=True, mixing=MIXING)
    _, plain = run(batches, blind=True)
    # share * loss + (1 - share) * loss, in float32
    np.testing.assert_allclose(mixed, plain, rtol=1e-6)
