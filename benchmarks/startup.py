"""The time to a first result: a prediction, or the compiled training step.

    make bench-startup
    python -m benchmarks.startup [--rounds=3] [--output=CSV]
    python -m benchmarks.startup --image-size=96 --rounds=1       # a quick trial

It measures whole commands, from their start to their end, in seconds of wall time:

    python         an interpreter that does nothing; all others contain its time
    import main    `import mbv2_jax.main`, with which every training command begins
    import predict `import mbv2_jax.predict`
    import jax     `import mbv2_jax.inference`, with jax
    predict        `python -m mbv2_jax.predict IMAGE --checkpoint=mobilenet_v2_1.0_224`
    torch          torchvision's network with random weights on the same image, eager

and a part of a training run of mobilenet_v2_8xb32_in1k at batch 32, with a CPU device per core:

    compile step   tracing and compiling the training step

`cold` starts with an empty cache folder, `warm` with the one that the cold run filled. The median
of the rounds counts. Files come from the page cache, since an uncounted round comes first.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
)


def compile_step(image_size: int) -> float:
    """Returns the seconds in which the training step is compiled, with the cache of a run."""
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
    begin = time.perf_counter()
    compile.compile_step(settings, mesh)
    return time.perf_counter() - begin


def predict_with_torch(path: str, image_size: int) -> None:
    """Prints the best classes of an image, as in torchvision's documentation."""
    import torch
    from PIL import Image

    from benchmarks import torch_peer

    transforms = torch_peer.torchvision().transforms
    model = torch_peer.torchvision().models.mobilenet_v2().eval()
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


def commands(image: Path, image_size: int) -> dict[tuple[str, str], list[str]]:
    """Returns {(name, state of the cache): Python's arguments} in the order of a round."""
    predict = ["-m", "mbv2_jax.predict", str(image), f"--checkpoint={name_of(1.0, image_size)}"]
    compile_ = f"from benchmarks.startup import compile_step; print(compile_step({image_size}))"
    torch = (
        f"from benchmarks.startup import predict_with_torch as p; p({str(image)!r}, {image_size})"
    )
    return {
        ("python", ""): ["-c", "pass"],
        ("import main", ""): ["-c", "import mbv2_jax.main"],
        ("import predict", ""): ["-c", "import mbv2_jax.predict"],
        ("import jax", ""): ["-c", "import mbv2_jax.inference"],
        ("predict", "cold"): predict,
        ("predict", "warm"): predict,
        ("torch", ""): ["-c", torch],
        ("compile step", "cold"): ["-c", compile_],
        ("compile step", "warm"): ["-c", compile_],
    }


def measure(arguments: Sequence[str], cache: Path) -> float:
    """Returns the seconds of a command, or those that it prints where it measures itself."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would take precedence
    begin = time.perf_counter()
    process = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    seconds = time.perf_counter() - begin
    if process.returncode:
        line = report.last_line(process.stderr, process.returncode)
        raise UserError(f"python {' '.join(arguments)}: {line}")
    return float(process.stdout) if "compile_step" in arguments[-1] else seconds


def table(seconds: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """Returns a row for each command: the median, the minimum and the maximum."""
    return [
        {
            "what": what,
            "cache": cache,
            "seconds": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
        for (what, cache), values in seconds.items()
    ]


def run(options: argparse.Namespace) -> None:
    """Measures every command in turn, prints the table, writes the CSV and draws it."""
    import numpy as np
    from PIL import Image

    facts = report.machine() | {"rounds": options.rounds, "image_size": options.image_size}
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
        image = Path(folder, "noise.jpg")
        Image.fromarray(pixels).save(image)
        wanted = commands(image, options.image_size)
        for arguments in wanted.values():
            if "compile_step" not in arguments[-1]:
                measure(arguments, Path(folder, "first"))
        seconds: dict[tuple[str, str], list[float]] = {name: [] for name in wanted}
        for turn in range(options.rounds):
            for name, arguments in wanted.items():
                # The warm run of a command starts with the cache of its cold run.
                cache = Path(folder, f"{name[0]}-{turn}")
                seconds[name].append(measure(arguments, cache))
                what = " ".join(name).strip()
                line = f"round {turn + 1} of {options.rounds}: {what}: {seconds[name][-1]:.2f} s"
                print(line, file=sys.stderr, flush=True)
    facts["versions"] = report.listed_versions(_versions())
    rows = table(seconds)
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
