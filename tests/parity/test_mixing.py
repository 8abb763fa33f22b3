"""Mixup and cutmix against torchvision.transforms.v2 and torch's loss with soft targets."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from mbv2_jax.tasks.classification import mixing, scores
from tests.support import peers
from tests.support.mixing import (
    BATCH,
    CLASSES,
    DRAWS,
    HEIGHT,
    IMAGENET,
    WIDTH,
    draw_batch,
    draws,
    mix,
)


def torchvisions(name: str, params: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, normalised in float64 first, and the targets of MixUp or CutMix."""
    peers.torchvision()
    from torchvision.transforms import v2

    images, labels = draw_batch()
    transform = getattr(v2, name)(num_classes=CLASSES)
    transform.make_params = lambda flat: params
    normalised = torch.from_numpy(
        ((images - IMAGENET.mean) / IMAGENET.std).transpose(0, 3, 1, 2).copy()
    )
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), CLASSES).double()
    mixed, targets = transform(normalised, one_hot)
    return mixed.numpy().transpose(0, 2, 3, 1), targets.numpy()


def one_hot(targets: mixing.Targets) -> np.ndarray:
    eye, share = np.eye(CLASSES), np.asarray(targets.share)
    return share * eye[np.asarray(targets.labels)] + (1 - share) * eye[np.asarray(targets.others)]


@pytest.mark.parametrize("seed", range(4))
def test_mixup_is_torchvisions(seed):
    with jax.enable_x64(True):
        pixels, targets, _ = mix(seed, 0.2, 0.0)
        ours = IMAGENET.normalize(pixels, "float64")
    assert 0 < float(np.asarray(targets.share)) < 1
    images, expected = torchvisions("MixUp", {"lam": float(targets.share)})
    # float64: we mix and then normalise, they do it the other way round.
    np.testing.assert_allclose(ours, images, rtol=0, atol=1e-13)
    np.testing.assert_allclose(one_hot(targets), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_is_torchvisions(seed):
    images, _ = draw_batch()
    with jax.enable_x64(True):
        pixels, targets, _ = mix(seed, 0.0, 1.0)
        ours = IMAGENET.normalize(pixels, "float64")
    # The pasted box shows in the result wherever the two images differ.
    rows, columns = np.nonzero((np.asarray(pixels) != images).any((0, 3)))
    box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    area = (box[2] - box[0]) * (box[3] - box[1])
    params = {"box": box, "lam_adjusted": 1 - area / (HEIGHT * WIDTH)}
    assert 0 < area < HEIGHT * WIDTH
    theirs, expected = torchvisions("CutMix", params)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-15)  # one division each
    np.testing.assert_allclose(one_hot(targets), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.37, 0.64, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("centre", [(0, 0), (23, 19), (12, 3), (5, 18)])
def test_box_of_cutmix_is_torchvisions(share, centre, monkeypatch):
    peers.torchvision()
    from torchvision.transforms import v2

    transform = v2.CutMix(num_classes=CLASSES)
    column_then_row = iter(centre[::-1])
    monkeypatch.setattr(transform._dist, "sample", lambda shape: torch.tensor(share).double())
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(column_then_row)]))
    params = transform.make_params([torch.zeros(BATCH, 3, HEIGHT, WIDTH)])
    left, top, right, bottom = params["box"]
    expected = np.ones((HEIGHT, WIDTH))
    expected[top:bottom, left:right] = 0

    with jax.enable_x64(True):
        box = (jnp.float64(share), jnp.asarray(centre), HEIGHT, WIDTH)
        ours = np.asarray(mixing.outside_box(*box))
    np.testing.assert_array_equal(ours, expected)
    assert ours.mean() == pytest.approx(params["lam_adjusted"], abs=1e-15)  # float64


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_is_torchs_of_mixed_targets(label_smoothing):
    rng = np.random.default_rng(1)
    logits = 5 * rng.standard_normal((BATCH, CLASSES))
    with jax.enable_x64(True):
        _, targets, _ = mix(3, 0.2, 0.0)

        def loss(logits: jax.Array) -> jax.Array:
            return scores.mixed_cross_entropy(logits, targets, label_smoothing).mean()

        ours, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    leaf = torch.from_numpy(logits).requires_grad_()
    theirs = torch.nn.functional.cross_entropy(
        leaf, torch.from_numpy(one_hot(targets)), label_smoothing=label_smoothing
    )
    theirs.backward()
    # float64, sums of a few numbers of order one.
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-14)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=1e-15)


def test_shares_of_cutmix_are_torchvisions():
    peers.torchvision()
    from torchvision.transforms import v2

    torch.manual_seed(0)
    transform, images = v2.CutMix(num_classes=2), [torch.zeros(2, 3, 32, 32)]
    theirs = [transform.make_params(images)["lam_adjusted"] for _ in range(DRAWS)]
    share, cut = draws(0.0, 1.0)
    assert cut.all()
    assert stats.ks_2samp(share, theirs).pvalue > 1e-3  # as above
