"""Mixup and cutmix against torchvision.transforms.v2 and torch's loss with soft targets."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.classification import mixing, scores
from mbv2_jax.training import step as step_lib
from tests.support import peers

BATCH, HEIGHT, WIDTH, CLASSES = 8, 24, 20, 5
IMAGENET = Preprocessing()


def draw_batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (BATCH, HEIGHT, WIDTH, 3), np.uint8)
    return images, rng.integers(0, CLASSES, BATCH).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def mix(seed: Any, mixup_alpha: float, cutmix_alpha: float) -> Any:
    images, labels = draw_batch()
    pixels, targets = mixing.mix(
        jax.random.key(seed), jnp.asarray(images), jnp.asarray(labels), mixup_alpha, cutmix_alpha
    )
    return pixels, targets, targets.main()


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
        ours = step_lib.normalize(pixels, IMAGENET, jnp.dtype("float64"))
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
        ours = step_lib.normalize(pixels, IMAGENET, jnp.dtype("float64"))
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


def test_top1_counts_the_class_with_the_larger_share():
    labels, others = jnp.asarray([1, 2, 3]), jnp.asarray([3, 1, 2])
    for share, expected in ((0.7, labels), (0.5, labels), (0.3, others)):
        found = mixing.Targets(labels, others, jnp.float32(share)).main()
        np.testing.assert_array_equal(found, expected)


def test_nothing_is_mixed_where_both_are_off():
    images, labels = draw_batch()
    pixels, targets, main = mix(0, 0.0, 0.0)
    assert pixels.dtype == np.uint8 and targets.others is None
    np.testing.assert_array_equal(pixels, images)
    np.testing.assert_array_equal(main, labels)


DRAWS = 2000


@functools.cache
def draws(mixup_alpha: float, cutmix_alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the share of each draw, and whether it was cutmix, from a black and a white image."""

    def draw(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = jnp.asarray([[0], [255]], jnp.uint8)[:, :, None, None] * jnp.ones(
            (2, 32, 32, 3), jnp.uint8
        )
        pixels, targets = mixing.mix(
            jax.random.key(seed), images, jnp.arange(2), mixup_alpha, cutmix_alpha
        )
        return jnp.asarray(targets.share), ((pixels == 0) | (pixels == 255)).all()

    share, cut = jax.jit(jax.vmap(draw))(jnp.arange(DRAWS))
    return np.asarray(share), np.asarray(cut)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_of_mixup_are_of_the_beta_distribution(alpha):
    share, _ = draws(alpha, 0.0)
    # A correct sampler is below this in one of a thousand sets of draws; the draws are fixed.
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_shares_of_cutmix_are_torchvisions():
    peers.torchvision()
    from torchvision.transforms import v2

    torch.manual_seed(0)
    transform, images = v2.CutMix(num_classes=2), [torch.zeros(2, 3, 32, 32)]
    theirs = [transform.make_params(images)["lam_adjusted"] for _ in range(DRAWS)]
    share, cut = draws(0.0, 1.0)
    assert cut.all()
    assert stats.ks_2samp(share, theirs).pvalue > 1e-3  # as above


def test_both_are_drawn_equally_often():
    share, cut = draws(0.2, 1.0)
    assert abs(cut.mean() - 0.5) < 0.04  # 3.5 standard deviations of 2000 coins
    # Each with its own alpha.
    mixup, _ = draws(0.2, 0.0)
    cutmix, _ = draws(0.0, 1.0)
    assert stats.ks_2samp(share[~cut], mixup).pvalue > 1e-3
    assert stats.ks_2samp(share[cut], cutmix).pvalue > 1e-3


def test_four_devices_mix_as_one_does_and_pass_on_one_image_each():
    """Checks the transfers: gathering the batch on every device would cost more than the step."""
    images, labels = draw_batch()
    found = []
    for devices in (1, 4):
        mesh = mesh_lib.create(jax.devices()[:devices])
        split, everywhere = mesh_lib.split(mesh), mesh_lib.replicated(mesh)

        def mixed(key: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
            pixels, targets = mixing.mix(key, images, labels, 0.2, 1.0)
            return step_lib.normalize(pixels, IMAGENET, jnp.dtype("float32")), *targets

        jitted = jax.jit(
            mixed,
            in_shardings=(everywhere, split, split),
            out_shardings=(split, split, split, everywhere),
        )
        compiled = jitted.lower(jax.random.key(0), images, labels).compile()
        found.append([compiled(jax.random.key(seed), images, labels) for seed in range(6)])
    jax.tree.map(np.testing.assert_array_equal, found[1], found[0])
    program = compiled.as_text() or ""
    # Each device sends one of its two images, as uint8, and one label to the next device.
    sent = re.findall(r"= (\w+\[[\d,]*\])\S* (?:collective|all)-[a-z-]+\(", program)
    assert sorted(sent) == ["s32[1]", f"u8[1,{HEIGHT},{WIDTH},3]"]
