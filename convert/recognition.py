"""The layout, the prefix and the sizes of the network in a file, told by names and shapes."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from mbv2_jax.errors import UserError, listed, nearest
from mbv2_jax.models.mobilenet_v2 import feature_info
from mbv2_jax.spec import Backbone

from .layouts import LAYOUTS, Array, Layout
from .layouts.mobilenet_v2 import WIDTHS
from .readers import ForeignFile

Tensors = Mapping[str, np.ndarray]

# A file with a smaller share of a layout's names has another layout, or another network.
_RECOGNISED = 0.5

# Several widths have the same channel counts; the first is taken: common ones, then round ones.
_WIDTHS = (
    *sorted(WIDTHS, reverse=True),
    *(tenths / 10 for tenths in range(1, 41)),
    *(hundredths / 100 for hundredths in range(5, 401)),
)
# The same for the divisors of channels: that of most ports, d-li14's at width 0.1, and that of
# TensorFlow's DeepLab.
_DIVISORS = (8, 4, 1)
# The same for depths: the paper's, timm's, then round ones.
_DEPTHS = (1.0, 1.2, 1.4, *(tenths / 10 for tenths in range(1, 41)))
_MOST_PREFIXES = 20  # that are tried for each layout; a file has one, or a few


class Recognised(NamedTuple):
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

    def arrays(self) -> dict[str, Array]:
        """Returns the position of each of the backbone's arrays in our tree, by its name there."""
        arrays = self.layout.arrays(self.backbone)
        return {self.prefix + self.layout.relative(name): array for name, array in arrays.items()}


def recognise(file: ForeignFile, wanted: str) -> Recognised:
    """Returns the layout whose names a file has, behind whatever prefix, for a backbone or more.

    Args:
      file: from readers.read.
      wanted: a key of LAYOUTS, or "auto" to recognise it by the names.

    Raises:
      UserError: the names are not those of the wanted layout, or of any.
    """
    if wanted != "auto" and wanted not in LAYOUTS:
        raise UserError(f"unknown layout {wanted!r}; {nearest(wanted, ['auto', *LAYOUTS])}")
    found = {name: _find(file.tensors, name, layout) for name, layout in LAYOUTS.items()}
    best = max(found, key=lambda name: found[name].share)
    chosen = best if wanted == "auto" else wanted
    if found[chosen].share >= _RECOGNISED:
        if wanted == "auto":
            _refuse_others(file, found[best], found.values())
        return found[chosen]
    some = listed(sorted(file.tensors), 3, ", ")
    held = f"{file.path} holds {len(file.tensors)} arrays ({some})"
    if found[best].share >= _RECOGNISED:
        raise UserError(f"{held}: not layout {wanted!r}, but {best!r}; leave out --layout")
    raise UserError(
        f"{held}, which are not those of a MobileNetV2 in a layout that is known here: "
        f"{', '.join(LAYOUTS)}"
    )


def _refuse_others(file: ForeignFile, chosen: Recognised, candidates: Iterable[Recognised]) -> None:
    """Refuses a file in which other arrays are a network of another layout.

    Layouts that share names are recognised in the same arrays.
    """
    arrays = chosen.arrays().keys() & file.tensors.keys()
    for other in candidates:
        if other.share >= _RECOGNISED and arrays.isdisjoint(other.arrays()):
            raise UserError(
                f"{file.path} holds several networks: {chosen.name!r} behind the prefix "
                f"{chosen.prefix!r}, {other.name!r} behind {other.prefix!r}; --layout={other.name} "
                "with --features-only converts the second one's backbone"
            )


def _find(tensors: Tensors, name: str, layout: Layout) -> Recognised:
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
    return Recognised(name, layout, best, others, shares[best], backbone)


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

    def of_depth(depth: float) -> set[str]:
        deep = dataclasses.replace(backbone, depth=depth)
        return {prefix + layout.relative(name) for name in layout.arrays(deep)}

    def agreeing(depth: float) -> int:
        wanted = of_depth(depth)
        return len(wanted & names) - len(wanted - names)

    # Most have the paper's, and the others need not be tried.
    is_papers = of_depth(1.0) & names == of_depth(max(_DEPTHS)) & names
    deep = dataclasses.replace(backbone, depth=1.0 if is_papers else max(_DEPTHS, key=agreeing))
    last = [
        prefix + layout.relative(name)
        for name, array in layout.arrays(deep).items()
        if array.path[1] == "last"
    ]
    return dataclasses.replace(deep, last_convolution=any(name in names for name in last))


def sized(found: Recognised, tensors: Tensors) -> Recognised:
    """Returns what was recognised with the width that explains the channels of the most layers.

    Args:
      found: from `recognise`.
      tensors: the file's.
    """
    counts = {}  # of the outputs of the stem, of expansions, of blocks, and of the last convolution
    for name, array in found.arrays().items():
        _, *layer, _, variable = array.path
        if variable == "scale" and layer[-1] != "depthwise" and name in tensors:
            endpoint = "/".join(layer).removesuffix("/project")
            counts[endpoint] = tensors[name].size

    def agreeing(backbone: Backbone) -> int:
        sizes = feature_info(backbone).items()
        return sum(counts.get(layer) == size.channels for layer, size in sizes)

    candidates = [
        dataclasses.replace(found.backbone, divisor=divisor, fixed_ends=fixed_ends, width=width)
        for divisor, fixed_ends, width in itertools.product(_DIVISORS, (False, True), _WIDTHS)
    ]
    whole = (backbone for backbone in candidates if agreeing(backbone) == len(counts))
    # Where none explains all, the faults are told by the usual rounding. The first of equally good.
    usual = [backbone for backbone in candidates if backbone.divisor == _DIVISORS[0]]
    return found._replace(backbone=next(whole, None) or max(usual, key=agreeing))
