"""The report on a classifier: one evaluation, and the tables and pictures that come of it."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mbv2_jax import drawing
from mbv2_jax.analysis import calibration, cam, confusion, output
from mbv2_jax.data import classes
from mbv2_jax.data.sources import Source
from mbv2_jax.data.transforms.pipeline import Transform
from mbv2_jax.errors import UserError
from mbv2_jax.runtime import compilation_cache, processes
from mbv2_jax.tasks.task import Classified
from mbv2_jax.training import evaluation

MAX_COUNT = 1000  # a grid of more images is too large to look at
TILE = 192  # the least side of an image in a grid, in pixels: below it stand class names


def report(
    config: ConfigDict,
    overrides: Mapping[str, Any],
    checkpoint: str | None,
    out: str = "report",
    count: int = 24,
) -> None:
    """Evaluates a model as --mode=eval does, and writes tables and pictures about it.

    The last line printed is JSON: the result of the evaluation with "precision", "recall" and "f1"
    (the means over the classes, in percent) and "ece" (in percent).

    Args:
      config, overrides, checkpoint: see `evaluation.evaluate`.
      out: the folder to write, which must be new or empty.
      count: the most images in each grid.

    Raises:
      UserError: see `evaluation.evaluate`; the model does not classify, or an argument is wrong.
    """
    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"--count={count}: give 1 to {MAX_COUNT} images")
    group = processes.single()
    compilation_cache.enable(config.compilation_cache)
    saved, aligned, scored = evaluation.open_evaluation(config, checkpoint, overrides, group)
    cam.check_classifier(saved, "confusion and calibration")
    folder = output.make_empty_folder(out)
    batches: list[Mapping[str, np.ndarray]] = []
    result = scored.score(saved.variables(), record=batches.append, progress=True).result
    found = scored.task.classified(evaluation.in_order(batches, len(aligned.source)))
    names = scored.task.classes
    title = f"{saved.path} on {config.data.source}, {config.data.eval_split}"
    figures = _write_classes(folder, found, names, title)
    figures |= _write_calibration(folder, found, title)
    shown = Examples(found, names, aligned.source, scored.transform)
    _write_examples(folder, shown, count)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(json.dumps(result | figures))


def _write_classes(
    folder: pathlib.Path, found: Classified, names: Sequence[str], title: str
) -> dict[str, float]:
    """Writes and prints the figures of each class; returns their means in percent."""
    counts = confusion.matrix(found, len(names))
    figures = confusion.per_class(counts)
    print(confusion.table(figures, names))
    for pair in confusion.confused(counts)[:5]:
        print(
            f"{classes.english(names[pair.true])} taken for "
            f"{classes.english(names[pair.predicted])}: {pair.images:,} of {pair.support:,}"
        )
    rows = zip(*(values.tolist() for values in figures), strict=True)
    header = ["label", "class", "precision", "recall", "f1", "support", "predicted"]
    table = [[label, names[label], *others] for label, *others in rows]
    output.write_csv(folder / "classes.csv", header, table)
    matrix = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
    output.write_csv(folder / "confusion.csv", ["true \\ predicted", *names], matrix)
    right = counts.diagonal().sum() / counts.sum()
    picture = confusion.draw(counts, names, f"{title}: {right:.2%} of {counts.sum():,} right")
    output.write_figure(picture, folder / "confusion.png")
    means = {name: getattr(figures, name).mean() for name in ("precision", "recall", "f1")}
    return {name: 100 * float(mean) for name, mean in means.items()}


def _write_calibration(folder: pathlib.Path, found: Classified, title: str) -> dict[str, float]:
    """Writes the reliability diagram; returns the expected calibration error in percent."""
    bins = calibration.reliability(found)
    error = 100 * bins.error
    print(f"expected calibration error: {error:.2f} % ({calibration.BINS} bins)")
    picture = calibration.draw(bins, f"{title}\nexpected calibration error {error:.2f} %")
    output.write_figure(picture, folder / "calibration.png")
    return {"ece": error}


def _write_examples(folder: pathlib.Path, shown: "Examples", count: int) -> None:
    """Writes the table of the mistakes, and the two grids."""
    mistakes, uncertain = shown.mistakes(), shown.uncertain()
    header = ["image", "true", "predicted", "score"]
    output.write_csv(folder / "mistakes.csv", header, [shown.row(i) for i in mistakes.tolist()])
    total = len(shown.found.labels)
    if len(mistakes):
        caption = f"wrong with the highest score, of {len(mistakes):,} mistakes in {total:,} images"
        output.write_picture(shown.grid(mistakes[:count], caption), folder / "mistakes.png")
    caption = f"right or wrong with the lowest score, of {total:,} images"
    output.write_picture(shown.grid(uncertain[:count], caption), folder / "uncertain.png")


@dataclasses.dataclass(frozen=True)
class Examples:
    """The images of an evaluation with their predictions.

    Attributes:
      found: the true and the predicted classes.
      names: of the classes.
      source, transform: the split, and the operations on its images.
    """

    found: Classified
    names: Sequence[str]
    source: Source
    transform: Transform

    def mistakes(self) -> np.ndarray:
        """Returns the indices of the wrong predictions, the one with the highest score first."""
        wrong = np.flatnonzero(self.found.labels != self.found.predicted)
        return wrong[np.argsort(-self.found.scores[wrong], kind="stable")]

    def uncertain(self) -> np.ndarray:
        """Returns the indices of all images, the one with the lowest score first."""
        return np.argsort(self.found.scores, kind="stable")

    def row(self, index: int) -> list[Any]:
        """Returns an image's name, true class, predicted class and score."""
        found = self.found
        true, predicted = (self.names[labels[index]] for labels in (found.labels, found.predicted))
        return [self.source.describe(index), true, predicted, f"{found.scores[index]:.6f}"]

    def grid(self, indices: np.ndarray, caption: str) -> Image.Image:
        """Returns the picture of some images, as the network saw them, with their classes."""
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(self._pixels, indices.tolist()))
        labels = [self._label(index) for index in indices.tolist()]
        return drawing.grid(np.stack(images), labels, [caption], smallest=TILE)

    def _pixels(self, index: int) -> np.ndarray:
        # An evaluation's transform draws nothing from the generator.
        return self.transform.from_encoded(self.source[index], np.random.default_rng(0)).image

    def _label(self, index: int) -> list[tuple[str, tuple[int, int, int]]]:
        """Returns the lines below an image."""
        name, true, predicted, _ = self.row(index)
        ink = drawing.RIGHT if true == predicted else drawing.WRONG
        score = f"{self.found.scores[index]:.1%}"
        return [
            (f"{score} {classes.english(predicted)}", ink),
            (f"is {classes.english(true)}", drawing.INK),
            (os.path.basename(name), drawing.FAINT),
        ]
