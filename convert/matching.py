"""Which array of a file is which of the network's, checked both ways.

Every array of the file is used once or is on its layout's list of ignored ones, every array of the
network is filled, and every shape is the network's: else all that is wrong is said, and nothing
comes out.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbv2_jax.errors import UserError, listed, nearest
from mbv2_jax.models.layers import make_divisible
from mbv2_jax.models.mobilenet_v2 import LAST_CHANNELS, STAGES, STEM_CHANNELS, MobileNetV2
from mbv2_jax.models.variants import VARIANTS

from .layouts import LAYOUTS, Array, Layout
from .readers import ForeignFile

# A file that has fewer of a layout's names than this share is another network, or another layout.
_RECOGNISED = 0.5

# Several widths have the same channel counts: the customary ones come first, then the rounder ones.
_WIDTHS = sorted({variant.backbone.width for variant in VARIANTS.values()}, reverse=True)
_WIDTHS += [tenths / 10 for tenths in range(1, 41)]
_WIDTHS += [hundredths / 100 for hundredths in range(5, 401)]

_LISTED = 20  # names of a kind of fault that a message lists


@dataclasses.dataclass(frozen=True)
class Match:
    """A file's arrays in their places.

    Attributes:
      name, layout: whose names they are.
      width, num_classes: of the network; num_classes None where there is no classifier.
      variables: {"params", "batch_stats"}, nested dicts of float32 numpy arrays.
      ignored: how many arrays of the file are of no use.
    """

    name: str
    layout: Layout
    width: float
    num_classes: int | None
    variables: dict[str, Any]
    ignored: int


def match(file: ForeignFile, layout: str = "auto") -> Match:
    """Puts the arrays of a file into their places.

    Args:
      file: from readers.read.
      layout: a key of LAYOUTS, or "auto" to tell it from the names.

    Raises:
      UserError: this is not the network, or not in that layout; lists every fault.
    """
    name, table = _recognise(file, layout)
    tensors = {table.canonical(name): tensor for name, tensor in file.tensors.items()}
    file = dataclasses.replace(file, tensors=tensors)
    arrays = table.arrays()
    num_classes = _num_classes(file, arrays)
    if num_classes is None:  # a backbone alone
        arrays = {name: array for name, array in arrays.items() if "classifier" not in array.path}
    width = _width(file, arrays)
    variables = _variables(file, table, arrays, width, num_classes)
    return Match(name, table, width, num_classes, variables, len(file.tensors) - len(arrays))


def _recognise(file: ForeignFile, wanted: str) -> tuple[str, Layout]:
    """Returns the layout whose names the file has, as files with the whole network have them, or
    as those with a backbone alone do."""
    if wanted != "auto" and wanted not in LAYOUTS:
        raise UserError(f"unknown layout {wanted!r}; {nearest(wanted, ['auto', *LAYOUTS])}")
    shares: dict[str, tuple[float, Layout]] = {}
    for name, layout in LAYOUTS.items():
        for table in (layout, layout.without_prefix()):
            names = table.arrays().keys()
            share = len(names & file.tensors.keys()) / len(names)
            if name not in shares or share > shares[name][0]:
                shares[name] = (share, table)
    best = max(shares, key=lambda name: shares[name][0])
    chosen = best if wanted == "auto" else wanted
    if shares[chosen][0] >= _RECOGNISED:
        return chosen, shares[chosen][1]
    some = listed(sorted(file.tensors), 3, ", ") or "nothing"
    what = f"{file.path} holds {len(file.tensors)} arrays ({some})"
    if shares[best][0] >= _RECOGNISED:
        raise UserError(f"{what}: not layout {wanted!r}, but {best!r}; leave out --layout")
    raise UserError(
        f"{what}, which are not those of a MobileNetV2 in a layout that is known here: "
        f"{', '.join(LAYOUTS)}"
    )


def _width(file: ForeignFile, arrays: Mapping[str, Array]) -> float:
    """Returns the width multiplier with which most layers have the channels they have."""
    found = {
        array.path[1:-2]: file.tensors[name].shape[0]
        for name, array in arrays.items()
        if array.path[-1] == "scale" and name in file.tensors and file.tensors[name].ndim == 1
    }

    def agreeing(width: float) -> int:
        return sum(found.get(layer) == count for layer, count in _channels(width).items())

    return max(_WIDTHS, key=agreeing)  # the first of those that are equally good


def _channels(width: float) -> dict[tuple[str, ...], int]:
    """Returns the output channels of the layers that the width multiplier decides directly."""
    counts: dict[tuple[str, ...], int] = {("stem",): make_divisible(STEM_CHANNELS * width)}
    for stage, row in enumerate(STAGES, start=1):
        for block in range(row.blocks):
            counts[f"layer{stage}_{block}", "project"] = make_divisible(row.channels * width)
    return counts | {("last",): make_divisible(LAST_CHANNELS * max(width, 1.0))}


def _num_classes(file: ForeignFile, arrays: Mapping[str, Array]) -> int | None:
    """Returns the length of the classifier's bias (or the like); None where there is no head."""
    for name, array in arrays.items():
        if "classifier" in array.path and name in file.tensors:
            shape = file.tensors[name].shape
            if len(shape) == len(array.axes):
                return shape[array.axes[-1]]
    return None


def _variables(
    file: ForeignFile,
    layout: Layout,
    arrays: Mapping[str, Array],
    width: float,
    num_classes: int | None,
) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} in float32, after checking names and shapes both ways."""
    shapes = _shapes(width, num_classes)
    ignored = [re.compile(pattern) for pattern in layout.ignored]
    missing = [name for name in arrays if name not in file.tensors]
    extra = [
        name
        for name in file.tensors
        if name not in arrays and not any(pattern.fullmatch(name) for pattern in ignored)
    ]
    unfit = []
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name in arrays.keys() & file.tensors.keys():
        tensor, array = file.tensors[name], arrays[name]
        ours = shapes[array.path]
        theirs = tuple(ours[array.axes.index(axis)] for axis in range(len(ours)))
        if tensor.shape != theirs or not np.issubdtype(tensor.dtype, np.floating):
            unfit.append(f"{name} is {tensor.dtype} {tensor.shape}, not {theirs}")
        else:
            value = np.ascontiguousarray(tensor.transpose(array.axes), np.float32)
            _put(variables, array.path, value)
            if array.path[-1] == "var" and (value < 0).any():
                unfit.append(f"{name}, a variance, is negative in places")
    kinds = {"missing": missing, "not of this network": extra, "unfit": unfit}
    faults = [
        f"{what}: {listed(sorted(names), _LISTED, ', ')}" for what, names in kinds.items() if names
    ]
    if any(layout.is_further_block(name) for name in extra):
        faults.insert(0, "it has more blocks than the paper's network")
    if faults:
        raise UserError(
            f"{file.path} is not a MobileNetV2 of width {width} (layout: {layout.owner}): "
            + "; ".join(faults)
        )
    return variables


def _shapes(width: float, num_classes: int | None) -> dict[tuple[str, ...], tuple[int, ...]]:
    network = MobileNetV2(width=width, num_classes=num_classes)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    tree = jax.eval_shape(network.init, jax.eval_shape(jax.random.key, 0), image)
    return {
        tuple(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _put(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
