"""The match between the arrays of a file and those of the network, checked in both directions.

Every array of the file is used once, is on its layout's list of ignored ones or is dropped by the
user's wish, every array of the network is filled, and every shape is the network's: otherwise the
error lists all faults.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mbv2_jax import model_dir, tasks
from mbv2_jax.errors import UserError, listed, nearest
from mbv2_jax.models.mobilenet_v2 import feature_info
from mbv2_jax.spec import Backbone, TrainingMode

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
_WIDTHS = (
    *sorted(WIDTHS, reverse=True),
    *(tenths / 10 for tenths in range(1, 41)),
    *(hundredths / 100 for hundredths in range(5, 401)),
)
# The same for the divisors of channels: that of every port, and TensorFlow's DeepLab's.
_DIVISORS = (8, 1)
# The same for depths: the paper's, timm's, then round ones.
_DEPTHS = (1.0, 1.2, 1.4, *(tenths / 10 for tenths in range(1, 41)))

_LISTED = 20  # names in a message, of each kind of fault
_MOST_PREFIXES = 20  # that are tried for each layout; a file has one, or a few


@dataclasses.dataclass(frozen=True)
class Match:
    """The arrays of a file as the network's variables.

    Attributes:
      name, layout: the layout of the file, a key of LAYOUTS and its value.
      prefix: the beginning of the names of the backbone's arrays in the file.
      backbone: of the network: the layout's, with the sizes that the arrays show.
      head: the task's dataclass; None where there is a backbone alone.
      variables: {"params", "batch_stats"}, nested dicts of float32 numpy arrays.
      ignored: the meanings of the file's arrays that are not needed here, and how many have each.
      dropped: the names of the head's arrays that the user wanted to leave out.
      notes: the assumptions about the head, one line each.
    """

    name: str
    layout: Layout
    prefix: str
    backbone: Backbone
    head: Any
    variables: dict[str, Any]
    ignored: Counter[str]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def match(file: ForeignFile, layout: str = "auto", *, features_only: bool = False) -> Match:
    """Matches the arrays of a file with the network's variables.

    Args:
      file: from readers.read.
      layout: a key of LAYOUTS, or "auto" to recognise it by the names.
      features_only: whether to leave out whatever follows the backbone.

    Raises:
      UserError: the file is not of this network, or not of that layout; lists every fault.
    """
    found = _recognise(file, layout)
    chosen = found.layout
    tensors = _without_copies(file, found)
    arrays = {
        found.prefix + chosen.relative(n): a for n, a in chosen.arrays(found.backbone).items()
    }
    backbone = _sized(found.backbone, tensors, arrays)
    reasons = {name: chosen.ignores(name) for name in tensors if name not in arrays}
    ignored = Counter(why for why in reasons.values() if why)
    rest = {name: tensors[name] for name, why in reasons.items() if not why}
    faults = _backbone_faults(tensors, arrays, _shapes(chosen.task, backbone))
    if faults:
        others = classifier.no_dense(rest, chosen.framework)
        raise UserError(
            f"{file.path} is not a MobileNetV2 of width {backbone.width} (layout: {chosen.owner}): "
            + "; ".join([*faults, *_named("not of this network", others)])
        )
    variables = _to_tree(tensors, arrays)
    if features_only:
        return Match(
            found.name,
            chosen,
            found.prefix,
            backbone,
            None,
            variables,
            ignored,
            tuple(rest),
        )
    head = _head(file, rest, found, backbone)
    variables["params"] |= head.params
    return Match(
        found.name,
        chosen,
        found.prefix,
        backbone,
        head.spec,
        variables,
        ignored,
        notes=head.notes,
    )


class _Recognised(NamedTuple):
    """A layout whose names a file has.

    Attributes:
      name, layout: a key of LAYOUTS and its value.
      prefix: the beginning of the names of the backbone's arrays.
      others: prefixes behind which there is another such backbone.
      share: of the layout's names of the paper's backbone that the file has.
      backbone: the layout's, with the blocks that the names show.
    """

    name: str
    layout: Layout
    prefix: str
    others: tuple[str, ...]
    share: float
    backbone: Backbone


def _recognise(file: ForeignFile, wanted: str) -> _Recognised:
    """Returns the layout whose names the file has, behind whatever prefix."""
    if wanted != "auto" and wanted not in LAYOUTS:
        raise UserError(f"unknown layout {wanted!r}; {nearest(wanted, ['auto', *LAYOUTS])}")
    found = {name: _find(file.tensors, name, layout) for name, layout in LAYOUTS.items()}
    best = max(found, key=lambda name: found[name].share)
    chosen = best if wanted == "auto" else wanted
    if found[chosen].share >= _RECOGNISED:
        return found[chosen]
    some = listed(sorted(file.tensors), 3, ", ")
    held = f"{file.path} holds {len(file.tensors)} arrays ({some})"
    if found[best].share >= _RECOGNISED:
        raise UserError(f"{held}: not layout {wanted!r}, but {best!r}; leave out --layout")
    raise UserError(
        f"{held}, which are not those of a MobileNetV2 in a layout that is known here: "
        f"{', '.join(LAYOUTS)}"
    )


def _find(tensors: Tensors, name: str, layout: Layout) -> _Recognised:
    """Returns the prefix behind which a file has the most of a layout's names."""

    def relative(backbone: Backbone) -> list[str]:
        return [layout.relative(name) for name in layout.arrays(backbone)]

    paper = relative(layout.backbone)

    def share(prefix: str) -> float:
        return sum(prefix + name in tensors for name in paper) / len(paper)

    prefixes = [layout.prefix, *_prefixes(tensors, paper, layout.framework.separator)]
    shares = {prefix: share(prefix) for prefix in prefixes}
    best = max(shares, key=lambda prefix: shares[prefix])
    others = tuple(p for p in shares if p != best and shares[p] >= _RECOGNISED)
    backbone = layout.backbone
    if shares[best] >= _RECOGNISED:
        backbone = _with_depth(backbone, layout, {n for n in tensors if n.startswith(best)}, best)
    return _Recognised(name, layout, best, others, shares[best], backbone)


def _prefixes(tensors: Tensors, names: list[str], separator: str) -> list[str]:
    """Returns what stands before the names of some of a layout's arrays, the most common first."""
    anchors = {names[0], names[len(names) // 2], names[-1]}
    counts = Counter(
        tensor.removesuffix(anchor)
        for tensor in tensors
        for anchor in anchors
        if tensor == anchor or tensor.endswith(separator + anchor)
    )
    return [prefix for prefix, _ in counts.most_common(_MOST_PREFIXES)]


def _with_depth(backbone: Backbone, layout: Layout, names: set[str], prefix: str) -> Backbone:
    """Returns a backbone with the depth that explains the names best, and the last layer if any."""

    def agreeing(depth: float) -> int:
        deep = dataclasses.replace(backbone, depth=depth)
        wanted = {prefix + layout.relative(name) for name in layout.arrays(deep)}
        return len(wanted & names) - len(wanted - names)

    deep = dataclasses.replace(backbone, depth=max(_DEPTHS, key=agreeing))
    last = [
        prefix + layout.relative(name)
        for name, array in layout.arrays(deep).items()
        if array.path[1] == "last"
    ]
    return dataclasses.replace(deep, last_convolution=any(name in names for name in last))


def _without_copies(file: ForeignFile, found: _Recognised) -> Tensors:
    """Returns the arrays without those of another backbone that has the same values.

    PyTorch saves a module twice that has two names.

    Raises:
      UserError: another backbone has other values.
    """
    tensors = file.tensors
    for other in found.others:
        copies = {
            name: found.prefix + name.removeprefix(other)
            for name in tensors
            if name.startswith(other)
        }
        pairs = [(a, b) for a, b in copies.items() if b in tensors and a != b]
        if not all(np.array_equal(tensors[a], tensors[b]) for a, b in pairs):
            raise UserError(
                f"{file.path} holds several networks, behind the prefixes {found.prefix!r} and "
                f"{other!r}: save the right one to a file of its own"
            )
        removed = {a for a, _ in pairs}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in removed}
    return tensors


def _sized(backbone: Backbone, tensors: Tensors, arrays: Arrays) -> Backbone:
    """Returns a backbone with the width that explains the channels of the most layers."""
    found = {
        array.path[1:-2]: tensors[name].shape[0]
        for name, array in arrays.items()
        if array.path[-1] == "scale" and name in tensors and tensors[name].ndim == 1
    }

    def candidates() -> Iterator[Backbone]:
        for divisor, fixed_ends, width in itertools.product(_DIVISORS, (False, True), _WIDTHS):
            yield dataclasses.replace(backbone, width=width, fixed_ends=fixed_ends, divisor=divisor)

    def agreeing(candidate: Backbone) -> int:
        sizes = {
            (
                *name.split("/"),
                *(() if name in ("stem", "last") or "/" in name else ("project",)),
            ): s
            for name, s in feature_info(candidate).items()
        }
        return sum(layer in found and found[layer] == s.channels for layer, s in sizes.items())

    return max(candidates(), key=agreeing)  # the first of equally good ones


@functools.cache  # tracing the network takes half a second
def _shapes(task: str, backbone: Backbone) -> Shapes:
    """Returns the shape of each of the backbone's arrays by its path."""
    network = tasks.find(task).for_model(None, ()).network(backbone, TrainingMode())
    tree = model_dir.shapes_of(network)
    return {
        tuple(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _head(
    file: ForeignFile, rest: Tensors, found: _Recognised, backbone: Backbone
) -> "classifier.FoundHead":
    """Returns the head that the rest of a file's arrays are.

    Raises:
      UserError: they are another head than a classifier; names the remedy.
    """
    channels = list(feature_info(backbone).values())[-1].channels
    head = classifier.find_head(file.contents, rest, found.layout.framework, channels)
    if head.faults:
        raise UserError(
            f"{file.path} is a MobileNetV2 (layout: {found.layout.owner}), but its head is not a "
            f"classifier of dense layers: {'; '.join(head.faults)}. --features-only converts the "
            "backbone alone"
        )
    return head


def _backbone_faults(tensors: Tensors, arrays: Arrays, shapes: Shapes) -> list[str]:
    """Returns lines about the backbone's arrays that are missing, or of a wrong shape or type."""
    missing = [name for name in arrays if name not in tensors]
    unfit = []
    for name in arrays.keys() & tensors.keys():
        tensor, array = tensors[name], arrays[name]
        ours = shapes[array.path]
        theirs = tuple(ours[array.axes.index(axis)] for axis in range(len(ours)))
        if tensor.shape != theirs or not np.issubdtype(tensor.dtype, np.floating):
            unfit.append(f"{name} is {tensor.dtype} {tensor.shape}, not {theirs}")
        elif array.path[-1] == "var" and (tensor < 0).any():
            unfit.append(f"{name}, a variance, is negative in places")
    return [*_named("missing", missing), *_named("unfit", unfit)]


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
