"""Mobile DeepLabv3 against transformers', and its training step, in float64 on the CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mbv2_jax import spec
from mbv2_jax.configs import default
from mbv2_jax.models.deeplabv3 import DeepLabV3
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib
from tests.support import deeplab_peer, peers, torch_layers
from tests.support.float64 import assert_same

CLASSES, WIDTH = 5, 0.35
WEIGHTS, SMOOTHING = (0.5, 1.0, 2.0, 0.25, 1.5), 0.1
# Of (6, 12, 18), scaled as TensorFlow's deeplab scales them. At stride 32 the map is 2 pixels wide.
RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}


def make_backbone(output_stride: int, padding: str) -> spec.Backbone:
    return spec.Backbone(
        width=WIDTH,
        padding=padding,
        bn_epsilon=1e-3,
        output_stride=output_stride,
        last_convolution=False,
    )


@pytest.mark.parametrize("aspp", [False, True], ids=["no pyramid", "pyramid"])
@pytest.mark.parametrize(
    ("output_stride", "padding"), [(8, "same"), (16, "torch"), (16, "same"), (32, "torch")]
)
def test_logits_are_transformers(output_stride, padding, aspp):
    backbone = make_backbone(output_stride, padding)
    peer = deeplab_peer.make(backbone, CLASSES, RATES[output_stride] if aspp else ()).eval()
    images = np.random.default_rng(0).standard_normal((2, 65, 50, 3))
    network = DeepLabV3(
        CLASSES,
        (6, 12, 18) if aspp else (),
        architecture=backbone,
        mode=spec.TrainingMode(dtype="float64"),
    )
    with jax.enable_x64(True):
        variables = peers.as_jax(variables_of(peer))
        coarse = jax.jit(
            lambda images: network.apply(variables, images, method=network.coarse_logits)
        )(images)
        logits = network.apply(variables, images)
    with torch.no_grad():
        theirs = peer(peers.nchw(images)).logits
    assert_same({"logits": coarse}, {"logits": peers.nhwc(theirs)})
    assert coarse.shape[1:3] == (-(-65 // output_stride), -(-50 // output_stride))
    resized = torch.nn.functional.interpolate(theirs, (65, 50), mode="bilinear", align_corners=True)
    assert_same({"logits": logits}, {"logits": peers.nhwc(resized)})


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("output_stride", "padding", "fields"),
    [
        (16, "same", {}),
        (8, "torch", {"model.norm_eval": True, "model.align_corners": False}),
        (32, "same", {"model.aspp_rates": (6, 12, 18)}),
    ],
    ids=["live norms", "frozen norms", "pyramid"],
)
def test_a_training_step_is_torchs(output_stride, padding, fields, devices):
    backbone = make_backbone(output_stride, padding)
    rates = RATES[output_stride] if "model.aspp_rates" in fields else ()
    peer = deeplab_peer.make(backbone, CLASSES, rates)
    peer.train("model.norm_eval" not in fields)
    # In the other order: a step must not change the arrays that it starts from.
    variables, batch = variables_of(peer), make_batch()
    with jax.enable_x64(True):
        state, metrics = step(backbone, fields, devices, variables, batch)
    loss, logits = theirs(peer, batch, fields.get("model.align_corners", True))
    # With a rate of 1 and neither momentum nor decay, a step is the gradient.
    gradients = jax.tree.map(lambda old, new: old - new, variables["params"], state.params)
    assert_same(gradients, torch_layers.parameters(deeplab_peer.layers(peer), lambda p: p.grad))
    assert_same(state.batch_stats, torch_layers.statistics(deeplab_peer.layers(peer)))
    # Both are float64; sums of 8,000 pixels in another order.
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
    right = logits.argmax(1).numpy() == batch["labels"]
    counted = batch["labels"] != 255
    assert 0.1 < counted.mean() < 0.9
    np.testing.assert_allclose(metrics["pixel_accuracy"], 100 * right.sum() / counted.sum())


def variables_of(peer: Any) -> dict[str, Any]:
    layers = list(deeplab_peer.layers(peer))
    return {
        "params": torch_layers.parameters(layers),
        "batch_stats": torch_layers.statistics(layers),
    }


def make_batch() -> dict[str, np.ndarray]:
    """Returns 8 images; the number of pixels that count is another one in each, 0 in the first."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, (8, 33, 33)).astype(np.uint8)
    share = np.arange(8)[:, None, None] / 7
    labels[rng.random(labels.shape) >= share] = 255
    return {"image": rng.integers(0, 256, (8, 33, 33, 3), np.uint8), "labels": labels}


def step(
    backbone: spec.Backbone,
    fields: dict[str, Any],
    devices: int,
    variables: dict[str, Any],
    batch: dict[str, np.ndarray],
) -> tuple[Any, dict[str, float]]:
    """Returns the state after one step of the real training program, and its metrics."""
    config = default.get_config("segmentation")
    described = {f"model.{name}": getattr(backbone, name) for name in ("padding", "output_stride")}
    config.update_from_flattened_dict(
        {
            "batch_size": 8,
            "label_smoothing": SMOOTHING,
            "class_weights": WEIGHTS,
            "model.width": WIDTH,
            "model.bn_epsilon": backbone.bn_epsilon,
            "model.num_classes": CLASSES,
            "model.dtype": "float64",
            "data.image_size": 33,
            "data.mean": (127.5, 127.5, 127.5),
            "data.std": (127.5, 127.5, 127.5),
            "optimizer.momentum": 0.0,
            "optimizer.weight_decay": 0.0,
            "schedule.name": "constant",
            "schedule.base_lr": 1.0,
        }
        | described
        | fields
    )
    settings = config_lib.read(config)
    spec_, task = config_lib.resolve(settings, None)
    mesh = mesh_lib.create(jax.devices()[:devices])
    program = program_lib.build(settings, spec_, task, mesh, steps_per_epoch=10, total_steps=10)
    state = program.restart(jax.tree.map(jnp.asarray, variables))
    state, metrics = program.step(state, batch, jax.random.key(0))
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


def theirs(
    peer: Any, batch: dict[str, np.ndarray], align_corners: bool
) -> tuple[float, torch.Tensor]:
    """Returns torch's loss, whose gradients are then in the peer, and its logits."""
    images = batch["image"].astype(np.float64) / 127.5 - 1
    labels = torch.from_numpy(batch["labels"].astype(np.int64))
    logits = torch.nn.functional.interpolate(
        peer(peers.nchw(images)).logits, (33, 33), mode="bilinear", align_corners=align_corners
    )
    total = torch.nn.functional.cross_entropy(
        logits,
        labels,
        torch.tensor(WEIGHTS, dtype=torch.float64),
        ignore_index=255,
        reduction="sum",
        label_smoothing=SMOOTHING,
    )
    loss = total / (labels != 255).sum()
    peer.zero_grad()
    loss.backward()
    return loss.item(), logits
