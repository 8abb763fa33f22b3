"""The comparison of a written file with JAX on photos."""

import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mbv2_jax.errors import RunFailed
from mbv2_jax.export.formats import FLOAT16, FLOAT32, Format, Options
from mbv2_jax.export.program import Program

# The largest difference from JAX: of float32, after its rounding at 6e-8 went through 60 layers; of
# float16, which rounds at 5e-4. Differences are absolute, and relative where an array is above 1.
BOUNDS = {FLOAT32: 1e-3, FLOAT16: 0.1}
# The least share of predictions that an 8-bit file has in common with JAX.
LEAST_AGREEMENT = {"classes": 0.9, "pixels": 0.9, "boxes": 0.8}
_RUNS = 9  # that are timed


@dataclasses.dataclass(frozen=True)
class Report:
    """The comparison of a file with JAX, its size and its speed.

    Attributes:
      file: its path.
      format, precision: as on the command line.
      bytes: its size.
      operators: their number by kind, the most frequent first.
      photos: the number of images that it was run on.
      difference: the largest difference from JAX of each output.
      agreement: the share of `unit` with the same prediction as JAX's, 0 to 1; None where there is
        nothing to compare, as without a box.
      metadata: of the file, see `export.metadata`.
      not_run: why the file was not run, and not compared; "" if it was.
      unit: "classes", "pixels" or "boxes".
      milliseconds: medians for one image: of the file, of JAX, and of the float32 file.
    """

    file: str
    format: str
    precision: str
    bytes: int
    operators: dict[str, int]
    photos: int
    difference: dict[str, float]
    agreement: float | None
    unit: str
    milliseconds: dict[str, float]
    metadata: dict[str, Any]
    not_run: str = ""

    def check(self) -> None:
        """Raises RunFailed if the file was run, and is beyond the bound of its precision."""
        if self.not_run:
            return
        bound = BOUNDS.get(self.precision)
        worst = max(self.difference, key=lambda name: self.difference[name])
        if bound is not None and not self.difference[worst] <= bound:
            raise RunFailed(
                f"{self.file} was deleted: its {worst} are up to {self.difference[worst]:.3g} from "
                f"JAX's, and {bound:g} is the bound for {self.precision}"
            )
        least = LEAST_AGREEMENT[self.unit]
        if bound is None and self.agreement is not None and not self.agreement >= least:
            raise RunFailed(
                f"{self.file} was deleted: {self.agreement:.1%} of its {self.unit} are JAX's, and "
                f"{least:.0%} is the bound for {self.precision}: calibrate with more photos of the "
                "kind that it will see, train with model.quantize='int8', or keep layers in floats "
                "with --keep-float"
            )


def make(
    program: Program,
    path: pathlib.Path,
    name: str,
    format_: Format,
    precision: str,
    images: np.ndarray,
) -> Report:
    """Runs a file on images, and compares it with JAX.

    A smaller number format is timed beside the float32 file, which is written for that.

    Args:
      program: that was written.
      path: the file.
      name, format_: its format.
      precision: of the file.
      images: (M, H, W, 3), as the program takes them.
    """
    runner = format_.load(f"running {path}").open_file(path)
    same = functools.partial(
        Report,
        file=os.fspath(path),
        format=name,
        precision=precision,
        bytes=_size(path),
        operators=dict(sorted(runner.operators.items(), key=lambda item: (-item[1], item[0]))),
        unit=program.task.agree_on,
        metadata=dict(runner.metadata),
    )
    if runner.not_run:
        return same(
            photos=0, difference={}, agreement=None, milliseconds={}, not_run=runner.not_run
        )
    rows = program.batch or 1
    run = jax.jit(program)
    theirs = _in_batches(runner, images, rows)
    ours = _in_batches(lambda batch: jax.device_get(run(batch)), images, rows)
    difference = {
        key: float((abs(theirs[key] - ours[key]) / np.maximum(1, abs(ours[key]))).max())
        for key in ours
    }
    task = program.task
    predict = jax.jit(lambda arrays: task.from_exported(arrays, program.size))
    found, total = task.agreement(*(jax.device_get(predict(arrays)) for arrays in (theirs, ours)))
    first = images[:1].repeat(rows, 0)
    times = {"file": _milliseconds(lambda: jax.block_until_ready(runner(first)), rows)}
    times["jax"] = _milliseconds(lambda: jax.block_until_ready(run(first)), rows)
    if precision != FLOAT32:
        writer, beside = format_.load(f"running {path}"), path.with_name(f"float32_{path.name}")
        writer.write(program, beside, Options())
        plain = writer.open_file(beside)
        times["float32"] = _milliseconds(lambda: jax.block_until_ready(plain(first)), rows)
    return same(
        photos=len(images),
        difference=difference,
        agreement=found / total if total else None,
        milliseconds=times,
    )


def text(report: Report) -> str:
    """Returns a report as lines for a person."""
    facts = report.metadata
    height, width = facts["image_size"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.operators.items())
    shapes = ", ".join(f"{name} {shape}" for name, (shape, _) in facts["outputs"].items())
    return "\n".join(
        [
            f"wrote        {report.file}, {report.bytes / 1e6:.2f} MB",
            f"input        {facts['input']} RGB of {width}x{height}; {_normalisation(facts)}",
            f"before it    {facts['eval_transforms']} (not in the file: the caller's part)",
            f"outputs      {shapes}",
            f"operators    {kinds}",
            *_comparison(report),
        ]
    )


def _comparison(report: Report) -> list[str]:
    if report.not_run:
        return [f"not run      {report.not_run}: nothing was compared with JAX"]
    differences = ", ".join(f"{name} {value:.2g}" for name, value in report.difference.items())
    times = ", ".join(f"{name} {value:.1f}" for name, value in report.milliseconds.items())
    agreement = f"no {report.unit} to compare"
    if report.agreement is not None:
        agreement = f"{report.agreement:.2%} of {report.unit}"
    return [
        f"from JAX     at most {differences}, on {report.photos} images",
        f"agreement    {agreement}",
        f"milliseconds {times}; one image, medians of {_RUNS}",
    ]


def _normalisation(facts: Mapping[str, Any]) -> str:
    if facts["input"] == "normalised":
        return f"(pixel - {facts['mean']}) / {facts['std']} is the caller's part"
    return "0-255, normalised inside"


def _in_batches(
    function: Callable[[np.ndarray], Mapping[str, np.ndarray]], images: np.ndarray, rows: int
) -> dict[str, np.ndarray]:
    """Returns the outputs of a function for images that go through it `rows` at a time."""
    parts = []
    for start in range(0, len(images), rows):
        batch = images[start : start + rows]
        whole = np.concatenate([batch, batch[:1].repeat(rows - len(batch), 0)])
        parts.append({name: array[: len(batch)] for name, array in function(whole).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _milliseconds(run: Callable[[], Any], rows: int) -> float:
    """Returns the median time of a run for each of its images, after one to warm up."""
    run()
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / rows


def _size(path: pathlib.Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    return path.stat().st_size
