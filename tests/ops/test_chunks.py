"""A batch in pieces gives what the whole batch gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbv2_jax.ops import chunks


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(32, 4, 4), (32, 5, 4), (7, 4, 1), (6, 4, 3), (4, 9, 4), (3, 0, 1), (1, 4, 1)],
)
def test_length_divides(count, most, expected):
    assert chunks.length(count, most) == expected


def test_pieces_are_the_whole(monkeypatch):
    monkeypatch.setattr(chunks, "PIXELS", 3 * 4 * 5)  # three images
    images = jnp.arange(6.0 * 4 * 5 * 2).reshape(6, 4, 5, 2)
    seen = []

    def function(images):
        seen.append(images.shape[0])
        return images.sum((1, 2)), images[:, ::2]

    got = jax.jit(lambda images: chunks.map_batch(function, images))(images)
    assert 3 in seen  # it was traced for pieces
    for a, b in zip(got, function(images), strict=True):
        np.testing.assert_array_equal(a, b)
