"""Runs the command line on a tiny network, and reads the files that it writes."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.support import REPOSITORY

# The command itself; and the same with fewer layers, for tests in which their number is irrelevant.
WHOLE, SHORT = "mbv2_jax.main", "tests.support.short_network"

# It shortens compilation, and programs of such a small network run as fast.
QUICKLY = "--xla_backend_optimization_level=0"

# Every part of the state is in use: momentum, average, dropout, random crops.
TINY = """
from mbv2_jax.configs import digits

def get_config():
    config = digits.get_config()
    config.batch_size = 48
    config.num_epochs = 2.0
    config.model.width = 0.1
    config.model.dropout = 0.2
    config.model.strides = (2, 1, 2, 2, 2, 1, 1, 2)
    config.model.last_convolution = False  # it takes two thirds of a step's time
    config.data.image_size = 16
    config.data.train_transforms = "resize(size)|random_crop(size, padding=2)|random_flip(0.1)"
    config.label_smoothing = 0.1
    config.ema.decay = 0.9
    config.checkpoint.every_steps = 15  # a save takes longer than the steps between two
    config.checkpoint.keep_last = 2
    config.checkpoint.best_metric = "loss"
    config.log.every_steps = 3
    config.log.eval_every_epochs = 0.5
    return config
"""


def environment(
    cache: pathlib.Path | None, devices: int = 1, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Returns the environment of a command that runs on CPU devices.

    Args:
      cache: the folder of compiled programs, without which every start would compile for 15 s; None
        leaves the choice to the command.
      devices: the number of CPU devices.
      extra: further variables.
    """
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    devices_of = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY}",
    }
    inherited = {name: value for name, value in os.environ.items() if name not in kept}
    return inherited | devices_of | (kept if cache else {}) | dict(extra or {})


def start(
    cache: pathlib.Path | None,
    *arguments: str,
    devices: int = 1,
    module: str = SHORT,
    env: Mapping[str, str] | None = None,
    cwd: pathlib.Path = REPOSITORY,
) -> subprocess.Popen[str]:
    """Starts `python -m MODULE ARGUMENTS`, with the variables of `env` added to its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment(cache, devices, env) | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a test can signal the whole group, as a terminal does
    )


def run(cache: pathlib.Path | None, *arguments: str, **how: Any) -> tuple[int, str, str]:
    """Runs a command to its end; returns exit status, standard output and standard error."""
    process = start(cache, *arguments, **how)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without the fields that measure time or memory."""
    return timeless(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


def timeless(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns lines of metrics.jsonl without the fields that measure time or memory."""
    measured = ("images_per_second", "step_ms", "input_wait", "hbm_peak_gib")
    return [{name: line[name] for name in line if name not in measured} for line in lines]


def logged_step(workdir: pathlib.Path) -> int:
    """Returns the last step in metrics.jsonl; 0 where there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def checkpoints(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints that are complete, judged by their names."""
    found = workdir.glob("checkpoints/*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every array that Orbax saved at `path`, by name."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        # Read as numpy arrays, since the devices that wrote them need not be present.
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key): np.asarray(value) for key, value in flat}


def assert_equal_runs(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Asserts that two finished workdirs hold the same logs, states and models, bit for bit."""
    assert metrics(workdir) == metrics(whole)
    final = checkpoints(whole)[-1]
    assert checkpoints(workdir)[-1] == final
    for item in (f"checkpoints/{final}/state", "model/arrays"):
        ours, theirs = arrays(workdir / item), arrays(whole / item)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
