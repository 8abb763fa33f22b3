"""The layers of a torch network as our trees of numpy arrays."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

# Our path of a layer, its convolution, and its normalisation if it has one.
Layer = tuple[str, torch.nn.Conv2d, torch.nn.BatchNorm2d | None]


def parameters(
    layers: Iterable[Layer], value: Callable[[torch.nn.Parameter], Any] = lambda p: p
) -> dict[str, Any]:
    """Returns the parameters of layers as our tree; `value` is as `peers.parameters` takes it."""
    tree: dict[str, Any] = {}
    for name, conv, norm in layers:
        # OIHW -> HWIO; a depthwise (C, 1, 3, 3) becomes (3, 3, 1, C).
        kernel = _array(value(conv.weight)).transpose(2, 3, 1, 0)
        if norm is None:
            assert conv.bias is not None
            _set(tree, name, {"kernel": kernel, "bias": _array(value(conv.bias))})
        else:
            scale, bias = _array(value(norm.weight)), _array(value(norm.bias))
            _set(tree, name, {"conv": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}})
    return tree


def statistics(layers: Iterable[Layer]) -> dict[str, Any]:
    """Returns the running statistics of layers as our batch_stats tree."""
    tree: dict[str, Any] = {}
    for name, _, norm in layers:
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            stats = {"mean": _array(norm.running_mean), "var": _array(norm.running_var)}
            _set(tree, name, {"norm": stats})
    return tree


def _array(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().numpy().copy()


def _set(tree: dict[str, Any], path: str, value: dict[str, Any]) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
