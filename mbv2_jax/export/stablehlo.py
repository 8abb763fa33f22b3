"""StableHLO files: a serialised `jax.export` program for CPUs, NVIDIA GPUs and TPUs.

jax alone runs such a file:

    exported = jax.export.deserialize(bytearray(open("mine.stablehlo", "rb").read()))
    arrays = exported.call(images)

A zip archive with the metadata stands behind the program, as in a .tflite file.
"""

import json
import os
import pathlib
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import numpy as np

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.export import metadata
from mbv2_jax.export.formats import Options
from mbv2_jax.export.program import Program
from mbv2_jax.ops import lowering

PLATFORMS = ("cpu", "cuda", "tpu")


def write(program: Program, path: pathlib.Path, options: Options) -> None:
    """Writes a program; the number of images is symbolic where `program.batch` is None."""
    example = program.example()
    if program.batch is None:
        (count,) = jax.export.symbolic_shape("b")
        example = jax.ShapeDtypeStruct((count, *example.shape[1:]), example.dtype)
    with lowering.plain_lowering():
        exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(example)
    path.write_bytes(exported.serialize())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(metadata.FILE, json.dumps(metadata.of(program, options.precision)))


class Exported:
    """A StableHLO file as a function of a batch of images.

    Attributes:
      metadata: see `export.metadata`.
      exported: the `jax.export.Exported` itself.
    """

    metadata: Mapping[str, Any]
    not_run = ""

    def __init__(self, path: pathlib.Path):
        try:
            content = path.read_bytes()
            self.exported = jax.export.deserialize(bytearray(content))
            with zipfile.ZipFile(path) as archive:
                self.metadata = json.loads(archive.read(metadata.FILE))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
        except Exception as error:  # of flatbuffers, zipfile or json, which depends on the damage
            raise UserError(
                f"{path} is no file of `python -m mbv2_jax.export --to=stablehlo`, or it is "
                f"damaged: {first_line(error)}"
            ) from None
        self._call = jax.jit(self.exported.call)

    @property
    def operators(self) -> Mapping[str, int]:
        """The number of operators of each kind."""
        return Counter(re.findall(r"stablehlo\.(\w+)", self.exported.mlir_module()))

    def __call__(self, images: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """Returns the arrays of the file's "outputs" for images, (N, H, W, 3).

        The dtype is the one that the file was exported for, see "input" in `metadata`.
        """
        return self._call(images)


def load_exported(path: str | os.PathLike[str]) -> Exported:
    """Opens a file of `python -m mbv2_jax.export --to=stablehlo` as a function of images.

    Args:
      path: the file.

    Raises:
      UserError: it cannot be read, or it is no such file.
    """
    return Exported(pathlib.Path(path))


def open_file(path: pathlib.Path, threads: int | None = None) -> Exported:
    """Opens a file that `write` wrote; XLA uses all threads."""
    del threads
    return Exported(path)
