"""The tests of this folder run the live peers: torch, torchvision, timm, mmpretrain, Keras, ...

All are marked `peers`. Where no peer is installed, the modules, which import them, are not
collected; `make test-peers` installs them and runs these tests.
"""

import importlib.util
import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent

# With LLVM's optimizations, which the other tests do without: here photos go through whole
# networks.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests below this folder."""
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.peers)
