"""--mode=compile: its report on a recipe, and its refusals.

The tests marked `tpu` compile for real slices, with libtpu and without a TPU (`make test-tpu`).
"""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mbv2_jax.errors import UserError
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import compile as compile_lib
from tests.support import REPOSITORY

RECIPE = "--config=configs/mobilenet_v2_tpu_4096.py"
KEYS = {
    "topology",
    "devices",
    "global_batch",
    "per_device_batch",
    "hbm_bytes",
    "flops",
    "bytes_per_image",
    "all_reduces",
    "compile_seconds",
}


def test_missing_libtpu_is_named_with_its_extra(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else real(name)
    )
    with pytest.raises(UserError, match=r"pip install '\.\[tpu\]'"):
        compile_lib.topology_mesh("v5e:2x4")


def test_each_exchange_between_devices_is_counted_once():
    mesh = mesh_lib.create()

    def program(x):  # a device's row -> the rows' sum, all rows, and the neighbour's row
        total = jax.lax.psum(x, "data")
        rows = jax.lax.all_gather(x, "data")
        neighbour = jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return total, rows, neighbour

    spread = PartitionSpec("data")
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spread, out_specs=spread)
    assert compile_lib.exchanges(jax.jit(mapped).lower(jnp.ones((4, 128))).compile()) == 3


def test_out_of_memory_names_what_is_needed_and_what_is_there():
    # The message of libtpu 0.0.42.1.
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (104.97G) exceeds available HBM (15.75G)."
    )
    said = compile_lib.out_of_memory(message, 16384)
    assert "16384 images per device need 104.97G of HBM, and a device has 15.75G" in said
    said = compile_lib.out_of_memory("RESOURCE_EXHAUSTED: no more", 8)
    assert "8 images per device: RESOURCE_EXHAUSTED: no more" in said


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command with the CPU as JAX's backend."""
    return subprocess.run(
        [sys.executable, "-m", "mbv2_jax.main", "--mode=compile", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "batch", "devices"), [("v5e:2x4", 1024, 8), ("v5e:16x16", None, 256)]
)
def test_the_tpu_recipe_compiles(topology, batch, devices):
    arguments = [RECIPE, f"--topology={topology}"]
    process = compiled(*arguments, *([f"--config.batch_size={batch}"] if batch else []))
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert set(report) == KEYS
    assert report["topology"] == topology
    assert report["devices"] == devices
    assert report["global_batch"] == (batch or 4096)
    assert report["per_device_batch"] == report["global_batch"] / devices
    assert report["all_reduces"] <= 2  # the gradients'; normalisation needs none
    assert 4 * 4 * 3_504_872 < report["hbm_bytes"] < 16e9  # parameters and optimizer; the chip's
    # Forward, and twice that backward: 3 x 2 x the multiply-adds. The rest is elementwise, and the
    # padding of narrow layers.
    assert report["flops"] > 6 * 300_774_272 * report["per_device_batch"]


@pytest.mark.tpu
def test_the_detection_recipe_compiles():
    process = compiled(
        "--config=configs/ssdlite_mobilenet_v2_coco.py",
        "--topology=v5e:2x4",
        "--config.model.bn_group_size=device",
    )
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert (report["global_batch"], report["per_device_batch"]) == (192, 24)
    # The gradients', and those of the sums over the batch that the losses are divided by.
    assert report["all_reduces"] <= 4
    # Forward, and twice that backward: 3 x 2 x the multiply-adds of --mode=info.
    assert report["flops"] > 6 * 746_206_144 * 24


@pytest.mark.tpu
def test_what_does_not_fit_says_how_much_is_missing():
    process = compiled(RECIPE, "--topology=v5e:1x1", "--config.batch_size=16384")
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert line.startswith("failed: the training step does not fit: 16384 images per device need ")
    assert "15.75G" in line  # a v5e chip's 16 GiB, less what the system keeps


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--topology=v5e:3x5"], ["v5e:3x5", "not divisible"]),
        (["--topology=v5e:2x4", "--config.batch_size=100"], ["100", "8 devices", "96"]),
    ],
)
def test_what_cannot_be_compiled_is_one_line(arguments, parts):
    process = compiled(RECIPE, *arguments)
    assert process.returncode == 2
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in process.stderr
    assert all(part in lines[0] for part in parts), lines
