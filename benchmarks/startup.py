"""The time to a first result: a prediction, or the compiled training step.

    make bench-startup
    python -m benchmarks.startup [--rounds=3] [--output=CSV]
    python -m benchmarks.startup --image-size=96 --rounds=1       # a quick trial

It measures whole commands, from their start to their end, in seconds of wall time, and of the
processor's time on all cores, which other processes on the machine disturb less:

    python         an interpreter that does nothing; all others contain its time
    import main    `import mbv2_jax.main`, with which every training command begins
    import predict `import mbv2_jax.predict`
    import jax     `import mbv2_jax.inference`, with jax
    predict        `python -m mbv2_jax.predict IMAGE --checkpoint=mobilenet_v2_1.0_224`
    torch          torchvision's network with random weights on the same image, eager
    python predict init_model of a model directory, and inference_model of the image
    torch predict  torchvision's network with the same weights from a .pth on the image, eager

and a part of a training run of mobilenet_v2_8xb32_in1k at batch 32, with a CPU device per core:

    compile step   tracing and compiling the training step

`cold` starts with an empty cache folder, `warm` with the one that the cold run filled. The median
of the rounds counts. Files come from the page cache, and Python's modules are compiled to bytecode,
since an uncounted round comes first.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import options as options_lib
from benchmarks import report
from mbv2_jax.errors import UserError
from mbv2_jax.models.variants import VARIANTS, name_of

HERE = Path(__file__).resolve().parent
RECIPE, BATCH = "mobilenet_v2_8xb32_in1k", 32

COLUMNS = (
    report.Column("what", "what"),
    report.Column("cache", "cache"),
    report.Column("seconds", "seconds", ".2f"),
    report.Column("min", "min", ".2f"),
    report.Column("max", "max", ".2f"),
    report.Column("cpu_seconds", "CPU seconds", ".2f"),
)


class Duration(NamedTuple):
    """The seconds that something took.

    Attributes:
      wall: seconds of a clock on the wall.
      cpu: seconds of the processor, those of all cores added.
    """

    wall: float
    cpu: float


def compile_step(image_size: int) -> None:
    """Prints the `Duration` of compiling the training step, with the cache of a run."""
    from mbv2_jax import command_line
    from mbv2_jax.runtime import compilation_cache, cpu
    from mbv2_jax.runtime import mesh as mesh_lib
    from mbv2_jax.training import compile
    from mbv2_jax.training import config as config_lib

    config = command_line.load_config(RECIPE)
    config.batch_size, config.data.image_size = BATCH, image_size
    cpu.use_cores(BATCH, config.model.bn_group_size)
    compilation_cache.enable(config.compilation_cache)
    settings, mesh = config_lib.read(config), mesh_lib.create()
    wall, processor = time.perf_counter(), time.process_time()
    compile.compile_step(settings, mesh)
    print(time.perf_counter() - wall, time.process_time() - processor)


def predict_from_python(model: str, path: str) -> None:
    """Prints the best class of an image, as the README does it."""
    import mbv2_jax

    mbv2_jax.enable_compilation_cache()
    predictor = mbv2_jax.init_model(model)
    print(mbv2_jax.inference_model(predictor, path)["pred_class"])


def predict_with_torch(path: str, image_size: int, weights: str | None = None) -> None:
    """Prints the best classes of an image, as in torchvision's documentation."""
    import torch
    from PIL import Image

    from benchmarks import torch_peer

    transforms = torch_peer.torchvision().transforms
    model = torch_peer.torchvision().models.mobilenet_v2()
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    prepare = transforms.Compose(
        [
            transforms.Resize(int(image_size / 0.875)),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.inference_mode(), Image.open(path) as image:
        print(model(prepare(image.convert("RGB"))[None]).softmax(1).topk(5).indices)


def write_inputs(folder: Path, image_size: int) -> None:
    """Writes what the commands read: noise.jpg, and the same random weights for both networks."""
    import numpy as np
    import torch
    from PIL import Image

    from benchmarks import torch_peer

    pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "noise.jpg")
    torch.save(torch_peer.random_weights(image_size).state_dict(), folder / "torch.pth")
    convert = ["-m", "convert", f"{folder}/torch.pth", f"--output={folder}/model"]
    measure([*convert, f"--set=data.image_size={image_size}"], folder / "first")


def commands(folder: Path, image_size: int) -> dict[tuple[str, str], list[str]]:
    """Returns {(name, state of the cache): Python's arguments} in the order of a round.

    Args:
      folder: where `write_inputs` wrote the image and the weights.
      image_size: the side of the network's input, in pixels.
    """
    image, model, weights = (str(folder / name) for name in ("noise.jpg", "model", "torch.pth"))
    predict = ["-m", "mbv2_jax.predict", image, f"--checkpoint={name_of(1.0, image_size)}"]
    python = _call("predict_from_python", model, image)
    compile_ = _call("compile_step", image_size)
    return {
        ("python", ""): ["-c", "pass"],
        ("import main", ""): ["-c", "import mbv2_jax.main"],
        ("import predict", ""): ["-c", "import mbv2_jax.predict"],
        ("import jax", ""): ["-c", "import mbv2_jax.inference"],
        ("predict", "cold"): predict,
        ("predict", "warm"): predict,
        ("torch", ""): _call("predict_with_torch", image, image_size),
        ("python predict", "cold"): python,
        ("python predict", "warm"): python,
        ("torch predict", ""): _call("predict_with_torch", image, image_size, weights),
        ("compile step", "cold"): compile_,
        ("compile step", "warm"): compile_,
    }


def _call(function: str, *arguments: Any) -> list[str]:
    """Returns Python's arguments that call a function of this module."""
    values = ", ".join(map(repr, arguments))
    return ["-c", f"from benchmarks.startup import {function}; {function}({values})"]


def measure(arguments: Sequence[str], cache: Path) -> Duration:
    """Returns the duration of a command, or the one that it prints where it measures itself."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would take precedence
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # our modules would be compiled at every start
    begin, before = time.perf_counter(), _cpu_seconds_of_children()
    process = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    duration = Duration(time.perf_counter() - begin, _cpu_seconds_of_children() - before)
    if process.returncode:
        line = report.last_line(process.stderr, process.returncode)
        raise UserError(f"python {' '.join(arguments)}: {line}")
    if "compile_step" in arguments[-1]:
        return Duration(*map(float, process.stdout.split()))
    return duration


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(durations: dict[tuple[str, str], list[Duration]]) -> list[dict[str, Any]]:
    """Returns a row for each command: the median, the minimum and the maximum."""
    rows = []
    for (what, cache), values in durations.items():
        wall = [value.wall for value in values]
        rows.append(
            {
                "what": what,
                "cache": cache,
                "seconds": statistics.median(wall),
                "min": min(wall),
                "max": max(wall),
                "cpu_seconds": statistics.median(value.cpu for value in values),
            }
        )
    return rows


def run(options: argparse.Namespace) -> None:
    """Measures every command in turn, prints the table, writes the CSV and draws it."""
    facts = report.machine() | {"rounds": options.rounds, "image_size": options.image_size}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), options.image_size)
        wanted = commands(Path(folder), options.image_size)
        for arguments in wanted.values():
            if "compile_step" not in arguments[-1]:
                measure(arguments, Path(folder, "first"))
        durations: dict[tuple[str, str], list[Duration]] = {name: [] for name in wanted}
        for turn in range(options.rounds):
            for name, arguments in wanted.items():
                # The warm run of a command starts with the cache of its cold run.
                cache = Path(folder, f"{name[0]}-{turn}")
                durations[name].append(measure(arguments, cache))
                what, wall = " ".join(name).strip(), durations[name][-1].wall
                line = f"round {turn + 1} of {options.rounds}: {what}: {wall:.2f} s"
                print(line, file=sys.stderr, flush=True)
    facts["versions"] = report.listed_versions(_versions())
    rows = table(durations)
    report.show(rows, COLUMNS)
    report.write(options.output, rows, facts)
    bars = [
        report.Bar(f"{row['what']} {row['cache']}", row["seconds"], row["min"], row["max"])
        for row in rows
    ]
    note = f"{facts['machine']}; commit {facts['commit']}"
    report.draw(options.output.with_suffix(".png"), {"seconds": bars}, note)


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "torch")}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--image-size", type=int, default=224, metavar="PIXELS", help="default: 224"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "startup.csv",
        metavar="CSV",
        help="default: startup.csv here",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        raise UserError(f"--rounds={options.rounds}: give 1 or more")
    if name_of(1.0, options.image_size) not in VARIANTS:
        whole = [v for v in VARIANTS.values() if v.backbone.width == 1.0]
        sizes = sorted(variant.preprocessing.image_size for variant in whole)
        raise UserError(
            f"--image-size={options.image_size}: give one of {', '.join(map(str, sizes))}"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return options_lib.status(lambda: run(_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
