"""The arrays of a file as variables of a network: shapes checked, with our names and axes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mbv2_jax import model_dir, tasks
from mbv2_jax.errors import listed
from mbv2_jax.spec import Backbone, TrainingMode

from .layouts import Array

Tensors = Mapping[str, np.ndarray]
Arrays = Mapping[str, Array]
Shapes = Mapping[tuple[str, ...], tuple[int, ...]]

_LISTED = 20  # names in a message, of each kind of fault


@functools.cache  # tracing the network takes half a second
def shapes(task: str, backbone: Backbone, head: Any = None) -> Shapes:
    """Returns the shape of each array of a network by its path."""
    # The names of the classes do not matter.
    network = tasks.find(task).for_model(head, ()).network(backbone, TrainingMode())
    tree = model_dir.shapes_of(network)
    return {
        tuple(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def faults(tensors: Tensors, arrays: Arrays, wanted: Shapes) -> list[str]:
    """Returns lines about arrays that are missing, or of a wrong shape or type.

    Args:
      tensors: the file's.
      arrays: their positions in our tree, by their names in the file.
      wanted: the shapes there.
    """
    missing = [name for name in arrays if name not in tensors]
    unfit = []
    for name in arrays.keys() & tensors.keys():
        tensor, array = tensors[name], arrays[name]
        ours = wanted[array.path]
        theirs = tuple(ours[array.axes.index(axis)] for axis in range(len(ours)))
        if tensor.shape != theirs or not np.issubdtype(tensor.dtype, np.floating):
            unfit.append(f"{name} is {tensor.dtype} {tensor.shape}, not {theirs}")
        elif array.path[-1] == "var" and (tensor < 0).any():
            unfit.append(f"{name}, a variance, is negative in places")
    return [*named("missing", missing), *named("unfit", unfit)]


def named(kind: str, names: list[str]) -> list[str]:
    """Returns one line that lists faults of a kind; [] without faults."""
    return [f"{kind}: {listed(sorted(names), _LISTED, ', ')}"] if names else []


def to_tree(tensors: Tensors, arrays: Arrays) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} in float32, with our names and axes."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, array in arrays.items():
        *parents, last = array.path
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = np.ascontiguousarray(tensors[name].transpose(array.axes), np.float32)
    return tree
