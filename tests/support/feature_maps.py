"""The feature maps of a converted network by name, and TF-slim's names of its blocks."""

from collections.abc import Sequence

import jax
import numpy as np

from mbv2_jax.model_dir import SavedModel
from mbv2_jax.models.mobilenet_v2 import Backbone, blocks


def of_converted(saved: SavedModel, endpoints: Sequence[str], x: np.ndarray) -> list[np.ndarray]:
    """Returns the maps of `endpoints`, names of `mobilenet_v2.feature_info`.

    Args:
      saved: a backbone.
      endpoints: their names.
      x: normalised images, (N, H, W, 3) float32.
    """
    backbone = Backbone(saved.spec.backbone, saved.spec.mode, tuple(endpoints))
    maps = jax.jit(backbone.apply)(saved.variables(), x)
    return [np.asarray(maps[name]) for name in endpoints]


def slim_blocks(saved: SavedModel) -> dict[str, str]:
    """Returns TF-slim's name of each block by ours: layer1_0 is expanded_conv, without a number."""
    names = [block.name for block in blocks(saved.spec.backbone)]
    return {name: f"expanded_conv_{i}" if i else "expanded_conv" for i, name in enumerate(names)}
