"""The linear probe: a classifier fitted to the features of a frozen backbone, in closed form.

Ridge regression to one-hot targets has a solution that needs no iterations, and so have its
leave-one-out predictions: one decomposition of the features decides how strongly to regularise. The
scale of the logits, on which the predicted class does not depend, is the one whose leave-one-out
cross entropy is the smallest; with it the probabilities are calibrated, and training continues from
the probe without a jump.

Sources: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, sections 3.4.1 and
7.10 (ridge regression, leave-one-out); Kumar et al., arXiv:2202.10054 (why to fit the head before
fine-tuning).
"""

from typing import NamedTuple

import numpy as np

from mbv2_jax.installed import require

# Penalties to choose from, as shares of the features' total variance. The best one for 40 to 1000
# photos a class lay between 2e-5 and 1e-2.
_PENALTIES = np.logspace(-7, 1, 17)
# Range of the logarithm of the factor from one-hot targets (0 to 1) to logits.
_LOG_SCALE = (0.0, 5.0)


class Probe(NamedTuple):
    """A fitted classifier.

    Attributes:
      kernel: (channels, classes) float32.
      bias: (classes,) float32.
      accuracy: the share of examples, 0 to 1, that it classifies rightly without having seen them.
    """

    kernel: np.ndarray
    bias: np.ndarray
    accuracy: float


def fit(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Probe:
    """Fits a linear classifier.

    Args:
      features: (N, channels), of any float dtype; the arithmetic is float64.
      labels: (N,) integers.
      num_classes: the number of classes; those without an example get logits of 0, and are not
        predicted.

    Returns:
      The classifier, and its accuracy on examples that were left out.

    Raises:
      ValueError: there are fewer than two examples, or features are infinite or NaN.
      UserError: scipy is not installed.
    """
    require("fitting a classifier in closed form", "scipy")
    if len(features) < 2 or not np.isfinite(features).all():
        raise ValueError("fitting a head needs two or more examples, and finite features")
    features = features.astype(np.float64)
    targets = np.eye(num_classes)[labels]  # (N, classes)
    feature_mean, target_mean = features.mean(0), targets.mean(0)
    centred = features - feature_mean
    left, singular, right = _decompose(centred)
    projected = left.T @ targets  # (rank, classes)
    best = None
    for penalty in _PENALTIES * (singular**2).sum():
        shrunk = singular**2 / (singular**2 + penalty)
        # The residual of an example that was left out is its residual, divided by 1 - leverage.
        leverage = (left**2) @ shrunk + 1 / len(features)
        residuals = targets - target_mean - left @ (shrunk[:, None] * projected)
        left_out = targets - residuals / (1 - leverage)[:, None]
        scale, loss = _scale(left_out, labels)
        if best is None or loss < best[0]:
            best = loss, penalty, scale, float((left_out.argmax(1) == labels).mean())
    assert best is not None
    _, penalty, scale, accuracy = best
    kernel = right.T @ ((singular / (singular**2 + penalty))[:, None] * projected)
    bias = target_mean - feature_mean @ kernel
    return Probe((scale * kernel).astype(np.float32), (scale * bias).astype(np.float32), accuracy)


def _decompose(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the thin singular value decomposition U, s, V^T, without singular values near 0.

    It comes from the eigenvectors of the smaller of the two Gram matrices, which takes seconds
    where a singular value decomposition of 20,000 examples takes minutes.
    """
    tall = len(matrix) > matrix.shape[1]
    squares, vectors = np.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    kept = squares > 1e-12 * max(squares.max(), 1e-300)
    singular, vectors = np.sqrt(squares[kept]), vectors[:, kept]
    if tall:
        return matrix @ vectors / singular, singular, vectors.T
    return vectors, singular, (matrix.T @ vectors / singular).T


def _scale(predictions: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Returns the factor on `predictions` with the least mean cross entropy, and this loss."""
    import scipy.optimize  # here, because a light install lacks it
    import scipy.special

    right = predictions[np.arange(len(labels)), labels]

    def loss(log_scale: float) -> float:
        scale = np.exp(log_scale)
        return float((scipy.special.logsumexp(scale * predictions, 1) - scale * right).mean())

    found = scipy.optimize.minimize_scalar(loss, bounds=_LOG_SCALE, method="bounded")
    return float(np.exp(found.x)), float(found.fun)
