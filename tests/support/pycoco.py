"""pycocotools as its users run it: on an annotation file and a file of results."""

import contextlib
import io
import pathlib

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def evaluated(annotations: pathlib.Path, results: pathlib.Path) -> COCOeval:
    """Returns the evaluation of a file of results; `stats` has the twelve numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
