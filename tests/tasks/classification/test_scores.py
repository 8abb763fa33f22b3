"""The scores of classification against expectations computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax.tasks.classification import scores

# Seven classes, the best first: 3, then 5, 0, 6, 1; 2 and 4 are not among the best five.
RANKED = (3.0, 1.0, -1.0, 5.0, -2.0, 4.0, 2.0)


def sums(logits, labels, mask=None) -> dict[str, float]:
    mask = np.ones(len(labels), bool) if mask is None else np.asarray(mask)
    found = jax.jit(scores.sums)(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.asarray(mask)
    )
    assert {found[name].dtype for name in ("top1", "top5")} == {np.dtype(np.int32)}
    return {name: value.item() for name, value in found.items() if name != "labels"}


def test_the_right_class_counts_where_it_is_best_or_among_the_best_five():
    found = sums([RANKED] * 7, [3, 3, 5, 1, 2, 4, 6])
    assert (found["top1"], found["top5"]) == (2, 5)


def test_loss_is_the_sum_of_the_examples():
    # Probabilities 3/4 and 1/4; then 1/2 and 1/2.
    found = sums([[math.log(3), 0.0], [7.0, 7.0]], [1, 0])
    # Two float32 logarithms.
    assert found["loss"] == pytest.approx(math.log(4) + math.log(2), rel=1e-6)


def test_padding_counts_nowhere():
    logits, labels = [RANKED] * 5, [3, 0, 3, 4, 3]
    found = sums(logits, labels, [True, True, False, False, True])
    assert found == sums([RANKED] * 3, [3, 0, 3])
    assert sums(logits, labels, [False] * 5) == {"loss": 0, "top1": 0, "top5": 0}


def test_examples_of_each_class_are_counted_without_padding():
    mask = np.array([True, True, True, False, True])
    found = scores.sums(jnp.zeros((5, 7)), jnp.asarray([3, 0, 3, 4, 6]), jnp.asarray(mask))
    assert found["labels"].tolist() == [1, 0, 0, 2, 0, 0, 1]
    assert found["labels"].dtype == np.int32


def test_padding_that_is_not_finite_counts_nowhere():
    found = sums([RANKED, [math.nan] * 7, [math.inf] * 7], [3, 0, 0], [True, False, False])
    assert found == sums([RANKED], [3])


def test_the_first_of_equal_classes_wins():
    assert [sums([[1.0] * 7], [label])["top1"] for label in range(7)] == [1, 0, 0, 0, 0, 0, 0]
    assert [sums([[1.0] * 7], [label])["top5"] for label in range(7)] == [1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_all_classes_are_among_the_best_five_where_there_are_no_more(classes):
    logits = -np.ones((classes, classes)) + 2 * np.eye(classes)
    wrong = (np.arange(classes) + 1) % classes
    found = sums(logits, wrong)
    assert found["top5"] == classes
    assert found["top1"] == (1 if classes == 1 else 0)


def test_summary_is_in_percent_and_per_example():
    summary = scores.summarize({"loss": 6.0, "top1": 3, "top5": 7, "examples": 8})
    assert summary == {"top1": 37.5, "top5": 87.5, "loss": 0.75, "examples": 8}
    assert isinstance(summary["examples"], int)


def test_predictions_are_the_best_five_with_their_probabilities():
    logits = np.log([[0.4, 0.05, 0.3, 0.02, 0.1, 0.13], [0.1, 0.1, 0.1, 0.1, 0.5, 0.1]])
    found = jax.jit(scores.ranking)(jnp.asarray(logits), jnp.asarray([2, 4]))
    # Among equal ones the first wins, as in the sums.
    np.testing.assert_array_equal(found["best"], [[0, 2, 5, 4, 1], [4, 0, 1, 2, 3]])
    expected = [[0.4, 0.3, 0.13, 0.1, 0.05], [0.5, 0.1, 0.1, 0.1, 0.1]]
    # Two-digit numbers through float32 logarithms and exponentials.
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["loss"], -np.log([0.3, 0.5]), rtol=1e-6)


def test_average_is_of_probabilities_not_of_logits():
    first, second = [[0.9, 0.1, 0.0]], [[0.2, 0.3, 0.5]]
    logits = [jnp.log(jnp.asarray(p)) + shift for p, shift in ((first, 3.0), (second, -50.0))]
    found = jax.nn.softmax(scores.average(*logits))
    np.testing.assert_allclose(found, [[0.55, 0.2, 0.25]], rtol=1e-6)  # float32
    # bfloat16 logits are averaged in float32.
    low = [jnp.asarray([[100.0, 0.0]], jnp.bfloat16), jnp.asarray([[0.0, 100.0]], jnp.bfloat16)]
    average = scores.average(*low)
    assert average.dtype == np.float32
    np.testing.assert_allclose(jax.nn.softmax(average), [[0.5, 0.5]], rtol=1e-6)
