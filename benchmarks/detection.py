"""The share of matching, mining and non-maximum suppression in the time of SSDLite, on this CPU.

    make bench-detection
    python -m benchmarks.detection [--batch=8] [--steps=9] [--output=CSV]
    python -m benchmarks.detection --batch=1 --steps=1 --image-size=96     # a quick trial

The network is mmdet's, with 80 classes, on images of noise with 20 objects each:

    network       inference of one image, batch normalisation folded, to logits and codes
    detections    from these to at most 200 detections: softmax, decoding, suppression. The logits
                  are random, so that some thousand pairs of a box and a class are above the
                  threshold, and 200 are found: more work than a picture makes
    step          a training step
    losses        matching, mining, both losses and their gradients by the logits and codes

The ways take turns, and the median counts. `share` is that of the network, or of the step.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import options as options_lib
from benchmarks import report
from mbv2_jax.configs import default
from mbv2_jax.errors import UserError
from mbv2_jax.inference import init_variables
from mbv2_jax.models.ssdlite import Outputs
from mbv2_jax.ops import lowering
from mbv2_jax.runtime import cpu
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.tasks.task import Task
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program as program_lib

HERE = Path(__file__).resolve().parent
CLASSES, OBJECTS = 80, 20
WHOLE = {"detections": "network", "losses": "step"}  # of which each is a share

COLUMNS = (
    report.Column("what", "what"),
    report.Column("batch", "batch", "d"),
    report.Column("ms", "ms", ".2f"),
    report.Column("min", "min", ".2f"),
    report.Column("max", "max", ".2f"),
    report.Column("share", "share", ".1%"),
)


def make_config(batch: int, image_size: int) -> Any:
    """Returns the config of the network that is measured."""
    config = default.get_config("detection")
    config.batch_size, config.data.image_size = batch, image_size
    config.model.update(num_classes=CLASSES, bn_epsilon=1e-3, bn_momentum=0.97)
    return config


def make_batch(task: Task, batch: int, size: int) -> dict[str, np.ndarray]:
    """Returns images of noise with OBJECTS boxes each."""
    rng = np.random.default_rng(0)
    spec = task.batch_spec((size, size))
    arrays = {name: np.zeros((batch, *each.shape), each.dtype) for name, each in spec.items()}
    low, sides = (
        rng.uniform(0, 0.7, (batch, OBJECTS, 2)),
        rng.uniform(0.1, 0.3, (batch, OBJECTS, 2)),
    )
    arrays["image"] = rng.integers(0, 256, arrays["image"].shape, np.uint8)
    arrays["boxes"][:, :OBJECTS] = size * np.concatenate([low, low + sides], -1)
    arrays["labels"][:] = -1
    arrays["labels"][:, :OBJECTS] = rng.integers(0, CLASSES, (batch, OBJECTS))
    return arrays


def crowded(outputs: Outputs) -> Outputs:
    """Returns outputs with random logits and codes, of which many are worth a detection."""
    rng = np.random.default_rng(0)
    logits, codes = (
        tuple(jnp.asarray(scale * rng.standard_normal(part.shape), part.dtype) for part in parts)
        for parts, scale in ((outputs.logits, 1.5), (outputs.codes, 1.0))
    )
    return outputs._replace(logits=logits, codes=codes)


def ways(batch: int, image_size: int) -> dict[str, Callable[[], Any]]:
    """Returns what is measured: functions that return arrays of jax."""
    config = make_config(batch, image_size)
    settings = config_lib.read(config)
    spec, task = config_lib.resolve(settings, None)
    network = task.network(spec.backbone, config_lib.on_devices(spec.mode, batch, 1))
    variables = init_variables(network, jax.random.key(0))
    arrays = make_batch(task, batch, image_size)

    folded = task.network(spec.backbone, spec.mode, folded=True)
    params = task.fold(variables["params"], variables["batch_stats"], spec.backbone)
    forward = jax.jit(lambda images: folded.apply({"params": params}, images))
    image = jnp.asarray(spec.preprocessing.normalize(arrays["image"][:1]))
    outputs = crowded(forward(image))
    detect = jax.jit(task.postprocess)

    mesh = mesh_lib.create()
    program = program_lib.build(settings, spec, task, mesh, 1000, 100_000)
    state, key = program.restart(variables), jax.random.key(0)
    on_devices = jax.device_put(arrays, mesh_lib.split(mesh))

    def step() -> Any:
        nonlocal state
        state, metrics = program.step(state, on_devices, key)
        return metrics

    trained = jax.device_put(
        jax.tree.map(lambda part: np.repeat(part, batch, 0), outputs), mesh_lib.split(mesh)
    )
    losses = jax.jit(jax.grad(lambda found: task.loss(found, on_devices)[0]))
    return {
        "network": lambda: forward(image),
        "detections": lambda: detect(outputs),
        "step": step,
        "losses": lambda: losses(trained),
    }


def measure(found: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Returns the seconds that each way took in each turn, without the first."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(turns + 1):
        for name, run in found.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]], batch: int) -> list[dict[str, Any]]:
    """Returns a row for each way."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "what": name,
            "batch": batch if name in ("step", "losses") else 1,
            "ms": 1000 * median[name],
            "min": 1000 * min(values),
            "max": 1000 * max(values),
            "share": median[name] / median[WHOLE[name]] if name in WHOLE else None,
        }
        for name, values in seconds.items()
    ]


def run(options: argparse.Namespace) -> None:
    """Measures, prints the table and writes the CSV."""
    cpu.use_cores(options.batch, 0)
    with lowering.lowering_for("cpu"):
        seconds = measure(ways(options.batch, options.image_size), options.steps)
    rows = table(seconds, options.batch)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    facts = report.machine() | {
        "image_size": options.image_size,
        "steps": options.steps,
        "versions": report.listed_versions(versions),
    }
    report.show(rows, COLUMNS)
    report.write(options.output, rows, facts)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=8, help="of training; default: 8")
    parser.add_argument("--steps", type=int, default=9, help="turns of each way; default: 9")
    parser.add_argument(
        "--image-size", type=int, default=320, metavar="PIXELS", help="default: 320"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "detection.csv",
        metavar="CSV",
        help="default: detection.csv here",
    )
    options = parser.parse_args(arguments)
    for name in ("batch", "steps", "image_size"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}={getattr(options, name)}: give 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return options_lib.status(lambda: run(_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
