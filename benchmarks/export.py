"""Exported files of MobileNetV2 1.0 beside torch's own export of torchvision's network.

    make bench-export WEIGHTS=PTH PHOTOS=DIR
    python -m benchmarks.export --weights=PTH --photos=DIR [--turns=15] [--ways=ours-onnx,...]

For every way to run one picture of 224 pixels, it measures milliseconds on one thread and on all,
the size of the file, and the share of photos that get the same class as in JAX:

    ours-onnx, torch-onnx              ONNX Runtime
    ours-openvino, torch-openvino      the same files in OpenVINO, in float32
    ours-litert-float32, ...-float16, ...-int8      LiteRT with XNNPACK
    ours-stablehlo                     jax; on all threads alone
    ours-jax                           this package, without a file; on all threads alone
    ours-web                           the page of --to=web in Chromium; on one thread alone

Files of ours take pixels and normalise them; torch's takes floats, whose normalisation is not
counted. Both have the weights of PTH, torchvision's or mmpretrain's. Half of the photos, at most
100, calibrate the 8-bit file; the others, at most 100, are compared. In a turn each way runs its
picture eight times, of which the first two do not count; the medians of all turns are shown.
"""

import argparse
import base64
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import options as options_lib
from benchmarks import report
from mbv2_jax.errors import UserError
from mbv2_jax.export import formats, photos
from mbv2_jax.export.formats import FLOAT16, FLOAT32, INT8, Options
from mbv2_jax.export.program import Program
from mbv2_jax.export.stablehlo import load_exported

HERE = Path(__file__).resolve().parent
LITERT = {f"ours-litert-{precision}": precision for precision in (FLOAT32, FLOAT16, INT8)}
WAYS = (
    *("ours-onnx", "torch-onnx", "ours-openvino", "torch-openvino"),
    *LITERT,
    *("ours-stablehlo", "ours-jax", "ours-web"),
)
OF_JAX = ("ours-stablehlo", "ours-jax")  # which leaves the number of threads to XLA
RUNS, WARMING = 8, 2  # of a turn
MOST_PHOTOS = 100
COLUMNS = (
    report.Column("way", "way"),
    report.Column("threads", "threads", "d"),
    report.Column("ms", "ms", ".2f"),
    report.Column("min", "min", ".2f"),
    report.Column("max", "max", ".2f"),
    report.Column("megabytes", "MB", ".2f"),
    report.Column("agreement", "same class, %", ".1f"),
)


class Way(NamedTuple):
    """A way to run the network.

    Attributes:
      file: that it runs; None where there is none.
      classes: photos (N, 224, 224, 3) uint8 -> their most probable classes (N,).
      seconds: the first photo -> the seconds of RUNS runs.
    """

    file: Path | None
    classes: Callable[[np.ndarray], np.ndarray]
    seconds: Callable[[np.ndarray], list[float]]


def python_way(
    file: Path | None,
    run: Callable[[np.ndarray], np.ndarray],
    prepare: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Way:
    """Returns a way that runs in this process.

    Args:
      file: that it runs.
      run: prepared images -> logits (1, 1000).
      prepare: (1, 224, 224, 3) uint8 -> what the file takes; its time does not count.
    """

    def seconds(photo: np.ndarray) -> list[float]:
        prepared = prepare(photo[None])
        found = []
        for _ in range(RUNS):
            start = time.perf_counter()
            run(prepared)
            found.append(time.perf_counter() - start)
        return found

    def classes(images: np.ndarray) -> np.ndarray:
        return np.array([run(prepare(image[None])).argmax() for image in images])

    return Way(file, classes, seconds)


def write_files(program: Program, calibration: np.ndarray, weights: Path, folder: Path) -> None:
    """Writes the files of all ways but the page's."""
    for name, options in {
        "ours.onnx": Options(),
        "ours.stablehlo": Options(),
        **{f"{way}.tflite": Options(precision) for way, precision in LITERT.items()},
    }.items():
        if options.precision == INT8:
            options = Options(INT8, calibration)
        kind = "litert" if name.endswith(".tflite") else name.removeprefix("ours.")
        formats.find(kind).load("this benchmark").write(program, folder / name, options)
    _write_torchs(weights, folder)


def _write_torchs(weights: Path, folder: Path) -> None:
    """Writes torch.onnx, torch's export of torchvision's network with the same weights."""
    import torch

    from benchmarks import torch_peer

    there = folder / "torchvision.pth"
    convert = ["-m", "convert", str(weights), "--to=torchvision", f"--output={there}"]
    done = subprocess.run([sys.executable, *convert], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--weights: {report.last_line(done.stderr, done.returncode)}")
    model = torch_peer.network(there).eval()
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, 224, 224),),
        folder / "torch.onnx",
        input_names=["images"],
        dynamo=False,
    )


def opened(way: str, program: Program, folder: Path, threads: int) -> Way:
    """Opens the file of a way that runs in Python.

    Args:
      way: its name.
      program: as which the file was written.
      folder: of the files.
      threads: of the runtime.
    """
    normalize = program.saved.spec.preprocessing.normalize

    def nchw(images: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(normalize(images).transpose(0, 3, 1, 2))

    if way in ("ours-onnx", "torch-onnx"):
        import onnxruntime

        file = folder / way.replace("-", ".")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        prepare = nchw if way == "torch-onnx" else np.asarray
        return python_way(file, lambda images: session.run(None, {"images": images})[0], prepare)
    if way.endswith("-openvino"):
        import openvino

        file = folder / way.replace("-openvino", ".onnx")
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.compile_model(file, "CPU", hints)
        prepare = nchw if way.startswith("torch") else np.asarray
        return python_way(file, lambda images: compiled(images)[0], prepare)
    if way == "ours-jax":
        run = jax.jit(program)
        return python_way(None, lambda images: np.asarray(run(images)["logits"]))
    if way == "ours-stablehlo":
        file = folder / "ours.stablehlo"
        exported = load_exported(file)
        return python_way(file, lambda images: np.asarray(exported(images)["logits"]))
    return _in_litert(folder / f"{way}.tflite", threads)


def _in_litert(file: Path, threads: int) -> Way:
    """Opens a .tflite file without the conveniences that take a twentieth of an 8-bit network."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (found,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(found["index"])

    return python_way(file, run)


# Runs in the page: a function of pictures in base64, and of the number of runs of the first.
IN_PAGE = """(async (pictures, runs) => {
  const { load } = await import(new URL("predict.js", location.href).href);
  window.model ??= await load();
  const classes = [], milliseconds = [];
  for (const text of pictures) {
    const data = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const picture = { width: 224, height: 224, data };
    const { logits } = await window.model.run(picture);
    classes.push(logits.data.indexOf(Math.max(...logits.data)));
    for (let run = 0; run < (classes.length > 1 ? 0 : runs); run++) {
      const start = performance.now();
      await window.model.run(picture);
      milliseconds.push(performance.now() - start);
    }
  }
  return { classes, milliseconds };
})"""


@contextlib.contextmanager
def in_browser(program: Program, folder: Path) -> Iterator[Way]:
    """Yields the way through Chromium."""
    from tests.support import browser

    formats.find("web").load("this benchmark").write(program, folder / "web", Options())
    with browser.started() as chromium, browser.served(folder / "web") as address:
        chromium.open(address)

        def run(images: np.ndarray, runs: int) -> Any:
            pictures = [base64.b64encode(image.tobytes()).decode() for image in images]
            return chromium.evaluate(f"{IN_PAGE}({json.dumps(pictures)}, {runs})")

        yield Way(
            folder / "web" / "model.onnx",
            lambda images: np.array(run(images, 0)["classes"]),
            lambda photo: [ms / 1000 for ms in run(photo[None], RUNS)["milliseconds"]],
        )


def measure(ways: dict[str, Way], photo: np.ndarray, turns: int) -> dict[str, list[float]]:
    """Returns the seconds of the runs of each way, in turns, by the names of `ways`."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name, way in ways.items():
            seconds[name] += way.seconds(photo)[WARMING:]
        print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    return seconds


def rows(
    ways: dict[str, Way],
    seconds: dict[str, list[float]],
    threads: int,
    images: np.ndarray,
    expected: np.ndarray,
) -> list[dict[str, Any]]:
    """Returns a row for each way; min and max are the 10th and the 90th percentile."""
    found = []
    for name, way in ways.items():
        low, *_, high = statistics.quantiles(seconds[name], n=10)
        found.append(
            {
                "way": name,
                "threads": threads,
                "ms": 1000 * statistics.median(seconds[name]),
                "min": 1000 * low,
                "max": 1000 * high,
                "megabytes": way.file.stat().st_size / 1e6 if way.file else None,
                "agreement": 100 * float((way.classes(images) == expected).mean()),
            }
        )
    return found


def run(options: argparse.Namespace) -> None:
    """Measures every way, prints the table, writes the CSV and draws it."""
    from mbv2_jax import inference

    program = Program(inference.open_model(options.weights, seed=0), 1)
    every = photos.load(program, [options.photos], "--photos")
    if len(every) < 2:
        raise UserError(f"--photos={options.photos}: give two photos or more")
    calibration, images = every[::2][:MOST_PHOTOS], every[1::2][:MOST_PHOTOS]
    logits = jax.jit(program)
    expected = np.array([logits(image[None])["logits"].argmax() for image in images])
    facts = report.machine() | {"vnni": _has_vnni(), "photos": len(images), "turns": options.turns}
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(program, calibration, Path(options.weights), folder)
        cores = os.cpu_count() or 1
        for threads in dict.fromkeys((1, cores)):
            with contextlib.ExitStack() as stack:
                ways = {}
                for way in options.ways:
                    if way == "ours-web" and threads == 1 and _has_browser():
                        ways[way] = stack.enter_context(in_browser(program, folder))
                    elif way != "ours-web" and (way not in OF_JAX or threads == cores):
                        ways[way] = opened(way, program, folder, threads)
                seconds = measure(ways, images[0], options.turns)
                table += rows(ways, seconds, threads, images, expected)
    names = ("jax", "torch", "onnxruntime", "openvino", "ai-edge-litert")
    versions = {name: metadata.version(name) for name in names}
    facts["versions"] = report.listed_versions(versions)
    report.show(table, COLUMNS)
    report.write(options.output, table, facts)
    panels = {
        f"milliseconds, {threads} thread{'s' if threads > 1 else ''}": [
            report.Bar(row["way"], row["ms"], row["min"], row["max"])
            for row in table
            if row["threads"] == threads
        ]
        for threads in dict.fromkeys(row["threads"] for row in table)
    }
    note = f"{facts['machine']}, VNNI: {facts['vnni']}; commit {facts['commit']}"
    report.draw(options.output.with_suffix(".png"), panels, note)


def _has_vnni() -> str:
    """Returns "yes" where the processor multiplies 8-bit numbers in one instruction."""
    path = Path("/proc/cpuinfo")
    return "yes" if path.exists() and "vnni" in path.read_text() else "no"


def _has_browser() -> bool:
    """Returns whether there is what runs the page; says what is missing."""
    wanted = (os.environ.get("CHROMIUM") or "chromium", "node", "npm")
    missing = [name for name in wanted if shutil.which(name) is None]
    if missing:
        print(f"left out: ours-web, without {' and '.join(missing)}", file=sys.stderr)
    return not missing


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights", required=True, metavar="PTH", help="of MobileNetV2 1.0 with ImageNet's classes"
    )
    parser.add_argument("--photos", required=True, metavar="DIR", help="a folder of photos")
    parser.add_argument("--turns", type=int, default=15, help="default: 15")
    parser.add_argument("--ways", metavar="NAME,...", help="default: all of the above")
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "export.csv",
        metavar="CSV",
        help="default: export.csv here",
    )
    options = parser.parse_args(arguments)
    if options.turns < 1:
        raise UserError(f"--turns={options.turns}: give 1 or more")
    options.ways = options_lib.chosen("--ways", options.ways, WAYS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return options_lib.status(lambda: run(_options(arguments)))


if __name__ == "__main__":
    sys.exit(main())
