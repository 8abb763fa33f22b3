"""Mistakes of the user in config and flags, through the real command line; and --help.

Each mistake gets one clear line that names the remedy and exit status 2, and leaves nothing behind.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mbv2_jax import tasks
from mbv2_jax.training import settings
from tests.support import REPOSITORY


def run(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, "-m", "mbv2_jax.main", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with train/ of three classes, val/ of two of them, and same/ of all three."""
    folder = tmp_path_factory.mktemp("photos")
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    for split, classes in (("train", "abc"), ("val", "ab"), ("same", "abc")):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            image.save(folder / split / name / "1.png")
    return folder


@pytest.fixture(scope="module")
def cases(photos: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Name -> (arguments, parts of the message)."""
    files = tmp_path_factory.mktemp("configs")
    recipe = (
        "from mbv2_jax.configs import default\ndef get_config():\n    c = default.get_config()\n"
    )
    (files / "unknown.py").write_text(recipe + "    c.model.widht = 1.0\n    return c\n")
    (files / "type.py").write_text(recipe + "    c.batch_size = 'many'\n    return c\n")
    (files / "syntax.py").write_text("def get_config(:\n")
    (files / "nothing.py").write_text("def get_config():\n    pass\n")
    digits, tpu = "--config=configs/digits.py", "--config=mobilenet_v2_tpu_4096"
    same = f"--config.data.source=folder:{photos}"
    return {
        "no config": ([], ["--config=NAME is missing", "'digits'"]),
        "config file": (["--config=configs/digts.py"], ["'configs/digts.py'", "'digits'"]),
        "config name": (["--config=cifar100"], ["'cifar100'", "'cifar10'"]),
        "config argument": ([digits + ":big"], ["digits.py takes no ':big'"]),
        "config variant": (["--config=cifar10:smok"], ["'smok'", "'smoke'"]),
        "config's unknown key": ([f"--config={files / 'unknown.py'}"], ["widht", '"width"']),
        "config's wrong type": ([f"--config={files / 'type.py'}"], ["batch_size", "int"]),
        "config's syntax": ([f"--config={files / 'syntax.py'}"], ["syntax.py", "SyntaxError"]),
        "config of nothing": ([f"--config={files / 'nothing.py'}"], ["ConfigDict"]),
        "unknown flag": ([digits, "--wrkdir=x"], ["wrkdir", "workdir"]),
        "stray word": ([digits, "train"], ["'train'", "--NAME=VALUE"]),
        "unknown mode": ([digits, "--mode=test"], ["mode", "eval"]),
        "processes of info": ([digits, "--mode=info", "--num_processes=2"], ["--mode=train and"]),
        "unknown key": ([digits, "--config.batchsize=3"], ["'batchsize'", "'batch_size'"]),
        "unknown inner key": ([digits, "--config.model.with=1"], ["'model.with'", "'model.width'"]),
        "key of another section": ([digits, "--config.width=1"], ["'model.width'"]),
        "section": ([digits, "--config.data=1"], ["section", "data.source"]),
        "wrong type": ([digits, "--config.batch_size=many"], ["batch_size", "many"]),
        "wrong number": ([digits, "--config.model.width=wide"], ["model.width", "wide"]),
        "negative batch": ([digits, "--config.batch_size=-4"], ["batch_size", "1 or more"]),
        "no epochs": ([digits, "--config.num_epochs=0"], ["num_epochs", "fit_head"]),
        "nan": ([digits, "--config.schedule.base_lr=nan"], ["schedule.base_lr", "nan"]),
        "dropout": ([digits, "--config.model.dropout=1.5"], ["model.dropout", "at most 1"]),
        "padding": ([digits, "--config.model.padding=SAME"], ["'SAME'", "'same'"]),
        "task": ([digits, "--config.task=clasification"], ["did you mean 'classification'?"]),
        "class of a task": ([digits, "--config.task=no.module:X"], ["No module named 'no'"]),
        "power": ([digits, "--config.schedule.power=0"], ["schedule.power", "above 0"]),
        "best metric": ([digits, "--config.checkpoint.best_metric=top2"], ["'top2'", "'top1'"]),
        "optimizer": ([digits, "--config.optimizer.name=adam"], ["'adam'", "'adamw'"]),
        "schedule": ([digits, "--config.schedule.name=cosin"], ["'cosin'", "'cosine'"]),
        "strides": ([digits, "--config.model.strides=(2,2)"], ["model.strides", "8 numbers"]),
        "groups": ([digits, "--config.model.bn_group_size=7"], ["64", "7"]),
        "group name": ([digits, "--config.model.bn_group_size=devise"], ["'devise'", "'device'"]),
        "large group": ([digits, "--config.model.bn_group_size=128"], ["128", "batch_size 64"]),
        "half a group": ([digits, "--config.model.bn_group_size=2.5"], ["2.5", "'device'"]),
        "unknown source": ([digits, "--config.data.source=digit"], ["'digit'", "'digits'"]),
        "unknown split": ([digits, "--config.data.eval_split=tst"], ["'tst'", "'test'"]),
        "missing folder": ([digits, "--config.data.source=folder:/no/where"], ["/no/where"]),
        "empty folder name": ([digits, "--config.data.source=folder:"], ["folder: needs a path"]),
        "transform": (
            [digits, "--config.data.eval_transforms=resise(8)"],
            ["'resise'", "resize"],
        ),
        "random evaluation": ([digits, "--config.data.eval_transforms=random_crop(8)"], ["random"]),
        "class count": ([digits, "--config.model.num_classes=12"], ["12", "10 classes"]),
        "classes of splits": ([digits, same, "--config.data.eval_split=val"], ["differ", ": c"]),
        "split used twice": (
            [digits, same, "--config.data.train_split=same", "--config.data.eval_split=same"],
            ["same images"],
        ),
        "frozen at random": ([digits, "--config.model.frozen_stages=1"], ["--checkpoint=PATH"]),
        "checkpoint's name": ([digits, "--checkpoint=torchvison"], ["did you mean 'torchvision'"]),
        "no checkpoint": (
            [digits, "--checkpoint=/no/where"],
            ["/no/where", "does not exist"],
        ),
        "workdir is a file": ([digits, f"--workdir={files / 'type.py'}"], ["type.py is a file"]),
        "workdir below a file": (
            [digits, f"--workdir={files / 'type.py' / 'run'}"],
            ["cannot be written"],
        ),
        "expect": ([digits, "--expect=71"], ["--expect=71", "TOP1,TOP5"]),
        "flags of eval": ([digits, "--tta"], ["--tta and --out go with --mode=eval"]),
        "no topology": ([tpu, "--mode=compile"], ["--topology=NAME", "v5e:2x4"]),
        "topology": ([tpu, "--mode=compile", "--topology=v5litepod-8"], ["v5litepod-8", "v5e:"]),
        "generation": ([tpu, "--mode=compile", "--topology=v5f:2x4"], ["'v5f'", "'v5e'"]),
        "sides": ([tpu, "--mode=compile", "--topology=v4:2x2"], ["v4:2x2", "3 sides"]),
        "flags of compile": ([digits, "--topology=v5e:2x4"], ["goes with --mode=compile"]),
        "classes left open": (
            [digits, "--mode=compile", "--topology=v5e:2x4"],
            ["--config.model.num_classes="],
        ),
        "devices": ([digits, "--config.batch_size=66", "4 devices"], ["66", "4 devices", "64"]),
    }


def run_all(folder: pathlib.Path, cases: dict[str, tuple]) -> dict[str, tuple[int, str, str]]:
    """Returns the exit status, standard output and standard error of each."""
    runs: list[dict[str, Any]] = []
    for name, (given, _) in cases.items():
        arguments = [argument for argument in given if argument != "4 devices"]
        if not any(argument.startswith("--workdir") for argument in arguments):
            arguments.append(f"--workdir={folder / name}")
        arguments.append(f"--config.data.data_dir={folder}-data")
        flags = f"--xla_force_host_platform_device_count={4 if '4 devices' in given else 1}"
        files = {kind: f"{folder}-{name}.{kind}" for kind in ("stdout", "stderr")}
        runs.append({"arguments": arguments, "environment": {"XLA_FLAGS": flags}} | files)
    process = subprocess.run(
        [sys.executable, "-m", "tests.support.forked"],
        input=json.dumps(runs),
        cwd=REPOSITORY,
        # Set here, or each would set it and start again.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return {
        name: (status, *(pathlib.Path(how[kind]).read_text() for kind in ("stdout", "stderr")))
        for name, status, how in zip(cases, json.loads(process.stdout), runs, strict=True)
    }


def test_every_mistake_is_one_line_and_writes_nothing(cases, tmp_path):
    faults = []
    folder = tmp_path / "runs"
    run_all(folder, {"no checkpoint": cases["no checkpoint"]})  # prepares the digits once
    for name, (status, out, err) in run_all(folder, cases).items():
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        if status != 2:
            faults.append(f"{name}: exit status {status}: {err[-300:]}")
        elif len(lines) != 1 or "Traceback" in err or out:
            faults.append(f"{name}: not one line: {err[-300:]}{out}")
        elif missing := [part for part in cases[name][1] if part not in lines[0]]:
            faults.append(f"{name}: {missing} not in {lines[0]!r}")
        elif (folder / name).exists():
            faults.append(f"{name}: wrote {folder / name}")
    assert not faults, "\n".join(faults)


def test_workdir_is_asked_for():
    process = run("--config=configs/digits.py")
    assert process.returncode == 2
    assert "--workdir=DIR is missing" in process.stderr


def test_evaluation_asks_for_a_checkpoint():
    process = run("--config=configs/digits.py", "--mode=eval")
    assert process.returncode == 2
    assert "--checkpoint=PATH" in process.stderr


def test_help_teaches_quickly_and_without_jax():
    script = (
        "import runpy, sys\n"
        "sys.argv = ['main', '--help']\n"
        "try:\n"
        "    runpy.run_module('mbv2_jax.main', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "assert 'jax' not in sys.modules\n"
    )
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    elapsed = time.monotonic() - start
    assert process.returncode == 0, process.stderr
    for part in (
        "--config=configs/digits.py --workdir=",
        "--mode=eval",
        "--checkpoint",
        "--workdir",
    ):
        assert part in process.stdout
    for task in tasks.BUILT_IN:
        for name in settings.declared(task):
            assert f"\n  {name}\n" in process.stdout
    assert process.stdout.count("\n  schedule.base_lr\n") == 1  # which the tasks share
    assert elapsed < 1.5  # a user waits no longer for help; 0.2 s was measured


def test_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m mbv2_jax.main --config=digits --mode=info | head -1"
    process = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert process.stdout.startswith("layer")
    assert "Error" not in process.stderr


def test_platform_that_is_not_there_is_one_line(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "mbv2_jax.main", "--config=digits", f"--workdir={tmp_path}/run"],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "rocm"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "jax finds no device of rocm" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


def test_info_prints_the_pages_figures():
    process = run("--config=configs/mobilenet_v2_8xb32_in1k.py", "--mode=info")
    assert process.returncode == 0, process.stderr
    for figure in ("3,504,872", "300,774,272", "0.319 G"):
        assert figure in process.stdout


def test_every_config_loads_and_is_possible():
    from mbv2_jax.command_line import load_config
    from mbv2_jax.training import config as config_lib

    recipes = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
    recipes = [name for name in recipes if name not in ("__init__", "default")]
    assert "digits" in recipes
    for name in [*recipes, "cifar10:smoke"]:
        config_lib.read(load_config(name))
