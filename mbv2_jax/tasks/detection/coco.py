"""COCO's twelve numbers, computed by pycocotools, and its files of results."""

import collections
import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval

from mbv2_jax.data.sample import Boxes
from mbv2_jax.data.sources import BoxSource
from mbv2_jax.tasks.detection import objects
from mbv2_jax.tasks.detection.objects import Found

# In pycocotools' order: average precision, and average recall of so many detections of a picture.
NAMES = (
    *("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"),
    *("AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large"),
)
_ALL_SIZES, _MOST_DETECTIONS = 0, -1  # indices of pycocotools' size ranges and numbers


class Score(NamedTuple):
    """The numbers of an evaluation, from 0 to 1; NaN where there are no objects to count.

    Attributes:
      numbers: those of NAMES, by name.
      ap, ap50: (classes,) float64, AP and AP50 of each class.
    """

    numbers: dict[str, float]
    ap: np.ndarray
    ap50: np.ndarray


class _Evaluation(COCOeval):
    """An evaluation of arrays: pycocotools' own takes files.

    Difficult objects are ignored as those outside a size range are. The pictures' numbers are their
    places in the order of their ids, by which pycocotools orders detections of equal score.
    """

    def __init__(
        self, truths: Sequence[Boxes], found: Sequence[Found], ids: Sequence[int | str]
    ) -> None:
        super().__init__(iouType="bbox")
        # Numbers before names, which cannot be compared.
        self._order = sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))
        self._truths, self._found = truths, found
        labels = np.concatenate([np.zeros(0, np.int32), *(truth.labels for truth in truths)])
        self.params.imgIds = range(len(ids))
        self.params.catIds = np.unique(labels).tolist()  # the others do not count

    def _prepare(self) -> None:
        """Sets the objects and the detections of each picture and class."""
        self._gts = collections.defaultdict(list)
        self._dts = collections.defaultdict(list)
        counted = set(self.params.catIds)
        number = 0  # ids begin at 1: pycocotools takes a match with id 0 for none
        for place, i in enumerate(self._order):
            truth, found = self._truths[i], self._found[i]
            boxes = objects.as_coco(truth.corners).tolist()
            members = (truth.labels, truth.area, truth.crowd, truth.crowd | truth.difficult)
            columns = (part.tolist() for part in members)
            for box, label, area, crowd, ignored in zip(boxes, *columns, strict=True):
                number += 1
                self._gts[place, label].append(
                    {"id": number, "bbox": box, "area": area, "iscrowd": crowd, "ignore": ignored}
                )
            boxes = objects.as_coco(found.corners).tolist()
            columns = (part.tolist() for part in (found.scores, found.labels))
            for box, score, label in zip(boxes, *columns, strict=True):
                number += 1
                if label in counted:
                    self._dts[place, label].append(
                        {"id": number, "bbox": box, "area": box[2] * box[3], "score": score}
                    )


def score(
    truths: Sequence[Boxes], found: Sequence[Found], ids: Sequence[int | str], classes: int
) -> Score:
    """Scores the detections in pictures.

    Args:
      truths: the objects of each picture; corners and areas are float64, in its pixels.
      found: the detections in each picture.
      ids: of the pictures, in the order of which detections of equal score count.
      classes: their number.
    """
    evaluation = _Evaluation(truths, found, ids)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = [float(number) if number >= 0 else np.nan for number in evaluation.stats]
    precision = evaluation.eval["precision"]  # (thresholds, recalls, classes, sizes, detections)
    of_classes = precision[..., _ALL_SIZES, _MOST_DETECTIONS].mean(1)  # (thresholds, classes)
    of_classes[of_classes < 0] = np.nan  # crowds and difficult objects only
    every = np.full((len(of_classes), classes), np.nan)
    every[:, evaluation.params.catIds] = of_classes
    return Score(dict(zip(NAMES, numbers, strict=True)), every.mean(0), every[0])


def results(rows: Mapping[str, np.ndarray], source: BoxSource) -> Iterator[str]:
    """Yields a file of results in pieces: JSON, an array of all detections.

    Its format is that of https://cocodataset.org/#format-results, as pycocotools' loadRes takes it.
    Detections of classes that the data does not have are left out.

    Args:
      rows: of `Detection.evaluate`, in the source's order.
      source: the split.
    """
    separator = "["
    for index in range(len(source)):
        lines = [json.dumps(entry) for entry in _entries(objects.found(rows, index), index, source)]
        if lines:
            yield separator + ",\n".join(lines)
            separator = ",\n"
    yield "]\n" if separator != "[" else "[]\n"


def _entries(found: Found, index: int, source: BoxSource) -> Iterator[dict[str, Any]]:
    name, categories = source.image_id(index), source.category_ids
    boxes = objects.as_coco(found.corners).tolist()
    for label, box, value in zip(found.labels.tolist(), boxes, found.scores.tolist(), strict=True):
        if categories[label] is not None:
            yield {"image_id": name, "category_id": categories[label], "bbox": box, "score": value}
