"""The share of the time in which the devices wait for input, and the log's lines about it.

The test alone moves the clock, so that a busy machine changes nothing.
"""

import dataclasses
import json
import pathlib
import re
import struct
import threading
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from mbv2_jax.configs import default
from mbv2_jax.data import workers
from mbv2_jax.tasks.classification.task import Classification
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import input_wait
from mbv2_jax.training import log as run_logging
from mbv2_jax.training.plan import Plan
from mbv2_jax.training.settings import Data

WAITING = "the devices waited for input"


class Machine:
    """A loader that makes a batch every `load` seconds, and a device that needs `compute` for one.

    The device takes its steps one after the other; the loader makes batches without a pause.
    """

    def __init__(self, load: float, compute: float):
        self.load, self.compute = load, compute
        self.now = 0.0  # the host's time
        self.ready = 0.0  # when the loader made its last batch
        self.finished = 0.0  # when the device will have finished all steps that it was given
        self.started: list[Output] = []
        self.of_watcher = threading.local()

    def monotonic(self) -> float:
        """Returns the host's time; in the thread that waits for an output, that output's time."""
        return getattr(self.of_watcher, "now", self.now)

    def batches(self, count: int):
        for number in range(count):
            self.ready += self.load
            self.now = max(self.now, self.ready)
            yield number

    def run(self, log: run_logging.RunLog, steps: range) -> None:
        for step, _ in zip(steps, log.timed(self.batches(len(steps))), strict=True):
            log.step(step, self.step())

    def step(self) -> dict[str, "Output | float"]:
        """Starts a step and returns its metrics."""
        self.finished = max(self.now, self.finished) + self.compute
        self.started.append(Output(self, self.finished))
        others = dict.fromkeys(("top1", "grad_norm", "learning_rate"), 1.0)
        return {"loss": self.started[-1], **others}


class Output:
    """An array that is ready at `end`."""

    def __init__(self, machine: Machine, end: float):
        self.machine, self.end = machine, end
        self.watched = threading.Event()

    def block_until_ready(self) -> "Output":
        self.machine.of_watcher.now = self.end
        self.watched.set()
        return self

    def __float__(self) -> float:
        for output in self.machine.started:  # the watcher is real, and may need its time
            assert output.watched.wait(60)
        self.machine.now = max(self.machine.now, self.end)
        return 1.0


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Returns a function that makes a machine and the log of a run on it."""
    config = default.get_config()
    config.batch_size = 8
    config.log.every_steps = 5
    fields: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Plan))
    fields |= {  # the log reads no others
        "settings": config_lib.read(config),
        "task": Classification(),
        "workdir": tmp_path,
        "steps_per_epoch": 100,
        "total_steps": 1000,
    }
    run = Plan(**fields)

    def log(load: float, compute: float, start: int = 0) -> tuple[Machine, run_logging.RunLog]:
        machine = Machine(load, compute)
        clock = types.SimpleNamespace(monotonic=machine.monotonic)
        monkeypatch.setattr(input_wait, "time", clock)
        monkeypatch.setattr(run_logging, "time", clock)
        monkeypatch.setattr(run_logging, "remedy", lambda data: "take more of them")
        return machine, run_logging.RunLog(run, start)

    return log


def shares(tmp_path) -> list[float]:
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [line["input_wait"] for line in lines if line["split"] == "train"]


@pytest.mark.parametrize("start", [0, 500])  # a new run, and one that continues
def test_slow_input_is_measured_and_said(log, tmp_path, capsys, start):
    machine, written = log(load=3.0, compute=1.0, start=start)
    with written:
        machine.run(written, range(start + 1, start + 202))
        written.flush()
    found = shares(tmp_path)
    # The device works 1 s of 3. A line is written 2 steps late, which shows in the first one.
    assert found[0] == pytest.approx(66.7, abs=10)
    assert found[1:39] == pytest.approx([66.7] * 38, abs=0.1)
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if WAITING in line]
    assert len(said) == 2  # of 40 lines: at the 2nd and the 22nd
    assert "67 % of the last 5 steps. To change that: take more of them." in said[0]
    assert "python -m mbv2_jax.data browse" in said[0]
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert all(re.search(r"images/s  waits for input \d\d %", line) for line in lines)


def test_step_time_and_the_devices_memory_are_logged(log, tmp_path, capsys, monkeypatch):
    counts = [{"peak_bytes_in_use": 3 * 2**29, "bytes_in_use": 1}, {"peak_bytes_in_use": 2**30}]
    devices = [types.SimpleNamespace(memory_stats=lambda count=count: count) for count in counts]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    machine, written = log(load=1.0, compute=3.0)
    with written:
        machine.run(written, range(1, 21))
        written.flush()
    *_, line = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (line["step_ms"], line["hbm_peak_gib"]) == (pytest.approx(3000), 1.5)
    assert "  3,000 ms/step  3 images/s  HBM 1.5 GiB" in capsys.readouterr().err
    board = tensorboard_scalars(tmp_path / "tensorboard")
    assert board["train/step_ms"] == pytest.approx(3000)
    assert board["train/hbm_peak_gib"] == 1.5


def test_a_cpu_has_no_figure_of_its_memory(log, tmp_path, capsys):
    machine, written = log(load=1.0, compute=3.0)
    with written:
        machine.run(written, range(1, 21))
        written.flush()
    assert "hbm" not in (tmp_path / "metrics.jsonl").read_text()
    assert "HBM" not in capsys.readouterr().err


def tensorboard_scalars(folder: pathlib.Path) -> dict[str, float]:
    """Returns the last value of each scalar in TensorBoard's files."""
    (file,) = folder.glob("events.*")
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, an event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        for value in event_pb2.Event.FromString(data[12 : 12 + size]).summary.value:
            found[value.tag] = value.simple_value
        data = data[16 + size :]
    return found


def test_fast_input_is_no_wait_whatever_else_takes_time(log, tmp_path, capsys):
    machine, written = log(load=1.0, compute=3.0)
    machine.ready = 50.0  # the first batch is late: workers start
    machine.compute = 100.0  # and the first step is compiled
    with written:
        machine.run(written, range(1, 2))
        machine.compute = 3.0
        machine.run(written, range(2, 31))
        written.flush()
        machine.now += 500.0  # an evaluation
        written.evaluation(30, {"top1": 1.0, "top5": 1.0, "loss": 1.0})
        machine.run(written, range(31, 63))
        written.flush()
        machine.now += 500.0  # a checkpoint
        machine.run(written, range(63, 101))
        written.flush()
    assert shares(tmp_path) == [0.0] * 20
    err = capsys.readouterr().err
    assert WAITING not in err and "waits for input" not in err


def test_a_wait_that_passes_is_in_its_line_only(log, tmp_path, capsys):
    machine, written = log(load=1.0, compute=1.0)
    with written:
        machine.run(written, range(1, 23))
        machine.ready = machine.finished + 10.0  # a disk that hiccups
        machine.run(written, range(23, 101))
        written.flush()
    found = shares(tmp_path)
    # 11 s without work, in a line of 5 steps of 1 s each.
    assert sorted(found)[-1] == pytest.approx(100 * 11 / 16, abs=10)
    assert sorted(found)[-2] < 10
    err = capsys.readouterr().err
    assert err.count("waits for input") == 1 and WAITING not in err


def test_a_real_step_that_waits_for_a_sleeping_loader():
    def sleeping():
        for _ in range(8):
            time.sleep(0.05)
            yield jnp.ones(4)

    step = jax.jit(lambda x: x + 1)
    jax.block_until_ready(step(jnp.ones(4)))
    wait = input_wait.InputWait()
    outputs = []
    start = time.monotonic()
    for batch in wait.batches(sleeping()):
        outputs.append(step(batch))
        wait.started(outputs[-1])
    elapsed = time.monotonic() - start
    wait.close()
    # A thread that is inside JAX when the interpreter ends would abort the process.
    assert "input wait" not in [thread.name for thread in threading.enumerate()]
    # The 7 sleeps after the first step, 0.35 s, are nearly all waiting. On a busy machine the step
    # may take much of it, and sleeps are longer.
    assert 0.1 <= wait.seconds <= elapsed


def test_a_step_that_fails_ends_the_watch_quietly():
    class Failed:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    wait = input_wait.InputWait()
    threads = [thread for thread in threading.enumerate() if thread.name == "input wait"]
    wait.started(Failed())
    for thread in threads[-1:]:
        thread.join(60)
        assert not thread.is_alive()


def test_remedies_fit_the_config_and_the_machine():
    def remedy(workers: int, train_decode: str, cores: int, spec: str | None = None) -> str:
        transforms = spec or "random_resized_crop(size)|random_flip(0.5)"
        data = Data(workers=workers, train_decode=train_decode, train_transforms=transforms)
        return input_wait.remedy(data, cores)

    assert remedy(4, "exact", 16) == (
        "--config.data.workers=16 (now 4), one per core, or --config.data.train_decode=fast (now "
        "exact), or more cores (now 16)"
    )
    assert remedy(16, "exact", 16).startswith("--config.data.train_decode=fast")
    assert remedy(16, "fast", 16) == "more cores (now 16)"
    threads = workers.parallel(0)
    assert remedy(0, "fast", 64).startswith(
        f"--config.data.workers=64 (now 0: {threads} threads), or more"
    )
    assert remedy(16, "fast", 2) == (
        "--config.data.workers=2 (now 16: more than the 2 cores), or more cores (now 2)"
    )
    # Fast decoding leaves pixels out only if the first operation is a random crop.
    assert remedy(4, "exact", 4, "resize_edge(256)|random_crop(size)") == "more cores (now 4)"
    assert "fast" in remedy(4, "exact", 4, "inception_crop(size)")
