"""Batches mixed by the mixup and cutmix of classification."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.classification import mixing

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


DRAWS = 2000


@functools.cache
def draws(mixup_alpha: float, cutmix_alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the share of each draw, and whether it was cutmix, for a black and a white image."""

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
