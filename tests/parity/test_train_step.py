"""Whole training steps against PyTorch's, and the same steps on one device and on four."""

import jax
import numpy as np
import torch

from mbv2_jax.runtime import mesh as mesh_lib
from tests.support import peers
from tests.support.train_steps import CLASSES, RATE, WIDTH, assert_close, batches, make_config, run

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def test_three_steps_equal_torchs(few_layers):
    """Compares loss, optimizer and average; test_training.py has the whole network's gradients."""
    model = peers.short_torchvision(CLASSES, WIDTH)
    peers.randomize(model, seed=1)
    model = model.double().train()
    config = make_config(**{"model.dtype": "float64", "ema.decay": 0.5})
    with jax.enable_x64(True):
        variables = {"params": peers.parameters(model), "batch_stats": peers.statistics(model)}
        mesh = mesh_lib.create(jax.devices()[:1])
        (*_, state), log = run(config, mesh, peers.as_jax(variables), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=4e-5)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    averaged.update_parameters(model)  # the first call copies
    losses = []
    for batch in batches(3):
        images = (batch["image"].astype(np.float64) - MEAN) / STD
        logits = model(peers.nchw(images))
        labels = torch.from_numpy(batch["label"]).long()
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
        losses.append(loss.item())
    # Both are float64 and differ in the order of sums; 3e-13 was measured after one step.
    np.testing.assert_allclose([line["loss"] for line in log], losses, rtol=1e-9)
    assert_close(state.params, peers.parameters(model), 1e-9)
    assert_close(state.batch_stats, peers.statistics(model), 1e-9)
    assert_close(state.ema["params"], peers.parameters(averaged.module), 1e-9)
    assert_close(state.ema["batch_stats"], peers.statistics(averaged.module), 1e-9)
