"""Networks that round to 8 bits: where they do, and how their ranges follow the batches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mbv2_jax import model_dir, tasks
from mbv2_jax.models import ssdlite
from mbv2_jax.models.layers import Rounding
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.classification import settings as classification
from mbv2_jax.tasks.detection import settings as detection
from mbv2_jax.tasks.segmentation import settings as segmentation
from mbv2_jax.training import state
from mbv2_jax.training.settings import Ema
from tests.support import tiny_model

MODE = TrainingMode(quantize="int8", norm_eval=True)
HEADS: dict[str, Any] = {
    "classification": classification.Head(3, hidden=(5,)),
    "segmentation": segmentation.Head(3, (6,)),
    "detection": detection.Head(
        3, ("layer7", "last"), extra_channels=(16,), anchor_sizes=(0.2, 0.4, 0.6, 0.8)
    ),
}
# Beside the ranges of convolutions with a normalisation, and of sums. DeepLab's branches have the
# range of what they are concatenated to.
OF_HEAD = {
    "classification": {"pooled_range", "hidden_0_range", "classifier_range"},
    "segmentation": {"pooled_range", "concatenation_range", "projection_range", "logits_range"},
    "detection": {f"{name}{i}_range" for name in ("class_logits", "box_codes") for i in range(3)},
}
BRANCHES = {"image_pooling", "aspp0", "aspp1", "projection"}


def network(task: str, mode: TrainingMode = MODE, *, folded: bool = False) -> Any:
    made_for = tasks.find(task).for_model(HEADS[task], ("a", "b", "c"))
    return made_for.network(Backbone(width=0.1), mode, folded=folded)


def variables(of: Any) -> dict[str, Any]:
    """Returns random weights, and ranges that have seen nothing."""
    arrays = tiny_model.filled(jax.eval_shape(of.init, jax.random.key(0), images(0)))
    arrays["batch_stats"] = jax.tree_util.tree_map_with_path(
        lambda path, array: array * (path[-1].key not in ("low", "high")), arrays["batch_stats"]
    )
    return arrays


def images(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, 33, 33, 3))


def ranges(batch_stats: Any) -> dict[str, tuple[float, float]]:
    flat = flatten_dict(batch_stats, sep="/")
    names = [name.removesuffix("/low") for name in flat if name.endswith("/low")]
    return {name: (float(flat[f"{name}/low"]), float(flat[f"{name}/high"])) for name in names}


@pytest.mark.parametrize("task", list(HEADS))
def test_every_tensor_of_an_8_bit_file_has_a_range(task, few_layers):
    of = network(task)
    arrays = variables(of)
    layers = {
        name.removesuffix("/conv/kernel")
        for name in flatten_dict(arrays["params"], sep="/")
        if name.endswith("/conv/kernel")
    }
    expected = {f"{name}/range" for name in layers - BRANCHES} | OF_HEAD[task]
    found = set(ranges(arrays["batch_stats"]))
    assert found - {name for name in found if name.endswith("/sum")} == expected

    _, updated = jax.jit(lambda x: of.apply(arrays, x, mutable=["batch_stats"]))(images(0))
    seen = ranges(updated["batch_stats"])
    assert all(low <= 0 <= high and low < high for low, high in seen.values())
    # Of ReLU6.
    assert all(seen[f"{name}/range"][0] == 0 for name in layers if name.endswith("/depthwise"))


@pytest.mark.parametrize("task", list(HEADS))
def test_nothing_but_the_weights_is_rounded_before_the_first_batch(task, few_layers):
    of = network(task)
    arrays = variables(of)
    floats = network(task, dataclasses.replace(MODE, quantize="none"))
    plain = {"params": arrays["params"], "batch_stats": _without_ranges(arrays["batch_stats"])}
    outputs, expected = (
        learned(jax.jit(net.apply)(given, images(0)))
        for net, given in ((of, arrays), (floats, plain))
    )
    folded = network(task, folded=True)
    assert "batch_stats" not in jax.eval_shape(folded.init, jax.random.key(0), images(0))
    for found, wanted in zip(outputs, expected, strict=True):
        assert found.shape == wanted.shape
        # 256 steps of weights in some ten layers: percents of the largest value.
        assert 0 < abs(found - wanted).max() < 0.1 * abs(wanted).max()


def _without_ranges(batch_stats: Any) -> Any:
    flat = flatten_dict(batch_stats)
    return unflatten_dict({path: flat[path] for path in flat if path[-1] in ("mean", "var")})


def learned(outputs: Any) -> list[jax.Array]:
    """Returns the outputs that depend on weights: a detector's anchors do not."""
    if isinstance(outputs, ssdlite.Outputs):
        return [*outputs.logits, *outputs.codes]
    return [outputs]


def test_every_sum_is_rounded():
    of = MobileNetV2(3, quantize="int8")
    shapes = jax.eval_shape(of.init, jax.random.key(0), images(0))["batch_stats"]
    sums = [name for name, layer in shapes.items() if "sum" in layer]
    assert len(sums) == 10 and "layer2_1" in sums and "layer2_0" not in sums


def test_a_range_starts_with_the_first_batch_and_follows_slowly():
    module = Rounding(momentum=0.75)
    state = module.init(jax.random.key(0), jnp.zeros(3))["batch_stats"]
    assert state == {"low": 0, "high": 0}
    for batch, expected in (
        ([-1.0, 3.0], (-1, 3)),
        ([1.0, 7.0], (-0.75, 4)),  # 0 counts
        ([-5.0, 4.0], (-1.8125, 4)),
    ):
        _, updated = module.apply({"batch_stats": state}, jnp.array(batch), mutable=["batch_stats"])
        state = updated["batch_stats"]
        assert (float(state["low"]), float(state["high"])) == expected
    cut: Any = module.apply({"batch_stats": state}, jnp.array([-9.0, 9.0]))
    np.testing.assert_allclose(cut, [-1.8125, 4], atol=(4 + 1.8125) / 255)  # one step


@pytest.mark.slow
def test_recomputed_blocks_give_the_same_gradients(few_layers):
    arrays = variables(network("classification"))

    def step(mode: TrainingMode) -> Any:
        def loss(params: Any) -> Any:
            given = {"params": params, "batch_stats": arrays["batch_stats"]}
            of = network("classification", mode)
            logits, updated = of.apply(given, images(0), train=True, mutable=["batch_stats"])
            return (logits**2).sum(), updated

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays["params"])

    (_, ranges_kept), kept = step(MODE)
    (_, ranges_again), again = step(dataclasses.replace(MODE, remat=True))
    jax.tree.map(np.testing.assert_array_equal, ranges_kept, ranges_again)
    # The same sums in another program, of numbers up to 1e2.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), kept, again)
    assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept))


def test_training_needs_fixed_normalisations():
    of = MobileNetV2(3, width=0.1, quantize="int8")
    arrays = jax.eval_shape(of.init, jax.random.key(0), images(0))
    with pytest.raises(ValueError, match=r"quantize: the steps of bfloat16 are wider"):
        jax.eval_shape(of.clone(dtype=jnp.bfloat16).init, jax.random.key(0), images(0))
    with pytest.raises(ValueError, match=r"quantize: .*: train with norm_eval=True"):
        jax.eval_shape(
            lambda v: of.apply(v, images(0), train=True, mutable=["batch_stats"]), arrays
        )


def test_an_average_of_weights_has_the_ranges_of_the_step():
    """One that started at 0 would hold 6 / 1000 of the range after a step, and round all to it."""
    tree = {"batch_stats": {"stem": {"range": {"low": jnp.zeros(()), "high": jnp.zeros(())}}}}
    tree["params"] = {"stem": {"conv": {"kernel": jnp.zeros(3)}}}
    new = jax.tree.map(lambda leaf: leaf + 6, tree)
    found = state.average(tree, new, jnp.int32(1), Ema(decay=0.999))
    assert found["batch_stats"]["stem"]["range"] == {"low": 6, "high": 6}
    np.testing.assert_allclose(found["params"]["stem"]["conv"]["kernel"], 0.006, rtol=1e-5)


def test_a_fresh_head_has_fresh_ranges(tmp_path, few_layers):
    head = classification.Head(3)
    spec = ModelSpec(
        "classification", Backbone(width=0.1), head, Preprocessing(33, "resize(size)"), MODE
    )
    made_for = tasks.find("classification").for_model(head, ("a", "b", "c"))
    saved = model_dir.read(tiny_model.write_for(made_for, spec, tmp_path / "model"))
    other = tasks.find("classification").for_model(classification.Head(4), tuple("defg"))
    fresh = variables(other.network(spec.backbone, MODE))
    kept = other.transfer(saved, fresh).variables["batch_stats"]
    assert kept["classifier_range"] == {"low": 0, "high": 0}
    assert kept["pooled_range"] == saved.batch_stats["pooled_range"]
    assert kept["stem"]["range"] == saved.batch_stats["stem"]["range"]
