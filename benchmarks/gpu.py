"""Images per second on one NVIDIA GPU: this package beside torch and timm; its depthwise layers.

    make bench-gpu
    python -m benchmarks.gpu [--parts=training,inference,depthwise,flags] [--ways=ours,torch]
    python -m benchmarks.gpu --device=cpu --image-size=32 --batch=2 --rounds=1 --seconds=0.01

The last command tries everything out without a GPU. The network is MobileNetV2 1.0 with 1000
classes at 224 pixels, in bfloat16 (torch: autocast) and in float32 with TF32, XLA's default there:

    training     batch 128, 256, 512 and 1024; SGD with momentum and weight decay, no dropout
    inference    batch 1, 32 and 256; each step is waited for
    depthwise    the 17 depthwise convolutions, batch 128, bfloat16: XLA's grouped convolution
                 (cuDNN) beside the shifted sums of the CPU lowering and a Triton kernel
                 (triton_depthwise.py); forward and both gradients
    flags        our training step, batch 256, bfloat16, under XLA's options, one at a time

The ways of training and inference are

    ours           the folded network; the step of a training run
    torch          torchvision's network in channels-last memory, eager
    torch-compile  the same under torch.compile with mode max-autotune
    timm           timm's mobilenetv2_100, in channels-last memory, eager

Images are on the GPU already. Each way is a process of its own. They run one after another, each
measures --rounds times, and the median counts; ratios are ratios of medians. Memory is the peak of
the library's allocator. Weights are random: tests/parity compares the networks' outputs, and
benchmarks/cpu.py compares them before it measures.

"share" is the used part of the memory bandwidth: the bytes that must at least be read and written,
divided by the time and by --bandwidth, or by the rate of a copy of 1 GiB. A training step needs 107
MB per image in bfloat16 and 214 in float32 at 224 pixels; a depthwise layer its input and output.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_peers, report
from benchmarks import options as options_lib
from benchmarks.gpu_peers import DIRECTIONS, DTYPES, LOWERINGS, NETWORKS, Layer
from mbv2_jax.errors import UserError

HERE = Path(__file__).resolve().parent

BATCHES = {
    "training": (128, 256, 512, 1024),
    "inference": (1, 32, 256),
    "depthwise": (128,),
    "flags": (256,),
}
# XLA's options for the part "flags"; "ours" has none.
FLAGS = {
    "ours": "",
    "nhwc": "--xla_gpu_force_conv_nhwc=true",
    "conv-fusion": "--xla_gpu_experimental_enable_conv_fusion=true",
    "no-triton-gemm": "--xla_gpu_enable_triton_gemm=false",
    "all-tilings": "--xla_gpu_exhaustive_tiling_search=true",
    "latency-hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no-command-buffers": "--xla_gpu_enable_command_buffer=",
}
SIZES = {"bfloat16": 2, "float32": 4}  # bytes

# Bytes per image at 224 pixels: each activation of a training step, as often as it must cross
# between chip and memory.
TRAINING_BYTES = {"bfloat16": 107e6, "float32": 214e6}

# The fields in which rows agree that were compared with one another.
COMPARISON = ("part", "task", "layer", "batch", "image_size", "dtype", "device")
COLUMNS = (*report.RATES[:-2], report.Column("share", "share", ".0%"), *report.RATES[-2:])


def measure(way: str, options: argparse.Namespace, **job: Any) -> dict[str, Any]:
    """Runs one way and returns the answer of gpu_peers.py.

    A way of FLAGS is ours with these options of XLA.
    """
    fields = {"device": options.device, "image_size": options.image_size, **job}
    fields |= {"rounds": options.rounds, "seconds": options.seconds}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
    if way in FLAGS:
        given = os.environ.get("XLA_FLAGS", "")
        way, environment["XLA_FLAGS"] = "ours", f"{given} {FLAGS[way]}".strip()
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_peers", way, *flags],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    if process.returncode:
        return {"missing": report.last_line(process.stderr, process.returncode)}
    return json.loads(process.stdout.splitlines()[-1])


def compare(
    ways: Sequence[str], floor: float | None, options: argparse.Namespace, **job: Any
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measures ways at the same job; returns their rows, and the packages' versions.

    Args:
      ways: names of gpu_peers.py.
      floor: the least seconds of a step that memory allows; None where they are not known.
      options: of the command line.
      job: fields of gpu_peers.Job.
    """
    results = {}
    for way in ways:
        print(f"{_words(job)}: {way}", file=sys.stderr, flush=True)
        result = measure(way, options, **job)
        if "missing" in result:
            print(f"left out: {way}: {result['missing']}", file=sys.stderr, flush=True)
        else:
            results[way] = result
    seconds = {way: result["seconds"] for way, result in results.items()}
    rows = [
        row | shares(floor, seconds[row["way"]]) | {"peak_mib": results[row["way"]]["peak_mib"]}
        for row in report.rates(seconds, job["batch"])
    ]
    versions = {n: v for result in results.values() for n, v in result["versions"].items()}
    return rows, versions


def shares(floor: float | None, seconds: Sequence[float]) -> dict[str, float | None]:
    """Returns {"share": the used part of the bandwidth}; None where `floor` is not known."""
    return {"share": floor and floor / statistics.median(seconds)}


def layer_bytes(layer: Layer, batch: int, dtype: str) -> int:
    """Returns the bytes of a depthwise layer's input and output, which each direction moves."""
    side = -(-layer.size // layer.stride)
    return batch * layer.channels * (layer.size**2 + side**2) * SIZES[dtype]


def networks(part: str, bandwidth: float, options: argparse.Namespace) -> Any:
    """Yields rows and versions for training, inference or flags, one comparison at a time."""
    ways, dtypes = (list(FLAGS), DTYPES[:1]) if part == "flags" else (options.ways, DTYPES)
    task = "inference" if part == "inference" else "training"
    for dtype in dtypes:
        for batch in options.batches or BATCHES[part]:
            floor = None
            if task == "training":
                scale = (options.image_size / 224) ** 2
                floor = scale * batch * TRAINING_BYTES[dtype] / bandwidth
            job = {"task": task, "batch": batch, "dtype": dtype}
            rows, versions = compare(ways, floor, options, **job)
            yield [job | {"part": part, "layer": ""} | row for row in rows], versions


def depthwise(bandwidth: float, options: argparse.Namespace) -> Any:
    """Yields rows and versions for each distinct depthwise layer in each direction."""
    layers = gpu_peers.depthwise_layers(options.image_size)
    for batch in options.batches or BATCHES["depthwise"]:
        for layer in dict.fromkeys(layers):
            name = f"{layer.size}x{layer.size}x{layer.channels}/{layer.stride}"
            floor = layer_bytes(layer, batch, DTYPES[0]) / bandwidth
            for direction in DIRECTIONS:
                job = {"task": direction, "batch": batch, "dtype": DTYPES[0]}
                rows, versions = compare(
                    list(LOWERINGS), floor, options, layer=layers.index(layer), **job
                )
                facts = {"part": "depthwise", "layer": name, "of_17": layers.count(layer)}
                yield [job | facts | row for row in rows], versions


def run(options: argparse.Namespace) -> None:
    """Measures the requested parts; prints and writes each table as soon as it is complete."""
    copied = measure("copy", options)
    if "missing" in copied:
        raise UserError(copied["missing"])
    moved = 2 * gpu_peers.COPIED[options.device] / statistics.median(copied["seconds"])
    bandwidth = 1e9 * options.bandwidth if options.bandwidth else moved
    print(f"{copied['device']}: a copy moves {moved / 1e9:.0f} GB/s")
    facts = report.machine() | {"rounds": options.rounds, "seconds": options.seconds}
    facts |= {"gb_per_s": bandwidth / 1e9}
    note = f"{copied['device']}; commit {facts['commit']}"
    where = {"image_size": options.image_size, "device": copied["device"], "of_17": ""}
    held: list[dict[str, str]] = []
    for part in options.parts:
        measured = (
            depthwise(bandwidth, options)
            if part == "depthwise"
            else networks(part, bandwidth, options)
        )
        for rows, versions in measured:
            if not rows:
                continue
            rows = [where | row for row in rows]
            print(f"\n{_words(rows[0])}")
            report.show(rows, COLUMNS)
            facts["versions"] = report.listed_versions(versions)
            held = report.write(options.output, rows, facts, COMPARISON)
            draw(options.output.with_suffix(".png"), held, note)
    if not held:
        raise UserError("nothing could be measured; see the lines above")


def draw(path: Path, rows: Sequence[Mapping[str, str]], note: str) -> None:
    """Draws the rows of a CSV, a panel for each comparison."""
    panels: dict[str, list[report.Bar]] = {}
    for row in rows:
        figures = (float(row[name]) for name in ("images_per_second", "min", "max"))
        panels.setdefault(_words(row), []).append(report.Bar(row["way"], *figures))
    report.draw(path, panels, f"images per second; {note}", columns=3)


def _words(row: Mapping[str, Any]) -> str:
    layer = f" {row['layer']}" if row.get("layer", "") != "" else ""
    flags = ", XLA's options" if row.get("part") == "flags" else ""
    return f"{row['task']}{layer}, batch {row['batch']}, {row['dtype']}{flags}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", metavar="PART,...", help=f"only these of {', '.join(BATCHES)}")
    add("--ways", metavar="WAY,...", help=f"only these of {', '.join(NETWORKS)}")
    add("--batch", metavar="N,...", help="images per step, in place of the above")
    add("--image-size", type=int, default=224, metavar="PIXELS", help="default: 224")
    add("--bandwidth", type=float, metavar="GB/S", help="of the memory; default: that of a copy")
    add("--device", choices=gpu_peers.COPIED, default="gpu", help="default: gpu")
    add("--rounds", type=int, default=5, help="default: 5")
    add("--seconds", type=float, default=0.5, help="per measurement; default: 0.5")
    default = HERE / "gpu.csv"
    add("--output", type=Path, default=default, metavar="CSV", help="default: gpu.csv here")
    options = parser.parse_args(arguments)
    options.parts = options_lib.chosen("--parts", options.parts, BATCHES)
    options.ways = options_lib.chosen("--ways", options.ways, NETWORKS)
    options.batches = options_lib.counts("--batch", options.batch)
    if min(options.rounds, options.image_size) < 1:
        raise UserError("--rounds and --image-size: give 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return options_lib.status(lambda: run(_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
