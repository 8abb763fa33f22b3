"""The head of converted weights for segmentation: that of Mobile DeepLabv3.

The number of classes comes from the arrays, the dilations from the file. No other module of the
conversion knows the layers of this head.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from mbv2_jax.data import classes
from mbv2_jax.models.deeplabv3 import LOGITS, POINTWISE, POOLING, PROJECTION, RATES_AT
from mbv2_jax.tasks.segmentation.settings import Head

from . import arrays as arrays_lib
from . import own_file
from .class_names import ClassNames
from .head import FoundHead
from .layouts import Array, Layout
from .readers import ForeignFile
from .recognition import Recognised

DESCRIPTION = "that of Mobile DeepLabv3"

_MOST_RATES = 20  # dilated convolutions of a head; the paper's has three


def find_head(file: ForeignFile, rest: Mapping[str, np.ndarray], found: Recognised) -> FoundHead:
    """Returns the head in a file, see `heads.Kind`."""
    prefix, *others = found.layout.heads_in(rest)
    if others:
        several = ", ".join(map(repr, (prefix, *others)))
        return FoundHead(None, faults=(f"there are several, behind the prefixes {several}",))
    count = _count_dilated(rest, found.layout, prefix)
    rates, faults = _rates(file, found, count)
    positions = {prefix + name: array for name, array in _arrays(found.layout, count).items()}
    (bias,) = (name for name, array in positions.items() if array.path[1:] == (LOGITS, "bias"))
    num_classes = rest[bias].size if bias in rest else 1
    values = {field.name: field.metadata["values"] for field in dataclasses.fields(Head)}
    if fault := values["num_classes"].fault(num_classes):
        return FoundHead(None, faults=(*faults, f"the number of its classes {fault}"))
    head = Head(num_classes, rates, **found.layout.head)
    shapes = arrays_lib.shapes(found.layout.task, found.backbone, head)
    faults += arrays_lib.faults(rest, positions, shapes)
    unknown = [name for name in rest if name not in positions]
    faults += arrays_lib.named("not of this network", unknown)
    if faults:
        return FoundHead(None, faults=tuple(faults))
    return FoundHead(head, **arrays_lib.to_tree(rest, positions))


def usual_names(head: Head | None) -> ClassNames | None:
    """Returns VOC's names for 21 classes; None for others."""
    if head is None or head.num_classes != len(classes.VOC_NAMES):
        return None
    return ClassNames(classes.VOC_NAMES, "VOC's")


def warnings(head: Head | None, command: str) -> list[str]:
    """Returns no lines: the names of the classes are all that is assumed about this head."""
    del head, command
    return []


def summarize(head: Head) -> str:
    """Returns the size of the head in words."""
    rates = ", ".join(map(str, head.aspp_rates))
    pyramid = f"with ASPP at rates {rates}" if rates else "without ASPP"
    return f"Mobile DeepLabv3 {pyramid}, {head.num_classes} classes of a pixel"


def misfits(layout: Layout, head: Head | None) -> list[str]:
    """Returns a line about ASPP, if the network of a layout has none."""
    rates = () if head is None or "aspp*" in layout.table else head.aspp_rates
    return [f"model.aspp_rates is {rates}, there it is ()"] if rates else []


def arrays(layout: Layout, head: Head | None) -> dict[str, Array]:
    """Returns the position of each array of a head in our tree, by its whole name there."""
    return {} if head is None else _arrays(layout, len(head.aspp_rates))


def _arrays(layout: Layout, count: int) -> dict[str, Array]:
    """Returns the arrays of a head with so many dilated convolutions."""
    dilated = [f"aspp{number}" for number in range(1, count + 1)]
    layers = [POOLING, POINTWISE, *dilated, PROJECTION, LOGITS]
    return {name: array for layer in layers for name, array in layout.convolution(layer).items()}


def _count_dilated(names: Iterable[str], layout: Layout, prefix: str) -> int:
    """Returns the number of dilated convolutions, aspp1, aspp2 ..."""
    if "aspp*" not in layout.table:
        return 0
    names = set(names)

    def is_there(number: int) -> bool:
        return prefix + next(iter(layout.convolution(f"aspp{number}"))) in names

    numbers: Iterator[int] = itertools.takewhile(is_there, range(1, _MOST_RATES + 1))
    return len(list(numbers))


def _rates(file: ForeignFile, found: Recognised, count: int) -> tuple[tuple[int, ...], list[str]]:
    """Returns the dilations at output stride 16, and why they are not known."""
    own = own_file.description(file)
    if own is not None and isinstance(own.spec.head, Head):
        rates = own.spec.head.aspp_rates
    else:
        stride = file.contents.stated.get("model.output_stride", found.backbone.output_stride)
        rates = tuple(rate * stride // RATES_AT for rate in file.contents.rates)
        if any(rate * stride % RATES_AT for rate in file.contents.rates):
            odd = ", ".join(map(str, file.contents.rates))
            return (1,) * count, [f"at output stride {stride}, {odd} are no dilations of ASPP here"]
    if len(rates) == count:
        return rates, []
    return (1,) * count, [f"the dilations of its {count} 3x3 convolutions are not known"]
