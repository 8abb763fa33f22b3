"""Web pages: a folder that any static server serves, in which a browser runs the model.

page/               the page: index.html, style.css and modules of JavaScript
runtime.py          ONNX Runtime Web, which runs the model in the browser
package.json        its version, and package-lock.json its checksum
LICENSE_ONNXRUNTIME its licence, which goes with it

The folder holds the page, `model.onnx`, `model.json` with the facts that the page needs, and
`runtime/`. The page loads nothing else, and nothing from elsewhere.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from mbv2_jax import tasks
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import UserError, listed
from mbv2_jax.export import metadata, onnx
from mbv2_jax.export.formats import Options, Runner
from mbv2_jax.export.program import UINT8, Program
from mbv2_jax.export.web import runtime
from mbv2_jax.spec import Preprocessing

PAGE = pathlib.Path(__file__).with_name("page")
LICENSE = pathlib.Path(__file__).with_name("LICENSE_ONNXRUNTIME")
MODEL, FACTS, RUNTIME = "model.onnx", "model.json", "runtime"

# Those that page/preprocess.js has.
OPERATIONS = ("resize_edge", "center_crop", "resize", "fit", "pad")


def write(program: Program, path: pathlib.Path, options: Options) -> None:
    """Writes the page and its model to the folder `path`, which does not exist.

    Raises:
      UserError: the page cannot feed the program or show its outputs, or there is no runtime.
    """
    _check(program)
    facts = metadata.of(program, options.precision) | {
        "name": path.name,
        "operations": operations(program.saved.spec.preprocessing),
        "decoding": program.task.decoding(),
    }
    parts = runtime.files(options.runtime)
    # Not the times of the files, by which browsers know whether they kept the newest.
    shutil.copytree(PAGE, path, copy_function=shutil.copyfile)
    (path / RUNTIME).mkdir()
    shutil.copyfile(LICENSE, path / RUNTIME / "LICENSE.txt")
    for part in parts:
        shutil.copyfile(part, path / RUNTIME / _served_name(part))
    onnx.write(program, path / MODEL, Options(options.precision))
    (path / FACTS).write_text(json.dumps(facts))


def open_file(path: pathlib.Path, threads: int | None = None) -> Runner:
    """Opens the model of a folder that `write` wrote, in ONNX Runtime outside a browser."""
    return onnx.open_file(path / MODEL, threads)


def operations(preprocessing: Preprocessing) -> list[dict[str, Any]]:
    """Returns the operations of an evaluation transform by name, with their arguments.

    Raises:
      UserError: the page has no such operation.
    """
    names = {made: name for name, made in pipeline.OPERATIONS.items()}
    found = [
        {"name": names[type(operation)]} | dataclasses.asdict(operation)  # type: ignore[call-overload]
        for operation in preprocessing.transform.operations
    ]
    if odd := [step["name"] for step in found if step["name"] not in OPERATIONS]:
        raise UserError(
            f"--to=web has no {listed(odd, separator=', ')} of {preprocessing.eval_transforms!r}: "
            f"the page knows {', '.join(OPERATIONS)}"
        )
    return found


def _served_name(part: pathlib.Path) -> str:
    """Returns the name of a file of the runtime that every server gives the right type."""
    return part.with_suffix(".js").name if part.suffix == ".mjs" else part.name


def _check(program: Program) -> None:
    """Refuses programs that the page has no code for."""
    if program.input != UINT8:
        raise UserError(f"--to=web takes --input={UINT8} alone: the page gives pixels to the model")
    if program.batch not in (None, 1):
        raise UserError(f"--to=web takes --batch=1 or dynamic, not {program.batch}")
    task = program.saved.spec.task
    if task not in tasks.BUILT_IN:
        raise UserError(
            f"--to=web shows {', '.join(tasks.BUILT_IN)}, and {program.saved.path} is a model of "
            f"{task}"
        )
