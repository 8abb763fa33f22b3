"""Fixtures for every test: four fake CPU devices, and the checking material where it is at hand."""

import os
import pathlib
from collections.abc import Callable, Iterator

# Before jax is imported anywhere: its devices are fixed at first use. Most of the tests' time is
# compilation, which takes a third less without LLVM's optimizations.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)

import pytest

from tests.support import REPOSITORY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts modules that run whole commands first: a worker that got one last would end alone."""
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "commands"))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory) -> pathlib.Path:
    """An empty cache folder, for this process and those it starts: never the user's own."""
    # Except for matplotlib's list of fonts, which takes seconds to make.
    former = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(former, "matplotlib"))
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def check_data() -> pathlib.Path:
    """The folder of real weights, photos and reference outputs, which is not of the project."""
    folder = pathlib.Path(os.environ.get("MBV2_CHECK_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(
            f"no checking material in {folder} (set MBV2_CHECK_DATA to the folder that holds "
            "golden/, weights/ and data/)"
        )
    return folder


@pytest.fixture
def few_layers() -> Iterator[None]:
    """The network has two blocks (tests/support/short_network.py), which compile in less time."""
    from tests.support import short_network

    with short_network.in_use():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Returns the arguments of a run of the tiny config in a workdir."""
    from tests.support import commands

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
    """A folder for compiled programs, which the commands that tests start share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers have it in common
    folder /= "compiled"
    folder.mkdir(exist_ok=True)
    return folder
