"""SSDLite against mmdet's: training steps in float64, and what it detects."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mbv2_jax.configs import default
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.tasks.detection.settings import Head
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib
from tests.support import peers, ssdlite_peer, torch_layers

CLASSES, BATCH, SIZE, WIDTH, STEPS, ROOM = 5, 8, 64, 0.35, 10, 6
SHARES = Head().anchor_sizes
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# Low, since training is chaotic: at 2**-8, rounding errors grow a hundredfold per step with these
# random weights. A power of two, since it is exact in float32, in which the schedule computes.
RATE, MOMENTUM, DECAY = 2.0**-16, 0.9, 4e-5


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Returns images with 1 to 6 objects each."""
    rng = np.random.default_rng(seed)
    boxes, labels = np.zeros((BATCH, ROOM, 4), np.float32), np.full((BATCH, ROOM), -1, np.int32)
    for i in range(BATCH):
        count = 1 + (i + seed) % ROOM
        low, size = rng.uniform(0, 40, (count, 2)), rng.uniform(6, 50, (count, 2))
        boxes[i, :count] = np.concatenate([low, (low + size).clip(0, SIZE)], 1)
        labels[i, :count] = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    return {"image": images, "boxes": boxes, "labels": labels}


class Trained(NamedTuple):
    """mmdet's weights before and after the steps, and the losses of these."""

    start: dict[str, Any]
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    losses: list[float]


@pytest.fixture(scope="module")
def trained() -> Trained:
    peer = ssdlite_peer.make(CLASSES, SIZE, SHARES, WIDTH).double().train()
    for _, predict in (*peer.bbox_head.cls_convs, *peer.bbox_head.reg_convs):
        predict.weight.data *= 0.02  # heads begin with small weights in mmdet, too
    layers = list(ssdlite_peer.layers(peer))
    params, stats = torch_layers.parameters(layers), torch_layers.statistics(layers)
    losses = theirs(peer, [make_batch(seed) for seed in range(STEPS)])
    start = {"params": params, "batch_stats": stats}
    return Trained(start, torch_layers.parameters(layers), torch_layers.statistics(layers), losses)


@pytest.mark.parametrize("devices", [1, 4])
def test_ten_training_steps_are_mmdets(trained, devices):
    with jax.enable_x64(True):
        batches = [make_batch(seed) for seed in range(STEPS)]
        state, losses = ours(trained.start, batches, devices)
    # The loss of the last step is of weights that nine steps have changed.
    np.testing.assert_allclose(losses, trained.losses, rtol=1e-7)
    # Float64 rounds at 1e-16, which normalisations by small variances and ten steps enlarge.
    compare(state.params, trained.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, trained.start["params"])
    assert max(jax.tree.leaves(moved)) > 1e-4
    compare(state.batch_stats, trained.batch_stats)


def compare(ours: Any, theirs: Any) -> None:
    """Asserts that no array is further from the other than 1e-7 of its largest value."""

    def check(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)
        assert error <= 1e-7, f"{jax.tree_util.keystr(path)}: {error:.2e}"

    jax.tree_util.tree_map_with_path(check, ours, theirs)


def ours(start: Any, batches: list[dict[str, np.ndarray]], devices: int) -> tuple[Any, list[float]]:
    """Returns the state after the steps of the real training program, and their losses."""
    config = default.get_config("detection")
    config.update_from_flattened_dict(
        {
            "batch_size": BATCH,
            "model.num_classes": CLASSES,
            "model.width": WIDTH,
            "model.max_boxes": ROOM,
            "model.bn_epsilon": 1e-3,
            "model.bn_momentum": 0.97,
            "model.dtype": "float64",
            "data.image_size": SIZE,
            "data.mean": MEAN,
            "data.std": STD,
            "optimizer.momentum": MOMENTUM,
            "optimizer.weight_decay": DECAY,
            "schedule.name": "constant",
            "schedule.base_lr": RATE,
        }
    )
    settings = config_lib.read(config)
    spec, task = config_lib.resolve(settings, None)
    mesh = mesh_lib.create(jax.devices()[:devices])
    program = program_lib.build(settings, spec, task, mesh, steps_per_epoch=100, total_steps=100)
    state, losses = program.restart(jax.tree.map(jnp.asarray, start)), []
    frame = np.zeros((BATCH, 6), np.float32)  # which only evaluation looks at
    for batch in batches:
        state, metrics = program.step(state, batch | {"frame": frame}, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


def theirs(peer: Any, batches: list[dict[str, np.ndarray]]) -> list[float]:
    """Trains mmdet's model; returns the losses of the steps."""
    optimizer = torch.optim.SGD(peer.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    found = []
    for batch in batches:
        images = (batch["image"].astype(np.float64) - MEAN) / STD
        with in_float64(peer):
            parts = peer.loss(peers.nchw(images), samples(batch))
        loss = torch.stack([part.sum() for values in parts.values() for part in values]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@contextlib.contextmanager
def in_float64(peer: Any) -> Iterator[None]:
    """Keeps mmdet from rounding to float32, as it does in any dtype.

    It rounds anchors, boxes and their codes, and adds float32's epsilon to the positives by which
    the loss of boxes is divided: 4e-9 of it, enough to exchange two negatives after some steps.
    """
    generator = peer.bbox_head.prior_generator
    rounded = generator.grid_priors

    def priors(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return [anchors.double() for anchors in rounded(*args, **kwargs)]

    with (
        mock.patch.object(generator, "grid_priors", priors),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch, "finfo", return_value=types.SimpleNamespace(eps=0.0)),
    ):
        yield


def samples(batch: dict[str, np.ndarray]) -> list[Any]:
    """Returns mmdet's description of a batch."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    found = []
    for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True):
        there = labels >= 0
        sample = DetDataSample(metainfo={"img_shape": (SIZE, SIZE), "pad_shape": (SIZE, SIZE)})
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes[there]).double(),
            labels=torch.from_numpy(labels[there].astype(np.int64)),
        )
        found.append(sample)
    return found
