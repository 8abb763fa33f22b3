"""The loss and the scores of semantic segmentation: cross entropy, confusion matrix, mIoU."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbv2_jax.data.sample import IGNORED


def counted(labels: jax.Array) -> jax.Array:
    """Returns which pixels count: those whose label is not IGNORED."""
    return labels != IGNORED


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
) -> jax.Array:
    """Returns the loss of each pixel, 0 where it does not count.

    As torch.nn.functional.cross_entropy with `weight`, `ignore_index` and `label_smoothing`: each
    class's share of the target is weighted with that class's weight.

    Args:
      logits: (..., classes), floating.
      labels: (...), integers, IGNORED where a pixel does not count.
      smoothing: share of the target that is spread evenly over the classes.
      class_weights: of each class; () for 1.

    Returns:
      (...), float32 or wider.
    """
    kept = jnp.promote_types(logits.dtype, jnp.float32)
    losses = -jax.nn.log_softmax(logits.astype(kept))  # of each class, were it the right one
    classes = logits.shape[-1]
    weights = jnp.asarray(class_weights if len(class_weights) else (1.0,) * classes, kept)
    is_target = labels[..., None] == jnp.arange(classes)
    # Not take_along_axis: its gradient scatters, which is slow and adds in any order.
    weighted = jnp.where(is_target, (1 - smoothing) * weights, 0) + smoothing / classes * weights
    return jnp.where(counted(labels), (losses * weighted).sum(-1), 0)


def mean_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
) -> jax.Array:
    """Returns the sum of `cross_entropy` over the number of pixels that count; 0 without any.

    Class weights are not part of the divisor: as in TensorFlow's deeplab, and in mmseg with
    avg_non_ignore.
    """
    total = cross_entropy(logits, labels, smoothing, class_weights).sum()
    return total / jnp.maximum(1, counted(labels).sum()).astype(total.dtype)


def confusion(labels: jax.Array, predicted: jax.Array, classes: int) -> jax.Array:
    """Counts the pixels of each pair of a true and a predicted class.

    Args:
      labels: (...), integers, IGNORED where a pixel does not count.
      predicted: (...), integers below `classes`.
      classes: their number.

    Returns:
      (classes, classes) int32: the true class first.
    """
    cells = jnp.where(
        counted(labels), labels.astype(jnp.int32) * classes + predicted, classes * classes
    )
    counts = jnp.zeros(classes * classes, jnp.int32).at[cells.ravel()].add(1, mode="drop")
    return counts.reshape(classes, classes)


def iou(matrix: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class; NaN without true and predicted pixels.

    Args:
      matrix: (classes, classes) counts, the true class first.
    """
    right = np.diag(matrix).astype(np.float64)
    union = matrix.sum(0) + matrix.sum(1) - right
    return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)


def mean_iou(matrix: np.ndarray) -> float:
    """Returns the mean of `iou` in percent, over the classes that have one; 0 without any."""
    found = iou(matrix)
    return 100 * float(np.nanmean(found)) if np.isfinite(found).any() else 0.0


def pixel_accuracy(matrix: np.ndarray) -> float:
    """Returns the percentage of pixels whose class is right; 0 without any."""
    return 100 * float(np.diag(matrix).sum() / max(1, matrix.sum()))


def summarize(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns {"mIoU", "pixel_accuracy" (percent), "loss" (nats), "examples"}.

    Args:
      sums: "confusion", "loss", "pixels" and "examples" of a whole split.
    """
    matrix = np.asarray(sums["confusion"])
    return {
        "mIoU": mean_iou(matrix),
        "pixel_accuracy": pixel_accuracy(matrix),
        "loss": float(sums["loss"]) / max(1.0, float(sums["pixels"])),
        "examples": int(sums["examples"]),
    }


def chance(pixels: np.ndarray, examples: int) -> tuple[float, float]:
    """Returns the mIoU of always naming the largest class, and its standard error, in percent.

    The other classes have an IoU of 0. The error is as if each image had a single class: the pixels
    of an image are alike, and count as one draw of a class.

    Args:
      pixels: (classes,), the pixels of each class; more than 0 in total.
      examples: the number of images.
    """
    present = np.count_nonzero(pixels)
    share = float(pixels.max() / pixels.sum())
    error = math.sqrt(share * (1 - share) / examples)
    return 100 * share / present, 100 * error / present


def table(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Returns a line for each class: its IoU, its accuracy, and its share of the pixels."""
    total, right = matrix.sum(), np.diag(matrix)
    width = max(map(len, ["class", *names]))
    lines = [f"{'class':{width}}      IoU  accuracy  pixels"]
    for name, share, correct, pixels in zip(names, iou(matrix), right, matrix.sum(1), strict=True):
        cells = [
            f"{100 * share:7.2f}" if np.isfinite(share) else "      -",
            f"{100 * correct / pixels:8.2f}" if pixels else "       -",
            f"{pixels / max(1, total):6.1%}",
        ]
        lines.append(f"{name:{width}}  {'  '.join(cells)}")
    return "\n".join(lines)
