"""A tiny run through the real command line, which several test modules look at."""

import pathlib
from collections.abc import Callable

import pytest

from tests.support import commands


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Returns the arguments of a run of the tiny config in a workdir."""
    folder = tmp_path_factory.mktemp("tiny")
    config = folder / "tiny.py"
    config.write_text(commands.TINY)

    def arguments(workdir: pathlib.Path, workers: int = 0) -> list[str]:
        return [
            f"--config={config}",
            f"--workdir={workdir}",
            f"--config.data.data_dir={folder / 'data'}",
            f"--config.data.workers={workers}",
        ]

    return arguments


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def unbroken(tiny, cache, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run that nothing stops, and the line it prints last."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    status, out, err = commands.run(cache, *tiny(workdir))
    assert status == 0, err
    return workdir, out.splitlines()[-1]
