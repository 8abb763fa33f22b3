"""The bytes that a recipe's compiled TPU step reads and writes, by operation.

    python -m benchmarks.tpu_compile [--config=mobilenet_v2_tpu_4096] [--topology=v5e:2x4]
        [--batch=1024] [--options=NAME=VALUE,...] [--hlo=FILE] [--top=20] [--label=TEXT]
    python -m benchmarks.tpu_compile --inference --topology=v5e:1x1 --batch=128
    python -m benchmarks.tpu_compile --depthwise=sums       # sums of shifted views, as on CPUs

Nothing is run: libtpu compiles ahead of time (`make test-tpu` installs it; minutes on two cores).
--hlo keeps the compiled program's text in a file, --label adds a row to benchmarks/tpu_step.csv.
docs/tpu_step.md explains the figures.

XLA's own count, "bytes accessed", adds up operands and results wherever they lie. A TPU core also
has memory on the chip, and the compiler adds copies between it and HBM, each of which XLA counts
three to four times. The report therefore has three figures, all in MB per image: XLA's count; the
bytes that the operations read and write, without copies; and the bytes between HBM and the chip.
"""

import argparse
import collections
import csv
import dataclasses
import os
import pathlib
import re
import sys
import time
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from mbv2_jax import command_line
from mbv2_jax.ops import plain
from mbv2_jax.ops.cpu import depthwise
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import compile as compile_lib
from mbv2_jax.training import config as config_lib

CSV = pathlib.Path(__file__).resolve().parent / "tpu_step.csv"
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u8": 1, "s8": 1, "pred": 1}

# These name existing arrays: they read and write nothing.
NAMES = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "custom-call"}
MOVES = {"copy-start", "slice-start"}  # between HBM and the chip; -done is the end of a move

WORTH_NAMING = 100  # bytes per image from which the table shows an operand

_ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An operand or a result.

    Attributes:
      shape: its dtype and shape, as XLA writes them.
      size: its bytes.
      on_chip: whether it lies on the chip, and not in HBM.
    """

    shape: str
    size: int
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of the entry computation that reads and writes memory."""

    name: str
    opcode: str
    source: str  # the JAX operation that it, or the root of its fusion, comes from
    reads: tuple[Array, ...]
    writes: tuple[Array, ...]

    @property
    def size(self) -> int:
        """Bytes read and written, wherever they lie."""
        return sum(array.size for array in self.reads + self.writes)

    @property
    def hbm(self) -> int:
        """Bytes read and written in HBM."""
        return sum(array.size for array in self.reads + self.writes if not array.on_chip)

    @property
    def kind(self) -> str:
        """Its kind: a move, or the direction and the name of its computation."""
        if self.opcode in MOVES:
            return "moves between HBM and chip"
        direction = "backward" if "transpose(" in self.source else "forward"
        return f"{direction} {self.source.rpartition('/')[2] or self.opcode}"


def operations(text: str) -> list[Operation]:
    """Returns the operations of a compiled program's entry computation, in order.

    Args:
      text: `jax.stages.Compiled.as_text()`.
    """
    results: dict[str, tuple[Array, ...]] = {}
    found = []
    for line in text[text.index("\nENTRY") :].splitlines()[2:]:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, shape, opcode, arguments, rest = match.groups()
        writes = results[name] = _arrays(shape)
        if opcode in NAMES or opcode.endswith("-done"):
            continue
        reads = tuple(
            array
            for operand in re.findall(r"%([\w.\-]+)", arguments)
            for array in results.get(operand, ())
        )
        if opcode in MOVES:  # the result of a -start names the source, too; a slice is a part of it
            moved = writes[0] if opcode == "copy-start" else writes[1]
            reads = (dataclasses.replace(reads[0], size=moved.size),)
            writes = (moved,)
        source = re.search(r'op_name="([^"]*)"', rest)
        found.append(Operation(name, opcode, source[1] if source else "", reads, writes))
    return found


def _arrays(shape: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, sides, layout in _ARRAY.findall(shape):
        size = SIZES[dtype]
        for side in filter(None, sides.split(",")):
            size *= int(side)
        arrays.append(Array(f"{dtype}[{sides}]", size, bool(re.search(r"S\(\d\)", layout))))
    return tuple(arrays)


def summary(found: list[Operation], images: int) -> dict[str, float]:
    """Returns MB per image: of all operations except moves, of HBM, and of each kind."""
    megabyte = 1e6 * images
    moves = sum(operation.size for operation in found if operation.opcode in MOVES)
    kinds: collections.Counter[str] = collections.Counter()
    for operation in found:
        kinds[operation.kind] += operation.size
    return {
        "operations": (sum(operation.size for operation in found) - moves) / megabyte,
        "HBM": sum(operation.hbm for operation in found) / megabyte,
    } | {kind: size / megabyte for kind, size in kinds.most_common()}


def table(found: list[Operation], images: int, top: int) -> str:
    """Returns the largest operations, a line each; * marks arrays on the chip."""
    lines = []
    for operation in sorted(found, key=lambda operation: -operation.size)[:top]:
        reads, writes = (
            " ".join(
                array.shape + "*" * array.on_chip
                for array in arrays
                if array.size > WORTH_NAMING * images
            )
            for arrays in (operation.reads, operation.writes)
        )
        size = operation.size / (1e6 * images)
        lines.append(f"{size:6.2f}  {operation.source}\n        {reads} -> {writes}")
    return "\n".join(lines)


def compile_inference(
    config: ConfigDict, topology: str, options: Mapping[str, str]
) -> tuple[dict[str, Any], jax.stages.Compiled]:
    """Compiles a recipe's network for prediction: folded, from uint8 pixels to logits.

    Arguments and results are those of `compile.compile_for`.
    """
    settings = config_lib.read(config)
    spec, task = config_lib.resolve(settings, None)
    mesh, batch_size = compile_lib.topology_mesh(topology), settings.run.batch_size
    mesh_lib.check_batch(mesh, batch_size)
    mode = config_lib.on_devices(spec.mode, batch_size, mesh.size)
    network = task.network(spec.backbone, mode, folded=True)
    side = spec.preprocessing.image_size
    pixels = jax.ShapeDtypeStruct((batch_size, side, side, 3), np.uint8)

    def logits(variables: Any, images: jax.Array) -> Any:
        normalized = spec.preprocessing.normalize(images, network.dtype)
        return network.apply(variables, normalized)

    one = jax.ShapeDtypeStruct((1, side, side, 3), network.dtype)
    variables = jax.eval_shape(network.init, jax.random.key(0), one)
    shardings = (mesh_lib.replicated(mesh), mesh_lib.split(mesh))
    begin = time.monotonic()
    lowered = jax.jit(logits, in_shardings=shardings).lower(variables, pixels)
    compiled = lowered.compile(dict(options))
    seconds = time.monotonic() - begin
    return compile_lib.report(compiled, topology, mesh, batch_size, seconds), compiled


def main() -> None:
    """Compiles, prints the table and the sums, and writes the requested files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="mobilenet_v2_tpu_4096")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=1024, help="global")
    parser.add_argument("--group-size", help="model.bn_group_size, if not the recipe's")
    parser.add_argument("--inference", action="store_true", help="compile the folded network")
    parser.add_argument("--depthwise", choices=("plain", "sums"), default="plain", help="lowering")
    parser.add_argument("--options", default="", help="XLA's, NAME=VALUE,...")
    parser.add_argument("--hlo", help="file for the compiled program's text")
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--label", help="adds a row of this name to benchmarks/tpu_step.csv")
    arguments = parser.parse_args()

    config = command_line.load_config(arguments.config)
    config.batch_size = arguments.batch
    if arguments.group_size:
        size = arguments.group_size
        config.model.bn_group_size = int(size) if size.isdigit() else size
    options = dict(option.split("=") for option in arguments.options.split(",") if option)
    if arguments.depthwise == "sums":
        mock.patch.object(plain, "convolve_depthwise", depthwise.convolve).start()
    compile_for = compile_inference if arguments.inference else compile_lib.compile_for
    report, compiled = compile_for(config, arguments.topology, options)
    text = compiled.as_text() or ""
    if arguments.hlo:
        pathlib.Path(arguments.hlo).write_text(text)
    found, images = operations(text), report["per_device_batch"]
    print(table(found, images, arguments.top), end="\n\n")
    sums = {"XLA's count": report["bytes_per_image"] / 1e6} | summary(found, images)
    worth = {name: value for name, value in sums.items() if value > 0.1}
    print("\n".join(f"{value:7.1f} MB per image  {name}" for name, value in worth.items()))
    if arguments.label:
        _append(arguments.label, report, sums)


def _append(label: str, report: dict[str, Any], sums: dict[str, float]) -> None:
    row = {"what": label} | report
    row |= {"operations_mb": round(sums["operations"], 1), "hbm_mb": round(sums["HBM"], 1)}
    fresh = not CSV.exists()
    with CSV.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator=os.linesep)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
