"""The match between the arrays of a file and those of the network, checked in both directions.

Every array of the file is used once, is on its layout's list of ignored ones or is dropped by the
user's wish, every array of the network is filled, and every shape is the network's: otherwise the
error lists all faults.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from mbv2_jax.errors import UserError
from mbv2_jax.spec import Backbone

from . import arrays, classifier, heads, recognition
from .head import FoundHead
from .layouts import Layout
from .readers import ForeignFile
from .recognition import Recognised, Tensors


@dataclasses.dataclass(frozen=True)
class Match:
    """The arrays of a file as the network's variables.

    Attributes:
      name, layout: the layout of the file: a key of LAYOUTS, and the layout of that name for the
        task of the head.
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
    whole = heads.with_task(found, tensors)
    if features_only:  # of the network in the file, with the conventions of a backbone
        kept = ("last_convolution", "bn_epsilon")
        own = {name: getattr(whole.backbone, name) for name in kept}
        backbone = dataclasses.replace(found.backbone, **own)
        found = found._replace(backbone=backbone)
    else:
        found = whole
    positions = found.arrays()
    reasons = {name: whole.layout.ignores(name) for name in tensors if name not in positions}
    rest = {name: tensors[name] for name, why in reasons.items() if not why}
    shapes = arrays.shapes(found.layout.task, found.backbone)
    faults = arrays.faults(tensors, positions, shapes)
    if faults:
        others = classifier.no_dense(rest, found.layout.framework)
        raise UserError(
            f"{file.path} is not a MobileNetV2 of width {found.backbone.width} (layout: "
            f"{found.layout.owner}): "
            f"{'; '.join([*faults, *arrays.named('not of this network', others)])}"
        )
    head = FoundHead(None) if features_only else _head(file, rest, found)
    variables = arrays.to_tree(tensors, positions)
    return Match(
        found.name,
        found.layout,
        found.prefix,
        found.backbone,
        head.spec,
        {
            "params": variables["params"] | head.params,
            "batch_stats": variables["batch_stats"] | head.batch_stats,
        },
        ignored=Counter(why for why in reasons.values() if why),
        dropped=tuple(rest) if features_only else (),
        notes=(*head.notes, *found.layout.remarks_on(rest)),
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


def _head(file: ForeignFile, rest: Tensors, found: Recognised) -> FoundHead:
    """Returns the head that the rest of a file's arrays are.

    Raises:
      UserError: they are another head than those here; names the remedy.
    """
    kind = heads.of(found.layout.task)
    head = kind.find_head(file, rest, found)
    if head.faults:
        raise UserError(
            f"{file.path} is a MobileNetV2 (layout: {found.layout.owner}), but its head is not "
            f"{kind.DESCRIPTION}: {'; '.join(head.faults)}. --features-only converts the backbone "
            "alone"
        )
    return head
