"""The closed-form classifier against scikit-learn's ridge regression and brute force."""

import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import Ridge

from mbv2_jax.tasks.classification import probe

CLASSES = 3


def clusters(count: int, channels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns features around a centre for each class, far from 0, and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    centres = generator.normal(size=(CLASSES, channels))
    return 5 + centres[labels] + 1.5 * generator.normal(size=(count, channels)), labels


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-scipy.special.log_softmax(logits, 1)[np.arange(len(labels)), labels].mean())


def ridge(features: np.ndarray, labels: np.ndarray, penalty: float) -> Ridge:
    return Ridge(alpha=penalty).fit(features, np.eye(CLASSES)[labels])


def left_out(features: np.ndarray, labels: np.ndarray, penalty: float) -> np.ndarray:
    """Returns the prediction of each example by a model that was fitted to all others."""
    everyone = np.arange(len(labels))
    return np.concatenate(
        [
            ridge(features[everyone != i], labels[everyone != i], penalty).predict(features[[i]])
            for i in everyone
        ]
    )


@pytest.mark.parametrize(("count", "channels"), [(20, 40), (60, 8)], ids=["wide", "tall"])
def test_it_is_the_ridge_regression_that_predicts_best_what_it_has_not_seen(count, channels):
    features, labels = clusters(count, channels)
    found = probe.fit(features, labels, CLASSES)
    assert found.kernel.shape == (channels, CLASSES)
    assert found.kernel.dtype == found.bias.dtype == np.float32

    variance = ((features - features.mean(0)) ** 2).sum()
    best = None
    for penalty in np.logspace(-7, 1, 17) * variance:  # as in the docstring of the constant
        predictions = left_out(features, labels, penalty)
        losses = {s: log_loss(s * predictions, labels) for s in np.exp(np.linspace(0, 5, 501))}
        scale = min(losses, key=losses.__getitem__)
        if best is None or losses[scale] < best[0]:
            accuracy = (predictions.argmax(1) == labels).mean()
            best = losses[scale], penalty, scale, accuracy
    assert best is not None
    _, penalty, scale, accuracy = best
    assert found.accuracy == accuracy
    theirs = ridge(features, labels, penalty)
    # The scale was searched here in steps of 1 %.
    np.testing.assert_allclose(found.kernel, scale * theirs.coef_.T, rtol=0.01, atol=1e-6)
    np.testing.assert_allclose(found.bias, scale * theirs.intercept_, rtol=0.01, atol=1e-6)


def test_probabilities_are_calibrated_where_features_say_nothing():
    # Logits of unseen examples must not pretend to know: chance is ln 3.
    features = np.random.default_rng(0).normal(size=(90, 60))
    labels = np.arange(90) % CLASSES
    found = probe.fit(features, labels, CLASSES)
    unseen = np.random.default_rng(1).normal(size=(90, 60))
    assert log_loss(unseen @ found.kernel + found.bias, labels) < 1.1 * np.log(CLASSES)


def test_a_class_without_examples_and_constant_channels_are_no_obstacle():
    features, labels = clusters(30, 6)
    features[:, 2] = 7.0
    found = probe.fit(features, labels, CLASSES + 1)
    logits = features @ found.kernel + found.bias
    assert (logits.argmax(1) == labels).mean() > 0.6  # chance is a third; 0.7 without the obstacles
    assert not logits[:, CLASSES].any() and (logits.max(1) > 0).all()


def test_bad_features_are_refused():
    features, labels = clusters(10, 4)
    features[3, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        probe.fit(features, labels, CLASSES)
    with pytest.raises(ValueError, match="two or more"):
        probe.fit(features[:1], labels[:1], CLASSES)
