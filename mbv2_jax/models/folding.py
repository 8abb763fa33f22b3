"""Batch normalisation folded into the convolutions before it, for inference."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def fold(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
    """Returns the parameters of the folded network that gives the same outputs.

    With running statistics a normalisation is a factor and an offset per channel, which become part
    of the convolution before it: conv/{kernel,bias} replaces conv/kernel, norm/{scale,bias} and the
    statistics. The arithmetic is in float64, and its result is rounded once.

    Args:
      params: the 'params' collection of a network of `ConvNorm` layers and others.
      batch_stats: its 'batch_stats' collection.
      epsilon: its bn_epsilon.

    Returns:
      Nested dict of numpy arrays, of the dtypes of `params`. Layers without statistics, such as the
      classifier, are unchanged.
    """
    if "conv" in params:
        return {"conv": _fold_layer(params["conv"], params["norm"], batch_stats["norm"], epsilon)}
    return {
        name: fold(part, batch_stats[name], epsilon) if name in batch_stats else dict(part)
        for name, part in params.items()
    }


def _fold_layer(
    conv: Mapping[str, Any], norm: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, np.ndarray]:
    kernel = np.asarray(conv["kernel"])  # (K, K, C, C'); depthwise (K, K, 1, C')
    scale, offset, mean, var = (
        np.asarray(array, np.float64)
        for array in (norm["scale"], norm["bias"], stats["mean"], stats["var"])
    )
    factor = scale / np.sqrt(var + epsilon)  # (C',)
    return {
        "kernel": (kernel * factor).astype(kernel.dtype),
        "bias": (offset - mean * factor).astype(kernel.dtype),
    }
