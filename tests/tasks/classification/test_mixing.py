"""Shares, draws and devices of mixup and cutmix."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.tasks.classification import mixing
from tests.support.mixing import HEIGHT, IMAGENET, WIDTH, draw_batch, draws, mix


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


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_of_mixup_are_of_the_beta_distribution(alpha):
    share, _ = draws(alpha, 0.0)
    # A correct sampler is below this in one of a thousand sets of draws; the draws are fixed.
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


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
            return IMAGENET.normalize(pixels), *targets

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
