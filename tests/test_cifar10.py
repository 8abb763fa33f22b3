"""The CIFAR-10 recipe for a CPU, whole, on the real images."""

import json
import os
import subprocess
import sys
import tarfile

import pytest

from tests.support import REPOSITORY


@pytest.mark.slow  # 20 minutes on 4 cores
def test_smoke_recipe_learns_cifar10(check_data, tmp_path):
    with tarfile.open(check_data / "data" / "cifar10_jpeg.tar.gz") as archive:
        archive.extractall(tmp_path / "cifar10", filter="data")
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "mbv2_jax.main",
            "--config=configs/cifar10.py:smoke",
            f"--config.data.source=folder:{tmp_path / 'cifar10'}",
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": ""},  # one device, as a user has, not the tests' four
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.returncode == 0
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["examples"] == 10000
    assert result["top1"] >= 70
