"""The size of a piece divides the batch."""

import pytest

from mbv2_jax.ops.cpu import pieces


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(32, 4, 4), (32, 5, 4), (7, 4, 1), (6, 4, 3), (4, 9, 4), (3, 0, 1), (1, 4, 1)],
)
def test_divisor_divides(count, most, expected):
    assert pieces.divisor(count, most) == expected
