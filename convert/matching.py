"""The match between the arrays of a file and those of the network, checked in both directions.

Every array of the file is used once, is on its layout's list of ignored ones or is dropped by the
user's wish, every array of the network is filled, and every shape is the network's: otherwise the
error lists all faults.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mbv2_jax import model_dir, tasks
from mbv2_jax.errors import UserError, listed
from mbv2_jax.models.mobilenet_v2 import feature_info
from mbv2_jax.spec import Backbone, TrainingMode

from . import classifier, recognition
from .classifier import FoundHead
from .layouts import Array, Layout
from .readers import ForeignFile
from .recognition import Recognised, Tensors

Arrays = Mapping[str, Array]
Shapes = Mapping[tuple[str, ...], tuple[int, ...]]

_LISTED = 20  # names in a message, of each kind of fault


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
    found = recognition.recognise(file, layout)
    tensors = _without_copies(file, found)
    found = recognition.sized(found, tensors)
    arrays, chosen = found.arrays(), found.layout
    reasons = {name: chosen.ignores(name) for name in tensors if name not in arrays}
    rest = {name: tensors[name] for name, why in reasons.items() if not why}
    faults = _backbone_faults(tensors, arrays, _shapes(chosen.task, found.backbone))
    if faults:
        others = classifier.no_dense(rest, chosen.framework)
        raise UserError(
            f"{file.path} is not a MobileNetV2 of width {found.backbone.width} (layout: "
            f"{chosen.owner}): {'; '.join([*faults, *_named('not of this network', others)])}"
        )
    head = FoundHead(None) if features_only else _head(file, rest, found)
    variables = _to_tree(tensors, arrays)
    variables["params"] |= head.params
    return Match(
        found.name,
        chosen,
        found.prefix,
        found.backbone,
        head.spec,
        variables,
        ignored=Counter(why for why in reasons.values() if why),
        dropped=tuple(rest) if features_only else (),
        notes=head.notes,
    )


def _without_copies(file: ForeignFile, found: Recognised) -> Tensors:
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


@functools.cache  # tracing the network takes half a second
def _shapes(task: str, backbone: Backbone) -> Shapes:
    """Returns the shape of each of the backbone's arrays by its path."""
    network = tasks.find(task).for_model(None, ()).network(backbone, TrainingMode())
    tree = model_dir.shapes_of(network)
    return {
        tuple(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _head(file: ForeignFile, rest: Tensors, found: Recognised) -> FoundHead:
    """Returns the head that the rest of a file's arrays are.

    Raises:
      UserError: they are another head than a classifier; names the remedy.
    """
    channels = list(feature_info(found.backbone).values())[-1].channels
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
