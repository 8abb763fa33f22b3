"""Outputs of a converted network and of the peer's own, compared in float64."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from flax import linen as nn

from mbv2_jax.model_dir import SavedModel
from mbv2_jax.spec import TrainingMode
from tests.support import peers

# Small images keep this quick; 64 halves evenly five times, Keras is tested with odd sizes.
SIZE = 64
# Relative to a map's largest value. float64 rounds at 1e-16, which 53 layers enlarge to 2e-13.
# Any wrong array, padding or epsilon gives 1e-4 and more.
TOLERANCE = 1e-11
BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # of layer1..layer7 in Table 2 of the paper (column n)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs of a network, as float64 numpy arrays.

    Attributes:
      maps: of layer1..7 and the last convolution, (N, H, W, C).
      logits: (N, classes); None where there is no classifier.
    """

    maps: Sequence[np.ndarray]
    logits: np.ndarray | None


def images(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(size).standard_normal((2, size, size, 3))


def of_torch(model: torch.nn.Module, ends: Sequence[torch.nn.Module], x: np.ndarray) -> Outputs:
    """Runs a torch network in float64; `ends` are its modules whose outputs are the maps."""
    model.double().eval()
    maps: list[np.ndarray] = []
    hooks = [
        end.register_forward_hook(lambda _, __, y: maps.append(peers.nhwc(y.clone())))
        for end in ends
    ]
    with torch.no_grad():
        y = model(peers.nchw(x))
    for hook in hooks:
        hook.remove()
    y = getattr(y, "logits", y)
    return Outputs(maps, y.numpy() if isinstance(y, torch.Tensor) and y.ndim == 2 else None)


def of_converted(saved: SavedModel, x: np.ndarray) -> Outputs:
    """Runs a converted network in float64."""
    with jax.enable_x64(True):
        # The training mode has no effect here; one for all files lets them share compiled programs.
        model = saved.task().network(saved.spec.backbone, TrainingMode(dtype="float64"))
        ends = _ends(saved.spec.backbone.depth)
        y, maps = _forward(model, ends, jax.tree.map(np.float64, saved.variables()), x)
    return Outputs([np.asarray(m) for m in maps], None if saved.features_only else np.asarray(y))


def _ends(depth: float) -> tuple[str, ...]:
    """Returns our modules whose outputs are the maps: the last of layer1..7, the last conv."""
    blocks = (BLOCKS[0], *(math.ceil(n * depth) for n in BLOCKS[1:-1]), BLOCKS[-1])
    return (*(f"layer{i}_{n - 1}" for i, n in enumerate(blocks, start=1)), "last")


@partial(jax.jit, static_argnums=(0, 1))
def _forward(
    model: nn.Module, ends: tuple[str, ...], variables: Mapping[str, Any], x: jax.Array
) -> tuple[Any, list[jax.Array]]:
    def is_end(module: nn.Module, _: str) -> bool:
        return module.name in ends

    y, state = model.apply(variables, x, capture_intermediates=is_end, mutable=["intermediates"])
    captured = [state["intermediates"][end]["__call__"][0] for end in ends]
    # A block returns its output and its expansion.
    return y, [each[0] if isinstance(each, tuple) else each for each in captured]


def assert_same(got: Outputs, expected: Outputs, tolerance: float = TOLERANCE) -> None:
    assert len(got.maps) == len(expected.maps) == len(BLOCKS) + 1
    assert (got.logits is None) == (expected.logits is None)
    names = [*(f"layer{i}" for i in range(1, len(BLOCKS) + 1)), "last", "logits"]
    pairs = zip((*got.maps, got.logits), (*expected.maps, expected.logits), strict=True)
    for name, (ours, theirs) in zip(names, pairs, strict=True):
        if ours is None or theirs is None:
            continue
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        assert theirs.std() > 0.01, f"{name}: the peer's are all alike, and would hide anything"
        error = abs(ours - theirs).max() / abs(theirs).max()
        assert error <= tolerance, name
