"""Images per second of the input pipeline beside torch's and tf.data's, on real photos.

    make bench-input PHOTOS=DIR
    python -m benchmarks.input_pipeline --photos=DIR [--tensorflow-python=PATH] [--rounds=5]
    python -m benchmarks.input_pipeline --photos=DIR --memory

The work is the training transform (RandomResizedCrop of 8 to 100 % of the area, flip) to 224
pixels, in batches of 64 uint8 images. Each way runs in a process of its own, one after another,
round after round, and the median of the rounds counts. On 1 core all threads and processes of a way
share that core; on all cores each way runs in the settings that suit it. The files come from the
page cache. Five rounds take 25 minutes, in which the machine should do nothing else.

All ways do the same work, with these exceptions: torch-float also scales and normalises, as
torchvision's reference training does on the host; tf and tf-antialias get boxes that were drawn
before.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import input_peers, report
from benchmarks import options as options_lib
from mbv2_jax.data.sources import open_source
from mbv2_jax.errors import UserError, listed, nearest

HERE = Path(__file__).resolve().parent

COLUMNS = (
    report.Column("cores", "cores", "d"),
    report.Column("way", "way"),
    report.Column("median", "images/s", ".0f"),
    report.Column("min", "min", ".0f"),
    report.Column("max", "max", ".0f"),
    report.Column("exact", "exact/it", ".2f"),
    report.Column("fast", "fast/it", ".2f"),
    report.Column("scaling", "scaling", ".2f"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A way of reading on a number of cores, in one of its settings."""

    peer: str
    cores: int
    setting: int

    @property
    def label(self) -> str:
        return f"{self.peer}, {self._setting()}"

    def _setting(self) -> str:
        if self.peer.startswith("tf"):
            return f"{self.setting} thread{'s'[: self.setting > 1]}"
        if not self.setting:
            return "threads" if self.peer.startswith("ours") else "in the main process"
        return f"{self.setting} worker{'s'[: self.setting > 1]}"


def plan(peers: list[str], cores: int) -> list[Run]:
    """Returns the measurements of a round, in order."""
    runs = []
    for used in sorted({1, cores}):
        for peer in peers:
            if peer.startswith("tf"):
                settings = {used}
            elif peer.startswith("ours") or used == 1:
                settings = {0, used}
            else:
                settings = {used - 1, used}  # with and without a core for the main process
            runs += [Run(peer, used, setting) for setting in sorted(settings)]
    return runs


def measure(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one way once; returns {"rate": images per second, "versions": of its packages}."""
    cores = sorted(os.sched_getaffinity(0))[-run.cores :]
    python = options.tensorflow_python if run.peer.startswith("tf") else sys.executable
    command = [python, "-m", "benchmarks.input_peers", run.peer, options.photos]
    command += [f"--cores={','.join(map(str, cores))}", f"--setting={run.setting}"]
    command += [f"--seconds={options.seconds}"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if process.returncode:
        line = report.last_line(process.stderr, process.returncode)
        raise UserError(f"cannot measure {run.label}: {line}")
    return json.loads(process.stdout.splitlines()[-1])


def table(rates: dict[Run, list[float]]) -> list[dict[str, Any]]:
    """Returns a row for each run: median, minimum and maximum, and ratios.

    "exact" and "fast" are our median in the better setting on as many cores, divided by the row's
    median. "scaling" is the row's median per core, divided by the way's better median on 1 core.
    """
    median = {run: statistics.median(values) for run, values in rates.items()}

    def best(peer: str, cores: int) -> float | None:
        return max(
            (rate for run, rate in median.items() if (run.peer, run.cores) == (peer, cores)),
            default=None,
        )

    rows = []
    for run, values in rates.items():
        row: dict[str, Any] = {"cores": run.cores, "way": run.label}
        row |= {"median": median[run], "min": min(values), "max": max(values)}
        for name in ("exact", "fast"):
            rate = best(f"ours-{name}", run.cores)
            row[name] = rate and rate / median[run]
        one = best(run.peer, 1)
        row["scaling"] = one and median[run] / (one * run.cores)
        rows.append(row)
    return rows


def draw(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Draws the medians as bars, a panel for each number of cores."""
    panels = {
        f"images per second, {cores} core{'s'[: cores > 1]}": [
            report.Bar(row["way"], row["median"], row["min"], row["max"])
            for row in rows
            if row["cores"] == cores
        ]
        for cores in sorted({row["cores"] for row in rows})
    }
    report.draw(path, panels, f"{facts['machine']}; commit {facts['commit']}")


def compare(options: argparse.Namespace) -> None:
    """Measures all ways in turn, prints the table and writes the CSV."""
    photos = len(open_source(f"folder:{options.photos}", "all"))
    facts = report.machine() | {
        "photos": photos,
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    runs = plan(options.peers, len(os.sched_getaffinity(0)))
    rates: dict[Run, list[float]] = {run: [] for run in runs}
    versions: dict[str, str] = {}
    for turn in range(options.rounds):
        for run in runs:
            result = measure(run, options)
            rates[run].append(result["rate"])
            versions.update(result["versions"])
            print(
                f"round {turn + 1} of {options.rounds}, {run.cores} cores:"
                f" {run.label}: {result['rate']:.0f} images/s",
                file=sys.stderr,
            )
    facts["versions"] = report.listed_versions(versions)
    rows = table(rates)
    print()
    report.show(rows, COLUMNS)
    path = options.output or HERE / "input_pipeline.csv"
    report.write(path, rows, facts)
    draw(path.with_suffix(".png"), rows, facts)


def memory(options: argparse.Namespace) -> None:
    """Prints and writes the memory of our pipeline and its workers after each epoch.

    It is the proportional set size, which counts shared memory once.
    """
    from mbv2_jax.data import loader
    from mbv2_jax.data.transforms import pipeline
    from mbv2_jax.tasks.classification.task import Classification

    workers = len(os.sched_getaffinity(0))
    source = open_source(f"folder:{options.photos}", "all")
    epoch = loader.steps_per_epoch(len(source), input_peers.BATCH)
    batches = loader.train_batches(
        source,
        pipeline.make_transform("random_resized_crop(size)|random_flip(0.5)", input_peers.SIZE),
        Classification(),
        batch_size=input_peers.BATCH,
        seed=0,
        start=0,
        stop=options.epochs * epoch,
        workers=workers,
    )
    rows = []
    for step, _ in enumerate(batches, start=1):
        if step % epoch == 0:
            rows.append({"epoch": step // epoch, "mebibytes": tree_mebibytes()})
            print(f"epoch {rows[-1]['epoch']:3}: {rows[-1]['mebibytes']:8.1f} MiB", flush=True)
    batches.close()
    facts = report.machine() | {"workers": workers, "photos": len(source)}
    report.write(options.output or HERE / "input_memory.csv", rows, facts)


def tree_mebibytes() -> float:
    """Returns the proportional set size of this process and its descendants, in MiB."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything; the parent is the second field after it.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
    tree = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    kibibytes = 0
    for pid in tree:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kibibytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kibibytes / 1024


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--photos", required=True, metavar="DIR", help="JPEG files in DIR/CLASS/, some hundred"
    )
    parser.add_argument(
        "--tensorflow-python",
        metavar="PATH",
        help="a Python that has TensorFlow (make venv-tensorflow); without it tf is left out",
    )
    parser.add_argument(
        "--peers",
        metavar="NAME,...",
        help=f"only these of {', '.join(input_peers.PEERS)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement; default: 5")
    parser.add_argument(
        "--memory", action="store_true", help="memory of ours over many epochs, instead of speed"
    )
    parser.add_argument("--epochs", type=int, default=20, help="of --memory; default: 20")
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="default: input_pipeline.csv beside this script"
    )
    options = parser.parse_args(arguments)
    options.photos = os.path.abspath(options.photos)
    names = options.peers.split(",") if options.peers else list(input_peers.PEERS)
    for name in names:
        if name not in input_peers.PEERS:
            raise UserError(f"--peers: unknown {name!r}; {nearest(name, input_peers.PEERS)}")
    options.peers = [n for n in names if options.tensorflow_python or not n.startswith("tf")]
    if len(options.peers) < len(names) and not options.memory:
        left_out = listed([name for name in names if name not in options.peers])
        print(f"left out without --tensorflow-python: {left_out}", file=sys.stderr)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""

    def run() -> None:
        options = _options(arguments)
        if sys.platform != "linux":
            raise UserError("this needs Linux: it pins processes to cores, and reads /proc")
        (memory if options.memory else compare)(options)

    return options_lib.status(run)


if __name__ == "__main__":
    sys.exit(main())
