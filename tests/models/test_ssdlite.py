"""SSDLite: its size, its maps, and the ways to train and fold it; tests/convert/ has its values."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax import spec
from mbv2_jax.configs import default
from mbv2_jax.errors import UserError
from mbv2_jax.models.ssdlite import Outputs
from mbv2_jax.tasks.detection.settings import Head
from mbv2_jax.tasks.detection.task import Detection
from mbv2_jax.training import info
from tests.support import tiny_model

BACKBONE = spec.Backbone(width=0.1, bn_epsilon=1e-3)
# Two maps of 3 x 4 and 2 x 2 positions.
HEAD = Head(3, taps=("last",), extra_channels=(32,), anchor_sizes=(0.2, 0.5, 0.9))
IMAGES = np.random.default_rng(0).standard_normal((4, 33, 40, 3)).astype(np.float32)


def profile(size: int, classes: int, **fields: Any) -> list[str]:
    config = default.get_config("detection")
    config.model.update(num_classes=classes, **fields)
    config.data.image_size = size
    return info.describe(config).splitlines()


def test_info_has_mmdets_figures():
    lines = profile(320, 80)
    # mmdet 3.3.0's model; fvcore counts 746.2 M multiply-adds in its convolutions.
    assert "parameters     4,228,788" in lines
    (multiply_adds,) = (line.split()[1] for line in lines if line.startswith("multiply-adds"))
    assert round(int(multiply_adds.replace(",", "")) / 1e6, 1) == 746.2


def test_info_has_the_papers_figures():
    lines = profile(
        320,
        90,
        taps=("layer6_0/expand", "last"),
        anchors="tensorflow",
        anchor_sizes=(0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0),
    )
    figures = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[-2:]}
    # Table 6 of the paper: 4.3 M parameters and 0.8 B multiply-adds at 320. Its heads are for 80
    # classes; with the 90 of the published weights the figures are a little larger.
    assert 4.2e6 < figures["parameters"] < 4.6e6
    assert 0.75e9 < figures["multiply-adds"] < 0.85e9


def network(mode: spec.TrainingMode | None = None, *, head: Head = HEAD, folded: bool = False):
    return Detection(head).network(BACKBONE, mode or spec.TrainingMode(), folded=folded)


def variables(head: Head = HEAD, seed: int = 0) -> dict[str, Any]:
    image = jnp.asarray(IMAGES[:1])
    return tiny_model.filled(
        jax.eval_shape(network(head=head).init, jax.random.key(0), image), seed
    )


def trained_outputs(mode: spec.TrainingMode) -> tuple[Outputs, Any]:
    """Returns the outputs of a training step, and the statistics after it."""
    outputs, updated = jax.jit(
        lambda x: network(mode).apply(variables(), x, train=True, mutable=["batch_stats"])
    )(jnp.asarray(IMAGES))
    return outputs, updated["batch_stats"]


@pytest.mark.parametrize(
    ("taps", "channels"),
    # Expansions have 6 times the channels of the block's input: 6 * 96 at width 1.
    [(("layer5", "last"), (96, 1280)), (("layer6_0/expand", "last"), (576, 1280))],
)
def test_heads_are_on_the_chosen_maps(taps, channels):
    task = Detection(Head(3, taps=taps))
    shapes = jax.eval_shape(
        task.network(spec.Backbone(), spec.TrainingMode()).init,
        jax.random.key(0),
        jnp.zeros((1, 320, 320, 3)),
    )["params"]
    found = [shapes[f"class_depthwise{i}"]["conv"]["kernel"].shape[-1] for i in range(6)]
    assert found == [*channels, 512, 256, 256, 128]


def test_outputs_of_a_rectangular_image(few_layers):
    outputs = network().apply(variables(), jnp.asarray(IMAGES))
    # The short network's last map has half of the image's size, rounded up, and the extra map half
    # of that; there are 6 anchors at each position.
    assert [part.shape for part in outputs.logits] == [(4, 17 * 20 * 6, 4), (4, 9 * 10 * 6, 4)]
    assert [part.shape for part in outputs.codes] == [(4, 17 * 20 * 6, 4), (4, 9 * 10 * 6, 4)]
    np.testing.assert_array_equal(outputs.size, [[33, 40]] * 4)


def test_bfloat16_is_near_float32(few_layers):
    wide, _ = trained_outputs(spec.TrainingMode())
    narrow, stats = trained_outputs(spec.TrainingMode(dtype="bfloat16"))
    assert narrow.logits[0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    # bfloat16 rounds to 2**-9 at each of a dozen layers.
    for rounded, exact in zip(narrow.logits, wide.logits, strict=True):
        assert np.abs(rounded - exact).mean() < 0.03 * np.std(exact)


def test_frozen_norms_stay(few_layers):
    arrays = variables()
    outputs, stats = trained_outputs(spec.TrainingMode(norm_eval=True))
    assert jax.tree.all(jax.tree.map(np.array_equal, stats, arrays["batch_stats"]))
    # Training computes what inference does.
    plain = network().apply(arrays, jnp.asarray(IMAGES))
    for ours, theirs in zip(outputs.logits, plain.logits, strict=True):
        # The same float32 layers, compiled apart.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_folded_network_gives_the_same_outputs(few_layers):
    arrays = variables()
    params = Detection(HEAD).fold(arrays["params"], arrays["batch_stats"], BACKBONE)
    assert set(params["class_depthwise0"]["conv"]) == {"kernel", "bias"}
    got = network(folded=True).apply({"params": params}, jnp.asarray(IMAGES))
    expected = network().apply(arrays, jnp.asarray(IMAGES))
    for ours, theirs in zip(got.logits + got.codes, expected.logits + expected.codes, strict=True):
        # Float32 rounding, enlarged by each layer's normalisation.
        assert np.abs(ours - theirs).max() < 2e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extra_channels": (32, 16)}, "anchor_sizes has 3 numbers, and there are 3 maps"),
        ({"taps": ("layer9",)}, "model.taps has 'layer9', which is no map: did you mean"),
        ({"taps": ()}, "model.taps names no map"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        network(head=dataclasses.replace(HEAD, **changes))
