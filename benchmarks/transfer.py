"""Fine-tuning on small sets: our recipes beside torchvision's network, from the same weights.

    python -m benchmarks.transfer --weights=PTH --data=DIR [--work=DIR] [--output=CSV]
    python -m benchmarks.transfer ... --sets=digits-100 --seeds=0 --ways=probe    # a quick trial

PTH is mmpretrain's MobileNetV2, DIR holds cifar10_jpeg.tar.gz (train/CLASS/*.jpg, test/CLASS/*.jpg)
and bccd.tar (BCCD, VOC XML). Every way but the probe, which makes one pass, sees each training
photo equally often, at 128 pixels; where ours fits the head first, that counts as one pass. The
accuracy is that of the last weights on the same held-out photos, top-1 in percent.

    ours        --config=finetune_folder
    ours-live   the same with --config.model.norm_eval=false: BatchNorm follows the batches
    probe       --config=probe
    tutorial    torchvision, as PyTorch's transfer-learning tutorial (benchmarks/transfer_peers.py)
    timm        torchvision's network, with the defaults of timm's train.py

A row is written as soon as it is measured, and rows that the CSV has, with as many epochs, are not
measured again. All of it takes about two hours on 2 cores.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import options as options_lib
from benchmarks import report, transfer_sets
from mbv2_jax.errors import UserError

HERE = Path(__file__).resolve().parent
WAYS = ("ours", "ours-live", "probe", "tutorial", "timm")
SIZE = 128
KEY = ("set", "way", "seed")
COLUMNS = (
    report.Column("set", "set"),
    report.Column("way", "way"),
    report.Column("top1", "top-1", ".1f"),
    report.Column("error", "+-", ".1f"),
    report.Column("minutes", "minutes", ".1f"),
)


def epochs_of(name: str, way: str) -> int:
    """Returns the passes over the training photos of a set."""
    return 1 if way == "probe" else transfer_sets.SETS[name].epochs


def command(way: str, name: str, seed: int, data: Path, work: Path) -> list[str]:
    """Returns the arguments of Python that train and evaluate; the last line printed is JSON."""
    epochs = epochs_of(name, way)
    if way in ("tutorial", "timm"):
        weights = f"--weights={work / 'torchvision.pth'}"
        module = ["-m", "benchmarks.transfer_peers", f"--way={way}", f"--data={data}", weights]
        return [*module, f"--image-size={SIZE}", f"--epochs={epochs}", f"--seed={seed}"]
    recipe = "probe" if way == "probe" else "finetune_folder"
    found = ["-m", "mbv2_jax.main", f"--config={recipe}", f"--checkpoint={work / 'model'}"]
    found += [f"--workdir={work / 'run'}", f"--config.data.source=folder:{data}"]
    found += [f"--config.data.image_size={SIZE}", f"--config.seed={seed}"]
    found += [f"--config.data.eval_transforms=resize_edge({int(SIZE / 0.875)})|center_crop(size)"]
    if way != "probe":
        found += [f"--config.num_epochs={epochs - 1}"]
        # Once, at the end, as the others evaluate and save.
        found += [f"--config.log.eval_every_epochs={epochs}"]
        found += [f"--config.checkpoint.every_epochs={epochs}"]
    if way == "ours-live":
        found += ["--config.model.norm_eval=false"]
    return found


def measure(way: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of one run."""
    data = transfer_sets.make(name, seed, options.data, options.work)
    arguments = command(way, name, seed, data, options.work)
    shutil.rmtree(options.work / "run", ignore_errors=True)
    begin, before = time.perf_counter(), os.times()
    process = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=HERE.parent
    )
    seconds, after = time.perf_counter() - begin, os.times()
    if process.returncode:
        line = report.last_line(process.stderr, process.returncode)
        raise UserError(f"{way} on {name}, seed {seed}: {line}")
    busy = after.children_user + after.children_system - before.children_user
    return {
        "set": name,
        "way": way,
        "seed": seed,
        "top1": float(json.loads(process.stdout.splitlines()[-1])["top1"]),
        "minutes": seconds / 60,
        "cpu_minutes": (busy - before.children_system) / 60,
        "epochs": epochs_of(name, way),
    }


def table(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Returns a row for each set and way, and for each way's mean over the sets.

    "top1" is the mean over the seeds, "error" its standard error (that of a mean over sets is
    pooled), and "minutes" the median over the seeds. None where it cannot be known.
    """
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["way"]), []).append(row)
    found = []
    for name in transfer_sets.SETS:
        for way in WAYS:
            if group := groups.get((name, way)):
                scores = [float(row["top1"]) for row in group]
                many = len(scores) > 1
                error = statistics.stdev(scores) / math.sqrt(len(scores)) if many else None
                minutes = statistics.median(float(row["minutes"]) for row in group)
                top1 = statistics.mean(scores)
                found.append(
                    {"set": name, "way": way, "top1": top1, "error": error, "minutes": minutes}
                )
    return found + _means(found)


def _means(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns each way's mean over the sets, of the ways that were measured on all of them."""
    sets = {cell["set"] for cell in cells}
    found = []
    for way in WAYS:
        own = [cell for cell in cells if cell["way"] == way]
        if len(own) < len(sets):
            continue
        errors = [cell["error"] for cell in own]
        pooled = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(own)
        means = {
            field: statistics.mean(cell[field] for cell in own) for field in ("top1", "minutes")
        }
        found.append({"set": "mean", "way": way, "error": pooled, **means})
    return found


def prepare(options: argparse.Namespace) -> None:
    """Converts the weights, for both sides, on first use."""
    options.work.mkdir(parents=True, exist_ok=True)
    model, theirs = options.work / "model", options.work / "torchvision.pth"
    for exists, arguments in (
        (model.is_dir(), [str(options.weights), f"--output={model}"]),
        (theirs.is_file(), [str(model), "--to=torchvision", f"--output={theirs}"]),
    ):
        command_line = [sys.executable, "-m", "convert", *arguments]
        if not exists and subprocess.run(command_line, cwd=HERE.parent).returncode:
            raise UserError(f"--weights={options.weights} cannot be converted: see above")


def run(options: argparse.Namespace) -> None:
    """Measures what the CSV lacks, row by row, and prints the table."""
    prepare(options)
    known = report.read(options.output) if options.output.exists() else []
    done = {tuple(row[field] for field in KEY) for row in _current(known)}
    for name in options.sets:
        for seed in options.seeds:
            for way in options.ways:
                if (name, way, str(seed)) in done:
                    continue
                facts = report.machine()
                row = measure(way, name, seed, options)
                print(f"{name}, {way}, seed {seed}: {row['top1']:.2f}", file=sys.stderr, flush=True)
                facts["versions"] = report.listed_versions(_versions())
                known = report.write(options.output, [row], facts, comparison=KEY)
    report.show(table(_current(known)), COLUMNS)


def _current(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Returns the rows that were measured with as many epochs as now."""
    return [row for row in rows if row["epochs"] == str(epochs_of(row["set"], row["way"]))]


def _versions() -> dict[str, str]:
    from importlib import metadata

    names = ("jax", "flax", "torch", "torchvision", "timm")
    return {name: metadata.version(name) for name in names}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, required=True, metavar="PTH")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"), metavar="DIR")
    parser.add_argument("--sets", help="default: all of " + ", ".join(transfer_sets.SETS))
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument("--ways", help="default: all of " + ", ".join(WAYS))
    parser.add_argument("--output", type=Path, default=HERE / "transfer.csv", metavar="CSV")
    options = parser.parse_args(arguments)
    if not options.weights.is_file():
        raise UserError(f"--weights={options.weights}: there is no such file")
    options.sets = options_lib.chosen("--sets", options.sets, transfer_sets.SETS)
    options.ways = options_lib.chosen("--ways", options.ways, WAYS)
    seeds = options.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds={options.seeds}: give numbers, such as 0,1,2")
    options.seeds = [int(seed) for seed in seeds]
    options.work = options.work.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return options_lib.status(lambda: run(_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
