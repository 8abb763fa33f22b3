"""The losses of SSD (Liu et al. 2016, section 2.2): of the classes, and of the boxes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbv2_jax.tasks.detection import coding, matching


class Losses(NamedTuple):
    """The losses of N images.

    Attributes:
      classes: (N,), over the positives and the mined negatives.
      boxes: (N,), over the positives.
      positives: (N,), anchors that stand for an object, at least 1 for each image: the sum over the
        batch is the divisor of both losses, as in mmdet.
    """

    classes: jax.Array
    boxes: jax.Array
    positives: jax.Array


class Mining(NamedTuple):
    """The number of negatives that an image's loss counts; by default SSD's.

    Attributes:
      ratio: negatives for each positive.
      fewest: negatives of an image, also of one without positives.
    """

    ratio: float = 3.0
    fewest: int = 0


class Targets(NamedTuple):
    """The targets of the A anchors of N images.

    Attributes:
      labels: (N, A) int32, the class; the number of classes for the background.
      codes: (N, A, 4), of the boxes of positives; 0 elsewhere.
    """

    labels: jax.Array
    codes: jax.Array


def targets(anchors: jax.Array, boxes: jax.Array, labels: jax.Array, classes: int) -> Targets:
    """Returns the targets of anchors.

    Args:
      anchors: (N, A, 4), x0, y0, x1, y1.
      boxes: (N, M, 4), of the objects.
      labels: (N, M), their classes, below 0 for padding.
      classes: their number.
    """
    found = jax.vmap(matching.match)(anchors, boxes, labels >= 0)  # (N, A)
    positive = found != matching.NO_OBJECT
    index = found.clip(0)
    own = jnp.take_along_axis(boxes, index[..., None], 1)  # (N, A, 4)
    # Padding has no size, and its logarithm no gradient that 0 could be multiplied with.
    own = jnp.where(positive[..., None], own, anchors)
    label = jnp.take_along_axis(labels, index, 1)
    return Targets(
        jnp.where(positive, label, classes).astype(jnp.int32), coding.encode(own, anchors)
    )


def losses(
    logits: jax.Array, codes: jax.Array, wanted: Targets, scores: str, mining: Mining
) -> Losses:
    """Returns the losses of images.

    The loss of a class is the cross entropy; with sigmoid scores that of each class for itself, the
    background among them, added up. The loss of a box is smooth L1 of its four codes, added up.

    Args:
      logits: (N, A, classes + 1), the last of the background; float32 or wider.
      codes: (N, A, 4).
      wanted: the targets.
      scores: "softmax" or "sigmoid".
      mining: the negatives that count: those with the largest loss.
    """
    columns = logits.shape[-1]
    positive = wanted.labels < columns - 1  # (N, A)
    one_hot = jax.nn.one_hot(wanted.labels, columns, dtype=logits.dtype)
    if scores == "softmax":
        entropy = optax.softmax_cross_entropy(logits, one_hot)  # (N, A)
    else:
        entropy = optax.sigmoid_binary_cross_entropy(logits, one_hot).sum(-1)
    counts = positive.sum(1)  # (N,)
    wanted_negatives = jnp.maximum(mining.fewest, (mining.ratio * counts).astype(jnp.int32))
    mined = jax.vmap(matching.hardest)(jax.lax.stop_gradient(entropy), ~positive, wanted_negatives)
    box = optax.huber_loss(codes, wanted.codes).sum(-1)  # (N, A)
    return Losses(
        jnp.where(positive | mined, entropy, 0).sum(1),
        jnp.where(positive, box, 0).sum(1),
        jnp.maximum(1, counts),
    )
