"""Images per second on this CPU: this package beside its alternatives.

    make bench-cpu
    python -m benchmarks.cpu [--cores=2] [--tasks=inference,training] [--ways=ours,torch,flax]
    python -m benchmarks.cpu --image-size=64 --batch=2 --rounds=1 --seconds=0.1 --tolerance=0.1

The network is MobileNetV2 1.0 with 1000 classes at 224 pixels in float32: inference at batch 1 and
32, training (SGD with momentum and weight decay, no dropout) at batch 32. The ways are

    ours           the predictor that `init_model` returns; the step of a training run
    torch          torchvision's network in channels-last memory, eager
    torch-fused    the same with BatchNorm folded into the convolutions; inference only
    torch-compile  the same, not folded, under torch.compile
    flax           Flax's own layers and optax, jitted (plain_flax.py)
    keras          Keras's own network on its JAX backend
    onnxruntime    ONNX Runtime on torch's export; inference only
    openvino       OpenVINO on the same export; inference only

Each way is a process of its own on the same cores. It compiles and warms up, and then sleeps until
its turn comes: about a second of steps, one way after another, round after round. The median of the
rounds counts, and ratios are ratios of medians. Memory is the peak of a process while it took
steps, its libraries included.

Before the timing, the ways are compared with the same weights on the same images: the logits, or
the losses of the first two training steps, may differ by 1e-3 of the largest. With few and small
images the second loss differs by more, since normalising few values enlarges rounding: the last
command above, which only tries everything out, has a larger tolerance. Keras's network has another
padding and epsilon: its logits are compared with those of ours with its weights, and its training
is only timed.

glibc returns large blocks of memory to the system at once, and requests them again in the next
step. `--allocator=kept` has it keep them, for all ways; by default both settings are measured.

All processes of a comparison exist at the same time: training needs 16 GB of memory. It takes half
an hour on two cores, in which the machine should do nothing else. Rows of the CSV that were
measured under other conditions, such as on more cores, stay in it.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import options as options_lib
from benchmarks import report
from benchmarks.cpu_peers import OURS_OF_KERAS, TASKS, WAYS
from mbv2_jax.errors import UserError

HERE = Path(__file__).resolve().parent
BATCHES = {"inference": (1, 32), "training": (32,)}

# Blocks up to 8 GiB come from the heap; it keeps up to 32 GiB of free memory, in huge pages where
# the system has them.
ALLOCATORS = {
    "default": {},
    "kept": {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592"
        ":glibc.malloc.trim_threshold=34359738368:glibc.malloc.hugetlb=1"
    },
}
PAUSE = 0.2  # seconds before a turn, in which the threads of the one before fall asleep
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# The fields in which rows agree that were compared with one another.
COMPARISON = ("task", "batch", "image_size", "cores", "allocator")


class Worker:
    """A process that runs one way; it is prepared and sleeps.

    Attributes:
      missing: the reason why it cannot run here; None where it can.
      outputs: its logits, or the losses of its first two steps.
      steps: the number of steps of a measurement.
      versions: the versions of its packages.
    """

    def __init__(self, way: str, arguments: Sequence[str], environment: Mapping[str, str]):
        self.way = way
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 # `close` does
        self._process = subprocess.Popen(
            _command(way, arguments),
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            cwd=HERE.parent,
        )
        try:
            ready = self._answer()
        except UserError as error:  # a compiler may fail: the others are still measured
            ready = {"missing": str(error)}
        self.missing: str | None = ready.get("missing")
        self.outputs = np.asarray(ready.get("outputs", ()))
        self.steps: int = ready.get("steps", 0)
        self.versions: dict[str, str] = ready.get("versions", {})

    def go(self) -> dict[str, float]:
        """Takes the steps; returns {"seconds": of all of them, "peak_mib": of memory so far}."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process ended: its answer tells why
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._complaints.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise _failed(self.way, self._process.wait(), self._complaints)
        return json.loads(line)


def _command(way: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.cpu_peers", way, *arguments]


def _failed(way: str, status: int, complaints: Any) -> UserError:
    complaints.seek(0)
    return UserError(f"{way} failed: {report.last_line(complaints.read(), status)}")


def check_agreement(task: str, outputs: Mapping[str, np.ndarray], tolerance: float) -> None:
    """Raises UserError if a way's outputs differ from those of the way it is compared with.

    Args:
      task: "inference" or "training", where Keras's losses are not compared.
      outputs: the flat outputs by way, torch's among them; with Keras's logits those of ours with
        its weights.
      tolerance: the limit to the largest difference, relative to the other's largest output.
    """
    what = "logits" if task == "inference" else "losses of two training steps"
    for way, values in outputs.items():
        if way == "keras" and task == "training":
            continue
        judge = OURS_OF_KERAS if way in ("keras", OURS_OF_KERAS) else report.REFERENCE
        wanted = outputs[judge]
        difference = np.abs(values - wanted).max() / np.abs(wanted).max()
        if not difference <= tolerance:  # NaN fails, too
            raise UserError(
                f"nothing was timed: the {what} of {way} and of {judge} differ by {difference:.2g} "
                f"of the largest, more than --tolerance={tolerance:g}: they do not compute the same"
            )


def compare(
    task: str, batch: int, allocator: str, weights: Path, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measures one task at one batch; returns its rows, and the packages' versions."""
    arguments = [f"--task={task}", f"--batch={batch}", f"--weights={weights}"]
    arguments += [f"--seconds={options.seconds}", *_shared(options)]
    environment = _environment(options) | ALLOCATORS[allocator]
    where = f"{task}, batch {batch}, allocator {allocator}"
    with contextlib.ExitStack() as stack:
        workers = []
        for way in options.ways:
            if task in WAYS[way].tasks:
                _say(f"{where}: {way} prepares")
                workers.append(Worker(way, arguments, environment))
                stack.callback(workers[-1].close)
        for worker in workers:
            if worker.missing and worker.way in ("ours", report.REFERENCE):
                raise UserError(f"cannot measure {worker.way}: {worker.missing}")
            if worker.missing:
                _say(f"left out: {worker.way}: {worker.missing}")
        workers = [worker for worker in workers if not worker.missing]
        _check(task, workers, arguments, environment, options.tolerance)
        seconds: dict[str, list[float]] = {worker.way: [] for worker in workers}
        peaks: dict[str, float] = {}
        for turn in range(options.rounds):
            for worker in workers:
                time.sleep(PAUSE)
                result = worker.go()
                seconds[worker.way].append(result["seconds"] / worker.steps)
                peaks[worker.way] = result["peak_mib"]
            _say(f"{where}: round {turn + 1} of {options.rounds}")
    facts = {"task": task, "batch": batch, "image_size": options.image_size}
    facts |= {"cores": len(options.cores), "allocator": allocator}
    rows = [facts | row | {"peak_mib": peaks[row["way"]]} for row in report.rates(seconds, batch)]
    return rows, {name: v for worker in workers for name, v in worker.versions.items()}


def _check(
    task: str,
    workers: Iterable[Worker],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    tolerance: float,
) -> None:
    outputs = {worker.way: worker.outputs for worker in workers}
    if "keras" in outputs and task == "inference":
        worker = Worker(OURS_OF_KERAS, arguments, environment)
        worker.close()
        outputs[OURS_OF_KERAS] = worker.outputs
    check_agreement(task, outputs, tolerance)


def _shared(options: argparse.Namespace) -> list[str]:
    cores = ",".join(map(str, options.cores))
    return [f"--cores={cores}", f"--image-size={options.image_size}"]


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Returns the environment variables of all ways, for the threads and the device."""
    threads = dict.fromkeys(THREADS, str(len(options.cores)))
    return threads | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def make_weights(folder: Path, options: argparse.Namespace) -> None:
    """Writes the weights for all ways."""
    for way in [report.REFERENCE] + ["keras"] * ("keras" in options.ways):
        command = _command(way, [f"--make={folder}", *_shared(options)])
        with tempfile.TemporaryFile("w+") as complaints:
            process = subprocess.run(
                command,
                env=os.environ | _environment(options),
                stdout=complaints,
                stderr=complaints,
                cwd=HERE.parent,
            )
            if process.returncode and way == report.REFERENCE:  # Keras's own process reports it
                raise _failed(way, process.returncode, complaints)


def run(options: argparse.Namespace) -> None:
    """Measures the requested tasks; prints and writes each table as soon as it is complete."""
    facts = report.machine() | {"rounds": options.rounds, "seconds": options.seconds}
    note = f"{facts['machine']}; commit {facts['commit']}"
    with tempfile.TemporaryDirectory() as folder:
        _say("making the weights")
        make_weights(Path(folder), options)
        for allocator in options.allocators:
            settings = _environment(options) | ALLOCATORS[allocator]
            print(f"\nallocator {allocator}, every way with:")
            print("\n".join(f"  {name}={value}" for name, value in settings.items()))
            for task in options.tasks:
                for batch in options.batches or BATCHES[task]:
                    rows, versions = compare(task, batch, allocator, Path(folder), options)
                    print(f"\n{_title(rows[0])}")
                    report.show(rows, report.RATES)
                    facts["versions"] = report.listed_versions(versions)
                    held = report.write(options.output, rows, facts, COMPARISON)
                    draw(options.output.with_suffix(".png"), held, note)


def draw(path: Path, rows: Sequence[Mapping[str, str]], note: str) -> None:
    """Draws the rows of a CSV: a panel for each comparison, the allocators side by side."""
    panels: dict[str, list[report.Bar]] = {}
    for row in sorted(rows, key=_order):
        figures = (float(row[name]) for name in ("images_per_second", "min", "max"))
        bar = report.Bar(row["way"], *figures)
        panels.setdefault(_title(row), []).append(bar)
    allocators = {row["allocator"] for row in rows}
    report.draw(path, panels, f"images per second; {note}", columns=len(allocators))


def _order(row: Mapping[str, str]) -> list[Any]:
    values = (row[field] for field in COMPARISON)
    return [int(value) if value.isdigit() else value for value in values]


def _title(row: Mapping[str, Any]) -> str:
    cores = f"{row['cores']} core{'s'[: int(row['cores']) > 1]}"
    images = f"batch {row['batch']} at {row['image_size']} pixels"
    return f"{row['task']}, {images}, {cores}, allocator {row['allocator']}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cores", type=int, metavar="N", help="number of cores; default: all")
    add("--tasks", metavar="TASK,...", help=f"only these of {', '.join(TASKS)}")
    add("--ways", metavar="WAY,...", help="only these, and torch, which all are compared with")
    add("--batch", metavar="N,...", help="images per step, in place of the above")
    add("--allocator", metavar="NAME", help="only 'default' or only 'kept'")
    add("--image-size", type=int, default=224, metavar="PIXELS", help="default: 224")
    add("--rounds", type=int, default=7, help="default: 7")
    add("--seconds", type=float, default=1.0, help="per measurement; default: 1")
    add("--tolerance", type=float, default=1e-3, help="of the comparison; default: 0.001")
    default = HERE / "cpu.csv"
    add("--output", type=Path, default=default, metavar="CSV", help="default: cpu.csv here")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        raise UserError("this needs Linux: it pins processes to cores, and reads /proc")
    options.tasks = options_lib.chosen("--tasks", options.tasks, TASKS)
    ways = {report.REFERENCE, *options_lib.chosen("--ways", options.ways, WAYS)}
    options.ways = [way for way in WAYS if way in ways]
    options.allocators = options_lib.chosen("--allocator", options.allocator, ALLOCATORS)
    options.cores = _cores(options.cores)
    options.batches = options_lib.counts("--batch", options.batch)
    if min(options.rounds, options.image_size) < 1:
        raise UserError("--rounds and --image-size: give 1 or more")
    return options


def _cores(count: int | None) -> list[int]:
    """Returns the numbers of the cores to use: the last ones of this process's affinity."""
    there = sorted(os.sched_getaffinity(0))
    if count is not None and not 1 <= count <= len(there):
        raise UserError(f"--cores={count}: give 1 to {len(there)}")
    return there[-(count or len(there)) :]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return options_lib.status(lambda: run(_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
