"""A whole run of the tiny config, which several test modules compare others with."""

import pathlib

import pytest

from tests.support import commands


@pytest.fixture(scope="session")
def unbroken(tiny, cache, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run that nothing stops, and the line it prints last."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    status, out, err = commands.run(cache, *tiny(workdir))
    assert status == 0, err
    return workdir, out.splitlines()[-1]
