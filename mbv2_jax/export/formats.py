"""The formats of exported files, by the values of --to."""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mbv2_jax.errors import UserError, nearest
from mbv2_jax.export.quiet import quiet
from mbv2_jax.installed import require

if TYPE_CHECKING:  # --help lists the formats, and needs no jax
    import numpy as np

    from mbv2_jax.export.program import Program

FLOAT32, FLOAT16, INT8 = "float32", "float16", "int8"
INPUTS = ("uint8", "float32", "normalised")  # the values of --input


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """The choices that only some formats offer.

    Attributes:
      precision: "float32", "float16" or "int8".
      calibration: (M, H, W, 3) images of the program's dtype and size, whose activations give the
        ranges of 8-bit numbers; None where nothing is calibrated.
      keep_float: names of layers that stay in floats in an 8-bit file.
      integer_io: whether inputs and outputs of an 8-bit file are 8-bit numbers too.
      nchw: whether images are (N, 3, H, W).
      suppress: whether a detector's file drops overlapping boxes.
      runtime: a folder with the browser's runtime; None downloads it.
    """

    precision: str = FLOAT32
    calibration: "np.ndarray | None" = None
    keep_float: Sequence[str] = ()
    integer_io: bool = False
    nchw: bool = False
    suppress: bool = False
    runtime: pathlib.Path | None = None


class Runner(Protocol):
    """A file that was opened in its own runtime.

    Attributes:
      metadata: see `export.metadata`.
      not_run: why this machine cannot run it; "" where it can.
    """

    metadata: Mapping[str, Any]
    not_run: str

    @property
    def operators(self) -> Mapping[str, int]:
        """The number of operators of each kind."""

    def __call__(self, images: "np.ndarray") -> "dict[str, np.ndarray]":
        """Returns the arrays of `Program` for images as it takes them."""


class Writer(Protocol):
    """The module of a format."""

    def write(self, program: "Program", path: pathlib.Path, options: Options) -> None:
        """Writes a program to `path`, which does not exist."""

    def open_file(self, path: pathlib.Path, threads: int | None = None) -> Runner:
        """Opens a file that `write` wrote, for so many threads; None: the runtime's choice."""


class Format(NamedTuple):
    """One value of --to.

    Attributes:
      module: its name.
      what: a clause for --help.
      packages: those that it needs beside mbv2_jax.
      extra: the extra of setup.cfg that installs them.
      precisions: those that it can write.
      options: the names of the fields of `Options` that it reads, beside the precision.
      batch: the number of images of a file where a user gives none; None leaves it open.
      mark: the file by which a folder of the format is known; "" where it writes a single file.
    """

    module: str
    what: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    precisions: tuple[str, ...] = (FLOAT32,)
    options: tuple[str, ...] = ()
    batch: int | None = None
    mark: str = ""

    def load(self, purpose: str) -> Writer:
        """Imports the module.

        Raises:
          UserError: packages are missing; names the extra that installs them.
        """
        require(purpose, *self.packages, extra=self.extra)
        with quiet():
            module: Writer = importlib.import_module(self.module)
        return module


FORMATS: Mapping[str, Format] = {
    "stablehlo": Format(
        "mbv2_jax.export.stablehlo",
        "for jax on CPUs, GPUs and TPUs, without this package",
    ),
    "onnx": Format(
        "mbv2_jax.export.onnx",
        "for ONNX Runtime, OpenVINO, TensorRT and browsers",
        ("onnx", "onnxruntime"),
        "onnx",
        options=("nchw", "suppress"),
    ),
    "litert": Format(
        "mbv2_jax.export.litert",
        "a .tflite file for phones, boards and microcontrollers",
        ("litert_converter", "ai_edge_litert", "ai_edge_quantizer"),
        "litert",
        (FLOAT32, FLOAT16, INT8),
        ("calibration", "keep_float", "integer_io"),
        batch=1,
    ),
    "coreml": Format(
        "mbv2_jax.export.coreml",
        "a .mlpackage for iPhones, iPads and Macs",
        ("coremltools", "onnx"),
        "coreml",
        (FLOAT32, FLOAT16),
        batch=1,
        mark="Manifest.json",
    ),
    "savedmodel": Format(
        "mbv2_jax.export.saved_model",
        "a folder for TensorFlow and TensorFlow Serving",
        ("tensorflow",),
        "savedmodel",
        mark="assets.extra/mbv2_jax.json",
    ),
    "web": Format(
        "mbv2_jax.export.web",
        "a folder with a page that runs the model in a browser",
        ("onnx", "onnxruntime"),
        "onnx",
        options=("runtime",),
        batch=1,
        mark="predict.js",
    ),
}


def find(name: str) -> Format:
    """Returns a format by its name.

    Raises:
      UserError: there is no such format.
    """
    if name not in FORMATS:
        raise UserError(f"--to={name}: {nearest(name, FORMATS)}")
    return FORMATS[name]
