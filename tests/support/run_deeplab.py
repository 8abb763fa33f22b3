"""The logits of a converted Mobile DeepLabv3."""

from functools import partial
from typing import Any

import jax
import numpy as np

from mbv2_jax.model_dir import SavedModel
from mbv2_jax.models.deeplabv3 import DeepLabV3
from mbv2_jax.spec import TrainingMode


def coarse_logits(saved: SavedModel, x: np.ndarray) -> np.ndarray:
    """Returns the logits at the network's output stride, in the dtype of x.

    Args:
      saved: the model.
      x: normalised images, (N, H, W, 3), float32 or float64.
    """
    with jax.enable_x64(x.dtype == np.float64):
        network = saved.task().network(saved.spec.backbone, TrainingMode(dtype=x.dtype.name))
        assert isinstance(network, DeepLabV3)
        variables = jax.tree.map(x.dtype.type, saved.variables())
        return np.asarray(_forward(network, variables, x))


@partial(jax.jit, static_argnums=0)
def _forward(network: DeepLabV3, variables: Any, x: jax.Array) -> Any:
    return network.apply(variables, x, method="coarse_logits")
