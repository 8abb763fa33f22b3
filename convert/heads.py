"""The heads of converted weights by task: all in which tasks differ here, beside their layouts."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from . import classifier, detection_head, segmentation_head
from .class_names import ClassNames
from .head import FoundHead
from .layouts import OF_TASK, Array, Layout
from .readers import ForeignFile
from .recognition import Recognised


class Kind(Protocol):
    """A module of one task's heads."""

    DESCRIPTION: str  # completes "its head is not ..."

    def find_head(
        self, file: ForeignFile, rest: Mapping[str, np.ndarray], found: Recognised
    ) -> FoundHead:
        """Returns the head in a file.

        Args:
          file: from readers.read.
          rest: its arrays that are not of the backbone, and not to be ignored.
          found: the layout, with the head's names, and the backbone.
        """

    def usual_names(self, head: Any) -> ClassNames | None:
        """Returns the names of the classes that such a head usually has; None if there are none."""

    def warnings(self, head: Any, command: str) -> list[str]:
        """Returns lines about a head that a person should know; `command` converts."""

    def summarize(self, head: Any) -> str:
        """Returns a head in words."""

    def misfits(self, layout: Layout, head: Any) -> list[str]:
        """Returns lines about the fields of a head that the network of a layout does not have."""

    def arrays(self, layout: Layout, head: Any) -> dict[str, Array]:
        """Returns the position of each array of a head in our tree, by its whole name there."""


_KINDS: Mapping[str, Kind] = {
    "classification": classifier,
    "segmentation": segmentation_head,
    "detection": detection_head,
}


def of(task: str) -> Kind:
    """Returns the module of a task's heads."""
    return _KINDS[task]


def with_task(found: Recognised, names: Iterable[str]) -> Recognised:
    """Returns the recognised network with the layout of the task whose head the file has.

    Args:
      found: with a layout of LAYOUTS.
      names: of the file's arrays.
    """
    for layouts in OF_TASK.values():
        layout = layouts.get(found.name)
        if layout is not None and layout.heads_in(names):
            sizes = ("width", "depth", "fixed_ends", "divisor")
            told = {name: getattr(found.backbone, name) for name in sizes}
            last = layout.backbone.last_convolution and found.backbone.last_convolution
            backbone = dataclasses.replace(layout.backbone, **told, last_convolution=last)
            return found._replace(layout=layout, backbone=backbone)
    return found
