"""The outcome of an evaluation: COCO's numbers, VOC's where they belong, and a table of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbv2_jax.data.sources import BoxSource
from mbv2_jax.errors import RunFailed
from mbv2_jax.runtime import processes
from mbv2_jax.tasks.detection import coco, objects, voc
from mbv2_jax.tasks.task import Summary

_FIGURES = {"mAP": "AP", "mAP50": "AP50", "mAP75": "AP75"}  # those of the result, among COCO's
_MANY = 100_000  # detections that take pycocotools some ten seconds


def summarize(
    sums: Mapping[str, np.ndarray],
    rows: Mapping[str, np.ndarray],
    source: BoxSource,
    names: Sequence[str],
) -> Summary:
    """Returns {"mAP", "mAP50", "mAP75" (percent), "loss", "examples"}, and a table of the classes.

    Where the data is VOC's, "AP50" is VOC's figure, in percent. Figures are 0 where there is no
    object to find.

    Args:
      sums: "loss", "positives" and "examples" of a whole split.
      rows: of `Detection.evaluate`, in the source's order.
      source: the split, whose labels are those of the rows.
      names: of the classes.

    Raises:
      RunFailed: the network's outputs for a picture are not numbers.
    """
    if not rows["finite"].all():
        raise RunFailed(
            f"the network's outputs for {source.describe(int(rows['finite'].argmin()))} are not "
            "numbers (NaN): no result is reported"
        )
    count = len(source)
    truths = [source.boxes(index) for index in range(count)]
    found = [objects.found(rows, index) for index in range(count)]
    detections = sum(len(each.labels) for each in found)
    if detections > _MANY:
        processes.say(f"scoring {detections:,} detections in {count:,} pictures")
    ids = [source.image_id(index) for index in range(count)]
    score = coco.score(truths, found, ids, len(names))
    result: dict[str, Any] = {
        name: 100 * float(np.nan_to_num(score.numbers[theirs])) for name, theirs in _FIGURES.items()
    }
    lines = dict(score.numbers)
    columns = {"AP": score.ap, "AP50": score.ap50}
    if source.benchmark == "voc":
        average = voc.average_precision(truths, found, len(names))
        columns["VOC AP50"] = average
        lines["VOC AP50"] = float(np.nanmean(average)) if np.isfinite(average).any() else np.nan
        result["AP50"] = 100 * float(np.nan_to_num(lines["VOC AP50"]))
    result["loss"] = float(sums["loss"]) / max(1.0, float(sums["positives"]))
    result["examples"] = int(sums["examples"])
    width = max(map(len, lines))
    numbers = [f"{name:{width}}  {_cell(value, 6)}" for name, value in lines.items()]
    counts = np.zeros(len(names), np.int64)
    for truth in truths:
        np.add.at(counts, truth.labels[~(truth.crowd | truth.difficult)], 1)
    return Summary(result, "\n".join([*numbers, table(columns, counts, names)]))


def table(columns: Mapping[str, np.ndarray], counts: np.ndarray, names: Sequence[str]) -> str:
    """Returns a line for each class: its figures, and the number of its objects.

    Args:
      columns: figures of the classes, from 0 to 1, by the name of the column; NaN for none.
      counts: (classes,), their objects.
      names: of the classes.
    """
    width = max(map(len, ["class", *names]))
    widths = [max(6, len(title)) for title in columns]
    titles = (f"{title:>{size}}" for title, size in zip(columns, widths, strict=True))
    lines = ["  ".join([f"{'class':{width}}", *titles, "objects"])]
    for name, count, *values in zip(names, counts.tolist(), *columns.values(), strict=True):
        cells = map(_cell, values, widths)
        lines.append("  ".join([f"{name:{width}}", *cells, f"{count:7,}"]))
    return "\n".join(lines)


def _cell(value: float, width: int) -> str:
    """Returns a share in percent, or "-" for NaN."""
    return f"{100 * value:{width}.2f}" if np.isfinite(value) else f"{'-':>{width}}"
