"""Names of weights as --checkpoint of the other commands."""

import pytest

from mbv2_jax import model_dir
from mbv2_jax.errors import UserError


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"mmpretrian.*mmpretrain"):
        model_dir.read("mmpretrian")
