"""model.bn_group_size on four devices, against torch's data-parallel replicas."""

import copy
from typing import Any

import jax
import numpy as np
import pytest
import torch

from mbv2_jax.configs import default
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.spec import Preprocessing
from mbv2_jax.training import compile as compile_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib
from tests.support import peers

# Each layer has statistics of its own: few layers suffice.
pytestmark = pytest.mark.usefixtures("few_layers")

CLASSES, BATCH, SIZE, RATE = 7, 8, 64, 2.0**-12


def make_config(group_size: Any) -> Any:
    config = default.get_config()
    config.batch_size = BATCH
    config.model.width = 0.1
    config.model.dtype = "float64"
    config.model.num_classes = CLASSES
    config.model.bn_group_size = group_size
    config.data.image_size = SIZE
    config.data.train_transforms = "resize(size)"
    config.schedule.base_lr = RATE
    config.optimizer.momentum = 0.0
    return config


def build(config: Any) -> program_lib.Program:
    """Returns the program on four devices, each with two examples."""
    mesh = mesh_lib.create()
    assert mesh.size == 4
    settings = config_lib.read(config)
    spec, task = config_lib.resolve(settings, None)
    return program_lib.build(settings, spec, task, mesh, steps_per_epoch=1000, total_steps=1000)


def torchs(model: torch.nn.Module, batch: dict[str, np.ndarray], groups: int) -> Any:
    """Returns means over replicas, each with a share of the batch.

    They are of the loss, the gradients, as DistributedDataParallel averages them, and the running
    statistics, of which it keeps one replica's.
    """
    replicas = [copy.deepcopy(model) for _ in range(groups)]
    preprocessing = Preprocessing()
    images = (batch["image"].astype(np.float64) - preprocessing.mean) / preprocessing.std
    losses = []
    shares = zip(np.split(images, groups), np.split(batch["label"], groups), strict=True)
    for replica, (image, label) in zip(replicas, shares, strict=True):
        loss = torch.nn.functional.cross_entropy(
            replica(peers.nchw(image)), torch.from_numpy(label).long()
        )
        loss.backward()
        losses.append(loss.item())
        for parameter in replica.parameters():
            parameter.data = parameter.grad
    trees = [(peers.parameters(replica), peers.statistics(replica)) for replica in replicas]
    gradients, statistics = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *trees)
    return np.mean(losses), gradients, statistics


@pytest.fixture
def model(few_layers) -> torch.nn.Module:
    network = peers.short_torchvision(CLASSES, width=0.1)
    peers.randomize(network, seed=1)
    return network.double().train()


# There are four devices of two examples each: a group of 4 spans two devices. No map is smaller
# than 2 x 2. test_train_step.py has the group of all examples, too.
GROUPS = [("device", 4), (4, 2), pytest.param(0, 1, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("group_size", "groups"), GROUPS)
def test_a_step_is_that_of_torchs_replicas(model, group_size, groups):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    }
    loss, gradients, statistics = torchs(model, batch, groups)
    with jax.enable_x64(True):
        program = build(make_config(group_size))
        before = peers.as_jax(
            {"params": peers.parameters(model), "batch_stats": peers.statistics(model)}
        )
        arguments = (program.restart(before), batch, jax.random.key(0))
        compiled = program.step.lower(*arguments).compile()
        state, metrics = compiled(*arguments)
        moved = jax.tree.map(lambda a, b: (a - b) / RATE, before["params"], state.params)
        found = jax.device_get((metrics["loss"], moved, state.batch_stats))
    # Both are float64. The gradient is a difference of parameters of size 1, divided by 2^-12,
    # which leaves an error of 1e-12; normalisations of few values enlarge it.
    np.testing.assert_allclose(found[0], loss, rtol=1e-9)
    for ours, theirs in zip(found[1:], (gradients, statistics), strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), ours, theirs
        )
    # Gradients and metrics are always summed over the devices, several at a time. Where groups span
    # devices, each normalisation exchanges its sums too, forwards and backwards.
    norms = len(peers.layer_names())
    if group_size == "device":
        assert compile_lib.exchanges(compiled) < norms
    else:
        assert compile_lib.exchanges(compiled) >= 2 * norms
