"""The confusion matrix of an evaluation, and precision, recall and F1 of each class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mbv2_jax import drawing
from mbv2_jax.analysis import output
from mbv2_jax.data import classes
from mbv2_jax.tasks.task import Classified

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = 30  # classes whose whole matrix is drawn; of more, those with the most confusions
PAIRS = 20  # pairs of classes that the picture lists
_NUMBERED = 20  # classes up to which a cell's number is legible
_NAME_LENGTH = 28  # characters of a class's name in a picture or on the terminal


class PerClass(NamedTuple):
    """The figures of some classes, arrays (K,), as scikit-learn computes them.

    Attributes:
      labels: the classes, those that occur among the true or the predicted ones, in rising order.
      precision, recall, f1: from 0 to 1; 0 where they are undefined.
      support: the number of examples of the class.
      predicted: the number of examples that were taken for it.
    """

    labels: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    predicted: np.ndarray


class Pair(NamedTuple):
    """Two classes, of which `images` of the first, out of `support`, were taken for the second."""

    true: int
    predicted: int
    images: int
    support: int


def matrix(found: Classified, class_count: int) -> np.ndarray:
    """Returns the number of examples of each true class (row) and predicted class (column)."""
    flat = found.labels.astype(np.int64) * class_count + found.predicted
    return np.bincount(flat, minlength=class_count**2).reshape(class_count, class_count)


def per_class(counts: np.ndarray) -> PerClass:
    """Returns the figures of each class that occurs in a confusion matrix."""
    right, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    labels = np.flatnonzero(support + predicted)
    right, support, predicted = right[labels], support[labels], predicted[labels]
    precision = right / np.maximum(predicted, 1)
    recall = right / np.maximum(support, 1)
    f1 = 2 * right / (support + predicted)
    return PerClass(labels, precision, recall, f1, support, predicted)


def confused(counts: np.ndarray) -> list[Pair]:
    """Returns the pairs of classes that were confused, the most frequent first.

    Among equally frequent ones, those with the larger share of their true class come first.
    """
    true, predicted = np.nonzero(counts - np.diag(counts.diagonal()))
    support, found = counts.sum(1)[true], counts[true, predicted]
    order = np.lexsort((predicted, true, support, -found))
    columns = (values[order].tolist() for values in (true, predicted, found, support))
    return [Pair(*values) for values in zip(*columns, strict=True)]


def table(figures: PerClass, names: Sequence[str], limit: int = DRAWN) -> str:
    """Returns the figures as text, with their means below.

    Args:
      figures: of the classes.
      names: of all classes by label.
      limit: the most classes to list; where there are more, those with the lowest F1.
    """
    count = len(figures.labels)
    shown = np.arange(count)
    if count > limit:
        shown = np.lexsort((-figures.support, figures.f1))[:limit]
    texts = [_short(names[label]) for label in figures.labels[shown]]
    width = max([len("class"), len("weighted mean"), *map(len, texts)])
    lines = [f"{'class':{width}}  precision  recall      F1  support"]
    for name, i in zip(texts, shown, strict=True):
        lines.append(_line(name, width, [v[i] for v in figures[1:4]], figures.support[i]))
    if count > limit:
        lines.append(f"... the {limit} classes with the lowest F1 of {count:,}")
    total = figures.support.sum()
    means = [values.mean() for values in figures[1:4]]
    lines.append(_line("mean", width, means, total))
    means = [np.average(values, weights=figures.support) for values in figures[1:4]]
    lines.append(_line("weighted mean", width, means, total))
    return "\n".join(lines)


def _line(name: str, width: int, shares: Sequence[float], support: int) -> str:
    precision, recall, f1 = shares
    return f"{name:{width}}  {precision:9.2%} {recall:7.2%} {f1:7.2%}  {support:7,}"


def _short(name: str, length: int = _NAME_LENGTH) -> str:
    name = classes.english(name)
    return name if len(name) <= length else name[: length - 1].rstrip(" ,") + "…"


def draw(counts: np.ndarray, names: Sequence[str], title: str) -> "Figure":
    """Draws a confusion matrix, and the most frequent confusions beside it.

    A cell's colour is its share of the true class. Of more than 30 classes, the matrix has those of
    the most frequent confusions.

    Args:
      counts: (C, C), C at least 1.
      names: of the classes.
      title: a line above.

    Returns:
      A matplotlib figure.
    """
    pairs = confused(counts)
    labels, note = _drawn(counts, pairs)
    side = max(4.0, 0.34 * len(labels) + 2.2)
    rows = max(1, min(PAIRS, len(pairs)))
    figure = output.new_figure(side + 6.2, max(side, 0.28 * rows + 1.2), title)
    left, right = figure.subplots(1, 2, width_ratios=(side, 6.0))
    _draw_matrix(left, counts, labels, [names[label] for label in labels])
    left.set_title(note, fontsize=9, loc="left", color="#5f6368")
    _draw_pairs(right, pairs[:PAIRS], names)
    return figure


def _drawn(counts: np.ndarray, pairs: Sequence[Pair]) -> tuple[list[int], str]:
    """Returns the labels of the classes to draw, and a note about the choice."""
    present = np.flatnonzero(counts.sum(0) + counts.sum(1)).tolist()
    if len(counts) <= DRAWN:
        return list(range(len(counts))), "share of each true class"
    if len(present) <= DRAWN:
        return present, f"the {len(present)} of {len(counts):,} classes that occur"
    chosen: dict[int, None] = {}
    for pair in pairs:
        if len(chosen | {pair.true: None, pair.predicted: None}) > DRAWN:
            break
        chosen |= {pair.true: None, pair.predicted: None}
    chosen = chosen or dict.fromkeys(present[:DRAWN])
    note = f"the {len(chosen)} of {len(counts):,} classes with the most frequent confusions"
    return list(chosen), note


def _draw_matrix(
    axes: "Axes", counts: np.ndarray, labels: Sequence[int], names: Sequence[str]
) -> None:
    shown = counts[np.ix_(labels, labels)]
    share = shown / np.maximum(counts.sum(1)[labels], 1)[:, None]
    # With square cells, matplotlib's layout would leave no room for the names below.
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    texts = [_short(name, 22) for name in names]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(labels)), texts)
        for tick, text in zip(axis.get_ticklabels(), texts, strict=True):
            tick.set(font=drawing.font_file(text), size=8)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) > _NUMBERED:
        return
    for row, column in np.argwhere(shown):
        colour = "white" if share[row, column] > 0.55 else "#202124"
        text = f"{shown[row, column]}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _draw_pairs(axes: "Axes", pairs: Sequence[Pair], names: Sequence[str]) -> None:
    axes.set_title("most frequent confusions", loc="left", fontsize=10)
    axes.set_axis_off()
    if not pairs:
        axes.text(0, 1, "none: every image is right", va="top", transform=axes.transAxes)
        return
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(pairs), 10) - 0.5, -0.7)
    for row, pair in enumerate(pairs):
        text = f"{_short(names[pair.true], 24)} → {_short(names[pair.predicted], 24)}"
        axes.barh(row, 0.3 * pair.images / pairs[0].images, height=0.7, color="#9abef0")
        number = f"{pair.images:,} of {pair.support:,}"
        axes.text(0.01, row, number, va="center", fontsize=8)
        axes.text(0.32, row, text, va="center", font=drawing.font_file(text), size=8)
