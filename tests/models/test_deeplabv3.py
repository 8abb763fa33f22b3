"""Mobile DeepLabv3: its size, and the ways to train and fold it; tests/parity/ has its values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax import spec
from mbv2_jax.configs import default
from mbv2_jax.errors import UserError
from mbv2_jax.models import folding
from mbv2_jax.models.deeplabv3 import DeepLabV3
from mbv2_jax.tasks.segmentation.settings import Head
from mbv2_jax.tasks.segmentation.task import Segmentation
from mbv2_jax.training import info
from tests.support import tiny_model

BACKBONE = spec.Backbone(width=0.1, output_stride=16, last_convolution=False, bn_epsilon=1e-3)
IMAGES = np.random.default_rng(0).standard_normal((4, 33, 40, 3)).astype(np.float32)
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, 3, (4, 33, 40)), jnp.uint8)


@pytest.mark.parametrize(
    ("rates", "params", "multiply_adds"),
    [
        # The paper's Table 7: 2.11 M and 2.75 B; 4.52 M and 5.8 B. transformers' network has
        # 2,113,557 parameters in use, and 2,740,709,056 multiply-adds at 513.
        ((), 2_113_557, 2_740_709_056),
        # Three 3x3 convolutions from 320 to 256, their norms, and 3 x 256 more channels to project.
        (
            (6, 12, 18),
            2_113_557 + 3 * (9 * 320 * 256 + 512) + 3 * 256 * 256,
            2_740_709_056 + 33 * 33 * (3 * 9 * 320 * 256 + 3 * 256 * 256),
        ),
    ],
)
def test_info_has_the_papers_figures(rates, params, multiply_adds):
    config = default.get_config("segmentation")
    config.model.update(num_classes=21, output_stride=16, aspp_rates=rates)
    config.data.image_size = 513
    lines = info.describe(config).splitlines()
    assert f"parameters     {params:,}" in lines
    assert f"multiply-adds  {multiply_adds:,}" in lines
    assert not rates or params == 4_523_541  # the paper prints 4.52 M
    # mmpretrain's count is one of classifiers.
    assert not any("page" in line for line in lines)
    assert "last" not in {line.split(" ")[0] for line in lines}


def network(mode: spec.TrainingMode | None = None, **fields: Any) -> DeepLabV3:
    return DeepLabV3(3, (6,), architecture=BACKBONE, mode=mode or spec.TrainingMode(), **fields)


def variables(seed: int = 0) -> dict[str, Any]:
    shapes = jax.eval_shape(network().init, jax.random.key(0), jnp.asarray(IMAGES[:1]))
    return tiny_model.filled(shapes, seed)


@functools.cache  # of the short network, which all tests of it have
def loss_and_gradients(mode: spec.TrainingMode) -> tuple[Any, Any, Any]:
    """Returns logits and statistics of a training step, and the gradients of its loss."""
    task, arrays = Segmentation(Head(3)), variables()

    def loss(params: Any) -> tuple[Any, Any]:
        logits, updated = network(mode).apply(
            arrays | {"params": params}, jnp.asarray(IMAGES), train=True, mutable=["batch_stats"]
        )
        return task.loss(logits, {"labels": LABELS})[0], (logits, updated["batch_stats"])

    found, (logits, stats) = jax.jit(jax.grad(loss, has_aux=True))(arrays["params"])
    return logits, stats, found


@pytest.mark.slow
def test_computing_blocks_again_changes_no_gradient(few_layers):
    *_, kept = loss_and_gradients(spec.TrainingMode())
    *_, again = loss_and_gradients(spec.TrainingMode(remat=True))
    jax.tree.map(
        # The same float32 operations, which XLA may fuse in another way; of size 1e-3 to 1.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        kept,
        again,
    )


@pytest.mark.slow
def test_bfloat16_is_near_float32(few_layers):
    wide, _, gradients = loss_and_gradients(spec.TrainingMode())
    narrow, stats, rough = loss_and_gradients(spec.TrainingMode(dtype="bfloat16"))
    assert narrow.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((stats, rough))} == {jnp.dtype("float32")}
    # bfloat16 rounds to 2**-9 at each of a dozen layers; the logits' deviation is about 1.
    assert np.abs(narrow - wide).mean() < 0.03 * np.std(wide)
    # Of the same direction: 1 - cos is the square of the relative error.
    ours, theirs = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (rough, gradients)
    )
    assert ours @ theirs > 0.95 * np.linalg.norm(ours) * np.linalg.norm(theirs)


def test_frozen_stages_and_norms_stay(few_layers):
    arrays = variables()
    _, stats, found = loss_and_gradients(spec.TrainingMode(frozen_stages=1))
    for name, gradient in found.items():
        moves = any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
        assert moves == (name not in ("stem", "layer1_0")), name
    assert equal(stats["layer1_0"], arrays["batch_stats"]["layer1_0"])
    assert not equal(stats["image_pooling"], arrays["batch_stats"]["image_pooling"])

    logits, stats, found = loss_and_gradients(spec.TrainingMode(norm_eval=True))
    assert equal(stats, arrays["batch_stats"])
    # Scales and biases still learn, and without dropout training computes what inference does.
    assert np.asarray(found["projection"]["norm"]["scale"]).any()
    # The same float32 layers, compiled apart from their gradients.
    plain: Any = network().apply(arrays, jnp.asarray(IMAGES))
    np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-4)


def equal(ours: Any, theirs: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_folded_network_gives_the_same_logits(few_layers):
    arrays = variables()
    # Small variances, of which 1e-3 and 1e-5 make different factors.
    arrays["batch_stats"] = jax.tree.map(lambda leaf: 0.01 * leaf, arrays["batch_stats"])
    task = Segmentation(Head(3, (6,)))
    params = task.fold(arrays["params"], arrays["batch_stats"], BACKBONE)
    assert set(params["aspp1"]["conv"]) == {"kernel", "bias"} and "norm" not in params["aspp1"]
    folded = task.network(BACKBONE, spec.TrainingMode(), folded=True)
    got: Any = folded.apply({"params": params}, jnp.asarray(IMAGES))
    expected: Any = network().apply(arrays, jnp.asarray(IMAGES))
    # Float32 rounding, enlarged by factors of 10 in each layer: 3e-5 was measured.
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < 2e-4
    one_epsilon = folding.fold(arrays["params"], arrays["batch_stats"], 1e-3)
    other: Any = folded.apply({"params": one_epsilon}, jnp.asarray(IMAGES))
    assert np.abs(other - expected).max() / np.abs(expected).max() > 0.01


def test_dropout_draws_from_its_key(few_layers):
    mode = spec.TrainingMode(dropout=0.5, norm_eval=True)

    def logits(seed: int) -> Any:
        return network(mode).apply(
            variables(), jnp.asarray(IMAGES), train=True, rngs={"dropout": jax.random.key(seed)}
        )

    np.testing.assert_array_equal(logits(0), logits(0))
    assert not np.array_equal(logits(0), logits(1))


def test_rates_follow_the_output_stride():
    def rates(stride: int, given: tuple[int, ...] = (6, 12, 18)) -> tuple[int, ...]:
        backbone = dataclasses.replace(BACKBONE, output_stride=stride)
        return DeepLabV3(3, given, architecture=backbone).rates()

    # TensorFlow's deeplab trains with (6, 12, 18) at 16, and evaluates with (12, 24, 36) at 8.
    assert (rates(16), rates(8), rates(32)) == ((6, 12, 18), (12, 24, 36), (3, 6, 9))
    assert rates(32, (1,)) == (1,)


@pytest.mark.parametrize(("batch", "group_size"), [(1, 0), (4, 1)])
def test_norms_of_single_examples_are_refused(few_layers, batch, group_size):
    model = network(spec.TrainingMode(bn_group_size=group_size))
    with pytest.raises(UserError, match="one example at a time, and image pooling leaves"):
        model.apply(variables(), jnp.asarray(IMAGES[:batch]), train=True, mutable=["batch_stats"])
