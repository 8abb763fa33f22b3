"""The moving average of parameters against torch's AveragedModel."""

from typing import Any

import jax
import numpy as np
import torch

from mbv2_jax.training.settings import Ema
from tests.support.pixel_step import batch, run


def test_average_is_torchs_called_every_third_step():
    states, _ = run([batch(seed) for seed in range(7)], ema=Ema(decay=0.75, every_steps=3))
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)

    def variables(state: Any) -> list[torch.Tensor]:
        leaves = jax.tree.leaves({"params": state.params, "batch_stats": state.batch_stats})
        return [torch.from_numpy(np.array(leaf)) for leaf in leaves]

    average = variables(states[0])
    for done, state in enumerate(states):
        if done in (3, 6):
            update(average, variables(state), done)
        for ours, theirs in zip(jax.tree.leaves(state.ema), average, strict=True):
            # float32: a lerp there, a sum of two products here, of values of order one.
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
        if done not in (0, 3, 6):  # unchanged to the bit
            jax.tree.map(np.testing.assert_array_equal, state.ema, states[done - 1].ema)
