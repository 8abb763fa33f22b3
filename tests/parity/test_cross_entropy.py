"""The loss against torch.nn.functional.cross_entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mbv2_jax.tasks.classification import scores

SMOOTHINGS = [0.0, 0.1, 1.0]


def draw(scale: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return scale * generator.standard_normal((32, 10)), generator.integers(0, 10, 32)


def torchs(logits: np.ndarray, labels: np.ndarray, label_smoothing: float) -> np.ndarray:
    return torch.nn.functional.cross_entropy(
        torch.from_numpy(logits),
        torch.from_numpy(labels),
        label_smoothing=label_smoothing,
        reduction="none",
    ).numpy()


@pytest.mark.parametrize("label_smoothing", SMOOTHINGS)
def test_losses_are_torchs(label_smoothing):
    logits, labels = draw()
    with jax.enable_x64(True):
        ours = scores.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing)
    assert ours.dtype == np.float64
    # Sums of ten float64 terms of up to 20; float32 would differ by 1e-7 of them.
    np.testing.assert_allclose(ours, torchs(logits, labels, label_smoothing), rtol=0, atol=1e-13)


@pytest.mark.parametrize("label_smoothing", SMOOTHINGS)
def test_gradients_are_torchs(label_smoothing):
    logits, labels = draw()
    leaf = torch.from_numpy(logits.copy()).requires_grad_()
    torch.nn.functional.cross_entropy(
        leaf, torch.from_numpy(labels), label_smoothing=label_smoothing
    ).backward()

    def loss(logits):
        return scores.cross_entropy(logits, jnp.asarray(labels), label_smoothing).mean()

    with jax.enable_x64(True):
        ours = jax.grad(loss)(jnp.asarray(logits))
    # Probabilities over 32 examples: at most 0.03, rounded a few times.
    np.testing.assert_allclose(ours, leaf.grad.numpy(), rtol=0, atol=1e-16)


@pytest.mark.parametrize("label_smoothing", SMOOTHINGS)
def test_bfloat16_logits_are_computed_in_float32(label_smoothing):
    logits, labels = draw()
    narrow = jnp.asarray(logits, jnp.bfloat16)
    ours = scores.cross_entropy(narrow, jnp.asarray(labels), label_smoothing)
    assert ours.dtype == np.float32
    wide = np.asarray(narrow, np.float32)
    # Numbers of up to 20 are rounded to float32; in bfloat16 they would differ by up to 0.06.
    theirs = torchs(wide, labels, label_smoothing)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow():
    logits, labels = draw(scale=1e4)  # exp(1e4) overflows float32
    ours = scores.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), 0.1)
    theirs = torchs(logits.astype(np.float32), labels, 0.1)
    # Ten float32 terms of up to 3e4 each.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-2)
