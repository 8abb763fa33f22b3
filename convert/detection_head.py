"""The head of converted weights for detection: the extra maps and the heads of SSDLite.

The numbers of maps, channels, anchors and classes come from the arrays; the maps of the backbone
from their channels, or from the file. No other module of the conversion knows these layers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mbv2_jax import spec as spec_lib
from mbv2_jax.data import classes
from mbv2_jax.models.mobilenet_v2 import feature_info, stage_endpoints
from mbv2_jax.spec import Backbone
from mbv2_jax.tasks.detection.anchors import AnchorTable
from mbv2_jax.tasks.detection.settings import Head

from . import arrays as arrays_lib
from . import own_file
from .class_names import ClassNames
from .head import FoundHead
from .layouts import Array, Layout
from .layouts.ssdlite import ORDERS, Order
from .readers import ForeignFile
from .recognition import Recognised

DESCRIPTION = "that of SSDLite"

_MOST_MAPS = 20  # that are looked for; the paper's network has 6
_OF_EXTRA = ("extra{}_reduce", "extra{}_depthwise", "extra{}_pointwise")
_OF_HEADS = ("class_depthwise{}", "class_logits{}", "box_depthwise{}", "box_codes{}")
_CODES = 4  # of a box

_Arrays = Mapping[str, np.ndarray]


def find_head(file: ForeignFile, rest: _Arrays, found: Recognised) -> FoundHead:
    """Returns the head in a file, see `heads.Kind`."""
    prefix, *others = found.layout.heads_in(rest)
    if others:
        several = ", ".join(map(repr, (prefix, *others)))
        return FoundHead(None, faults=(f"there are several, behind the prefixes {several}",))
    own = own_file.description(file)
    faults: list[str] = []
    if own is not None and isinstance(own.spec.head, Head):
        head = own.spec.head
    else:
        head, faults = _Told(file, rest, found, prefix).head()
    faults = faults or spec_lib.faults(Head, vars(head), "model")
    if faults:
        return FoundHead(None, faults=tuple(faults))
    known = {*feature_info(found.backbone), *_stages(found.backbone).values()}
    if unknown := [tap for tap in head.taps if tap not in known]:
        return FoundHead(None, faults=(f"the backbone has no {', '.join(unknown)}",))
    positions = {prefix + name: array for name, array in arrays(found.layout, head).items()}
    shapes = arrays_lib.shapes(found.layout.task, found.backbone, head)
    faults = arrays_lib.faults(rest, positions, shapes)
    faults += arrays_lib.named("not of this network", [n for n in rest if n not in positions])
    if faults:
        return FoundHead(None, faults=tuple(faults))
    tree = arrays_lib.to_tree(rest, positions)
    tree["params"] = _in_our_order(tree["params"], head, ORDERS[found.name])
    return FoundHead(head, **tree)


def usual_names(head: Head | None) -> ClassNames | None:
    """Returns COCO's names for its 80 classes, or for its 90 ids; None for others."""
    names = {len(names): names for names in (classes.COCO_NAMES, classes.COCO_ID_NAMES)}
    if head is None or head.num_classes not in names:
        return None
    return ClassNames(names[head.num_classes], "COCO's")


def warnings(head: Head | None, command: str) -> list[str]:
    """Returns no lines: the names of the classes are all that is assumed about this head."""
    del head, command
    return []


def summarize(head: Head) -> str:
    """Returns the size of the heads in words."""
    maps = len(head.taps) + len(head.extra_channels)
    count = "1 class" if head.num_classes == 1 else f"{head.num_classes} classes"
    return f"SSDLite on {' and '.join(head.taps)}, {maps} maps, {count} of boxes"


def misfits(layout: Layout, head: Head | None) -> list[str]:
    """Returns the fields of a head that the network of a layout does not have."""
    if head is None:
        return []
    faults = [
        f"model.{name} is {value}, there it is {layout.head[name]}"
        for name in ("anchors", "scores")
        if (value := getattr(head, name)) != layout.head[name]
    ]
    stages = [*(f"layer{i}" for i in range(1, 8)), "last"]
    if head.taps[-1] != "last" or any(tap not in stages for tap in head.taps):
        faults.append(f"model.taps is {head.taps}, there they are layer1 to layer7, then last")
    return faults


def arrays(layout: Layout, head: Head | None) -> dict[str, Array]:
    """Returns the position of each array of a head in our tree, by its whole name there."""
    if head is None:
        return {}
    maps = range(len(head.taps) + len(head.extra_channels))
    layers = [(row.format(i), 0) for i in maps for row in _OF_HEADS]
    for i, channels in enumerate(head.extra_channels):
        layers += [(row.format(i), channels) for row in _OF_EXTRA]
    return {
        name: array
        for layer, channels in layers
        for name, array in layout.convolution(layer, channels).items()
    }


class _Told:
    """The fields of a head that the arrays of a file tell.

    Args:
      file, rest, found: see `heads.Kind`.
      prefix: of the names of the head's arrays.
    """

    def __init__(self, file: ForeignFile, rest: _Arrays, found: Recognised, prefix: str):
        self._stated, self._rest = file.contents.stated, rest
        self._found, self._layout, self._prefix = found, found.layout, prefix

    def head(self) -> tuple[Head, list[str]]:
        """Returns the head, with the layout's values for what the arrays do not tell, and faults.

        The head is not to be used where there are faults.
        """
        usual = Head(**self._layout.head)
        extra = tuple(self._extra_channels())
        maps = _count(lambda i: any(True for _ in self._of(row.format(i) for row in _OF_HEADS)))
        counts = [self._outputs(f"box_codes{i}") // _CODES for i in range(maps)]
        table = self._layout.head.get("anchors") or ("mmdet" if counts[0] == 6 else "tensorflow")
        sizes = self._stated.get("model.anchor_sizes", usual.anchor_sizes)
        if maps != len(sizes) - 1:
            return usual, [f"it has {maps} maps, and its anchors are known for {len(sizes) - 1}"]
        for i, (known, count) in enumerate(
            zip(AnchorTable(table, sizes).counts, counts, strict=True)
        ):
            if count not in (0, known):  # 0: the layer is missing
                return usual, [f"map {i} has {count} anchors at a position, and {known} are known"]
        outputs = self._outputs("class_logits0")
        if not counts[0] or outputs % counts[0]:
            return usual, [f"map 0 has {outputs} logits for {counts[0]} anchors"]
        taps, faults = self._taps(maps - len(extra), usual)
        head = dataclasses.replace(
            usual,
            num_classes=outputs // counts[0] - 1,
            taps=taps,
            extra_channels=extra,
            anchors=table,
            anchor_sizes=sizes,
        )
        return head, faults

    def _extra_channels(self) -> Iterator[int]:
        """Yields the channels of each extra map."""
        sizes = sorted({array.size for array in self._rest.values() if array.ndim == 1})
        for i in range(_MOST_MAPS):
            rows = [row.format(i) for row in _OF_EXTRA]
            named = [c for c in sizes if any(True for _ in self._of(rows, c))]
            if not named:
                return
            # Without that layer, which is then missing, any number does.
            yield self._outputs(f"extra{i}_pointwise", named[0]) or named[0]

    def _taps(self, count: int, usual: Head) -> tuple[tuple[str, ...], list[str]]:
        """Returns the maps of the backbone that have a head, and why they are not known."""
        if count < 1:
            return (), ["it has no heads on maps of the backbone"]
        if taps := self._stated.get("model.taps"):
            return taps, []
        taps = []
        for i in range(count):
            channels = self._outputs(f"class_depthwise{i}")
            known = _with_channels(self._found.backbone, channels)
            if i < len(usual.taps) and usual.taps[i] in known:
                known = [usual.taps[i]]
            if len(known) != 1:
                return (), [f"map {i} has {channels} channels, as {len(known)} of the backbone's"]
            taps += known
        return tuple(taps), []

    def _of(self, layers: Iterable[str], channels: int = 0) -> Iterator[np.ndarray]:
        """Yields the arrays of some layers that the file has."""
        for layer in layers:
            for name in self._layout.convolution(layer, channels):
                if self._prefix + name in self._rest:
                    yield self._rest[self._prefix + name]

    def _outputs(self, layer: str, channels: int = 0) -> int:
        """Returns the channels that a layer gives; 0 where none of its arrays tells them."""
        for name, array in self._layout.convolution(layer, channels).items():
            theirs = self._rest.get(self._prefix + name)
            if theirs is not None and theirs.ndim == len(array.axes):
                return theirs.transpose(array.axes).shape[-1]
        return 0


def _count(is_there: Callable[[int], bool]) -> int:
    """Returns the number of maps, of which each with a lower number is there."""
    return len(list(itertools.takewhile(is_there, range(_MOST_MAPS))))


def _with_channels(backbone: Backbone, channels: int) -> list[str]:
    """Returns the taps with so many channels: stages, the last layer, and the paper's first tap."""
    found = feature_info(backbone)
    taps = _stages(backbone) | {name: name for name in ("layer6_0/expand", "last")}
    return [tap for end, tap in taps.items() if end in found and found[end].channels == channels]


def _stages(backbone: Backbone) -> dict[str, str]:
    """Returns the names of the stages by those of their outputs: {"layer1_0": "layer1", ...}."""
    return {end: end.partition("_")[0] for end in stage_endpoints(backbone)}


def _in_our_order(params: Mapping[str, Any], head: Head, order: Order) -> dict[str, Any]:
    """Returns the layers with the background last, and codes in the order x, y, width, height."""
    ordered = dict(params)
    labels = list(range((head.num_classes or 0) + 1))
    if order.background == 0:
        labels = [*labels[1:], 0]
    for i, anchors in enumerate(AnchorTable(head.anchors, head.anchor_sizes).counts):
        for layer, places in (("class_logits", labels), ("box_codes", order.codes)):
            ordered[f"{layer}{i}"] = {
                name: _reordered(array, anchors, list(places))
                for name, array in params[f"{layer}{i}"].items()
            }
    return ordered


def _reordered(array: np.ndarray, anchors: int, places: list[int]) -> np.ndarray:
    """Returns an array whose last axis is by anchor, then by these places of its own order."""
    split = array.reshape(*array.shape[:-1], anchors, len(places))
    return np.ascontiguousarray(split[..., places]).reshape(array.shape)
