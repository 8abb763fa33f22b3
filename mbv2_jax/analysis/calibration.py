"""Calibration: whether 80 % of the predictions with a probability of 80 % are right.

Guo et al. 2017, On Calibration of Modern Neural Networks (https://arxiv.org/abs/1706.04599).
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mbv2_jax.analysis import output
from mbv2_jax.tasks.task import Classified

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15  # Guo et al.'s


class Reliability(NamedTuple):
    """Predictions in bins of equal width; bin m has the scores in ((m-1)/M, m/M]; arrays (M,).

    Attributes:
      counts: the number of predictions in each bin.
      accuracy: the share of right ones; 0 in an empty bin.
      confidence: their mean score; 0 in an empty bin.
    """

    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error, from 0 to 1: Equation 3."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((gaps * self.counts).sum() / self.counts.sum())


def reliability(found: Classified, bins: int = BINS) -> Reliability:
    """Returns the predictions of an evaluation in bins of their scores."""
    scores = found.scores.astype(np.float64)
    index = np.clip(np.ceil(scores * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    filled = np.maximum(counts, 1)
    right = np.bincount(index, found.labels == found.predicted, minlength=bins)
    return Reliability(counts, right / filled, np.bincount(index, scores, minlength=bins) / filled)


def draw(found: Reliability, title: str) -> "Figure":
    """Draws the reliability diagram, and below it the share of the predictions in each bin.

    Args:
      found: at least one prediction.
      title: a line above.

    Returns:
      A matplotlib figure.
    """
    figure = output.new_figure(6.0, 7.0, title)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = len(found.counts)
    left, width = np.arange(bins) / bins, 1 / bins
    filled = found.counts > 0
    bar = {"align": "edge", "width": width}
    solid = bar | {"edgecolor": "white"}
    hatched = bar | {"facecolor": (0.92, 0.26, 0.21, 0.25), "edgecolor": "#c5221f", "hatch": "//"}
    accuracy, scores = found.accuracy[filled], found.confidence[filled]
    above.bar(left[filled], accuracy, color="#9abef0", label="accuracy", **solid)
    gap = "gap to the mean score"
    above.bar(left[filled], scores - accuracy, bottom=accuracy, label=gap, **hatched)
    above.plot((0, 1), (0, 1), "--", color="#5f6368", linewidth=1, label="perfectly calibrated")
    above.set_ylabel("share of right predictions")
    above.set_ylim(0, 1)
    above.legend(loc="upper left")
    share = found.counts / found.counts.sum()
    means = (share * found.accuracy).sum(), (share * found.confidence).sum()
    below.bar(left, 100 * share, color="#9abef0", **solid)
    for value, text, style in zip(means, ("accuracy", "mean score"), ("-", "--"), strict=True):
        below.axvline(value, color="#202124", linestyle=style, label=f"{text} {value:.1%}")
    below.set_xlabel("score: the probability of the predicted class")
    below.set_ylabel("images (%)")
    below.set_xlim(0, 1)
    below.legend(loc="upper left")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure
