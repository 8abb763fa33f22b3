"""A missing package is named with the command that installs it."""

import pytest

from mbv2_jax.errors import UserError
from mbv2_jax.installed import require


def test_missing_packages_are_named_with_their_command():
    require("testing", "pytest", "os.path")
    line = "testing needs no_such, no.such.module, which are not installed: run pip install . in"
    with pytest.raises(UserError, match=f"^{line} the clone"):
        require("testing", "no_such", "pytest", "no.such.module")


def test_an_extra_is_quoted_for_the_shell():
    with pytest.raises(UserError, match=r"needs no_such, which is not .* pip install '\.\[fast\]'"):
        require("testing", "no_such", extra="fast")
