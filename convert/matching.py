"""The match between the arrays of a file and those of the network, checked in both directions.

Every array of the file is used once or is on its layout's list of ignored ones, every array of the
network is filled, and every shape is the network's: otherwise the error lists all faults.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mbv2_jax import model_dir, tasks
from mbv2_jax.errors import UserError, listed, nearest
from mbv2_jax.models.layers import make_divisible
from mbv2_jax.models.mobilenet_v2 import LAST_CHANNELS, STAGES, STEM_CHANNELS

from . import classifier
from .layouts import LAYOUTS, Array, Layout
from .layouts.mobilenet_v2 import WIDTHS
from .readers import ForeignFile

Tensors = Mapping[str, np.ndarray]
Arrays = Mapping[str, Array]
Shapes = Mapping[tuple[str, ...], tuple[int, ...]]

# A file with a smaller share of a layout's names has another layout, or another network.
_RECOGNISED = 0.5

# Several widths have the same channel counts; the first is taken: common ones, then round ones.
_CANDIDATES = (
    *sorted(WIDTHS, reverse=True),
    *(tenths / 10 for tenths in range(1, 41)),
    *(hundredths / 100 for hundredths in range(5, 401)),
)

_LISTED = 20  # names in a message, of each kind of fault


@dataclasses.dataclass(frozen=True)
class Match:
    """The arrays of a file as the network's variables.

    Attributes:
      name, layout: the layout of the file, a key of LAYOUTS and its value.
      width: of the network.
      head: the task's dataclass; None where the file holds a backbone alone.
      variables: {"params", "batch_stats"}, nested dicts of float32 numpy arrays.
      ignored: the number of the file's arrays that are not used.
    """

    name: str
    layout: Layout
    width: float
    head: Any
    variables: dict[str, Any]
    ignored: int


def match(file: ForeignFile, layout: str = "auto") -> Match:
    """Matches the arrays of a file with the network's variables.

    Args:
      file: from readers.read.
      layout: a key of LAYOUTS, or "auto" to recognise it by the names.

    Raises:
      UserError: the file is not of this network, or not of that layout; lists every fault.
    """
    name, chosen = _recognise(file, layout)
    tensors = {chosen.canonical(name): tensor for name, tensor in file.tensors.items()}
    arrays = chosen.arrays()
    head = classifier.read_head(tensors, arrays)
    if head is None:
        arrays = {n: array for n, array in arrays.items() if classifier.LAYER not in array.path}
    width = _width(tensors, arrays)
    shapes = _shapes(chosen, width, head)
    faults = _name_faults(tensors, arrays, chosen) + _array_faults(tensors, arrays, shapes)
    if faults:
        raise UserError(
            f"{file.path} is not a MobileNetV2 of width {width} (layout: {chosen.owner}): "
            + "; ".join(faults)
        )
    return Match(name, chosen, width, head, _to_tree(tensors, arrays), len(tensors) - len(arrays))


def _recognise(file: ForeignFile, wanted: str) -> tuple[str, Layout]:
    """Returns the layout whose names the file has, for a whole network or for a backbone alone."""
    if wanted != "auto" and wanted not in LAYOUTS:
        raise UserError(f"unknown layout {wanted!r}; {nearest(wanted, ['auto', *LAYOUTS])}")
    shares: dict[str, tuple[float, Layout]] = {}
    for name, layout in LAYOUTS.items():
        for variant in (layout, layout.without_prefix()):
            names = variant.arrays().keys()
            share = len(names & file.tensors.keys()) / len(names)
            if name not in shares or share > shares[name][0]:
                shares[name] = (share, variant)
    best = max(shares, key=lambda name: shares[name][0])
    chosen = best if wanted == "auto" else wanted
    if shares[chosen][0] >= _RECOGNISED:
        return chosen, shares[chosen][1]
    some = listed(sorted(file.tensors), 3, ", ")
    found = f"{file.path} holds {len(file.tensors)} arrays ({some})"
    if shares[best][0] >= _RECOGNISED:
        raise UserError(f"{found}: not layout {wanted!r}, but {best!r}; leave out --layout")
    raise UserError(
        f"{found}, which are not those of a MobileNetV2 in a layout that is known here: "
        f"{', '.join(LAYOUTS)}"
    )


def _width(tensors: Tensors, arrays: Arrays) -> float:
    """Returns the width multiplier that explains the channels of the most layers."""
    found = {
        array.path[1:-2]: tensors[name].shape[0]
        for name, array in arrays.items()
        if array.path[-1] == "scale" and name in tensors and tensors[name].ndim == 1
    }

    def agreeing(width: float) -> int:
        return sum(found.get(layer) == count for layer, count in _channels(width).items())

    return max(_CANDIDATES, key=agreeing)  # the first of equally good ones


def _channels(width: float) -> dict[tuple[str, ...], int]:
    """Returns the output channels of the layers that the width multiplier decides directly."""
    counts: dict[tuple[str, ...], int] = {("stem",): make_divisible(STEM_CHANNELS * width)}
    for stage, row in enumerate(STAGES, start=1):
        for block in range(row.blocks):
            counts[f"layer{stage}_{block}", "project"] = make_divisible(row.channels * width)
    return counts | {("last",): make_divisible(LAST_CHANNELS * max(width, 1.0))}


def _shapes(layout: Layout, width: float, head: Any) -> Shapes:
    """Returns the shape of each of the network's arrays by its path."""
    task = tasks.find(layout.task).for_model(head, ())
    network = task.network(dataclasses.replace(layout.backbone, width=width), layout.mode)
    tree = model_dir.shapes_of(network)
    return {
        tuple(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _name_faults(tensors: Tensors, arrays: Arrays, layout: Layout) -> list[str]:
    """Returns a line for each kind of array that is missing or superfluous."""
    ignored = [re.compile(pattern) for pattern in layout.ignored]
    missing = [name for name in arrays if name not in tensors]
    extra = [
        name
        for name in tensors
        if name not in arrays and not any(pattern.fullmatch(name) for pattern in ignored)
    ]
    faults = []
    if any(layout.is_further_block(name) for name in extra):
        faults.append("it has more blocks than the paper's network")
    return [*faults, *_named("missing", missing), *_named("not of this network", extra)]


def _array_faults(tensors: Tensors, arrays: Arrays, shapes: Shapes) -> list[str]:
    """Returns a line about the arrays whose shape or type is not the network's."""
    unfit = []
    for name in arrays.keys() & tensors.keys():
        tensor, array = tensors[name], arrays[name]
        ours = shapes[array.path]
        theirs = tuple(ours[array.axes.index(axis)] for axis in range(len(ours)))
        if tensor.shape != theirs or not np.issubdtype(tensor.dtype, np.floating):
            unfit.append(f"{name} is {tensor.dtype} {tensor.shape}, not {theirs}")
        elif array.path[-1] == "var" and (tensor < 0).any():
            unfit.append(f"{name}, a variance, is negative in places")
    return _named("unfit", unfit)


def _named(kind: str, names: list[str]) -> list[str]:
    """Returns one line that lists faults of a kind; [] without faults."""
    return [f"{kind}: {listed(sorted(names), _LISTED, ', ')}"] if names else []


def _to_tree(tensors: Tensors, arrays: Arrays) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} in float32, with our names and axes."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, array in arrays.items():
        *parents, last = array.path
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = np.ascontiguousarray(tensors[name].transpose(array.axes), np.float32)
    return tree
