"""TensorFlow SavedModels, by jax2tf: for TensorFlow, TensorFlow Serving and TFX.

A folder with one signature, "serving_default": "images" in, the arrays of `Program` out. The
program in it is StableHLO for CPUs, NVIDIA GPUs and TPUs, which TensorFlow compiles with XLA; the
metadata is in assets.extra/.
"""

import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what TensorFlow logs while it runs, too

import tensorflow as tf
from jax.experimental import jax2tf

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.export import metadata
from mbv2_jax.export.formats import Options
from mbv2_jax.export.program import Program
from mbv2_jax.export.quiet import quiet
from mbv2_jax.export.stablehlo import PLATFORMS
from mbv2_jax.ops import lowering

SIGNATURE, IMAGES = "serving_default", "images"
_FACTS = pathlib.Path("assets.extra") / metadata.FILE


def write(program: Program, path: pathlib.Path, options: Options) -> None:
    """Writes a program as a folder; any number of images fits where `program.batch` is None.

    Raises:
      OSError: the folder cannot be written.
    """
    height, width = program.size
    batch = "b" if program.batch is None else program.batch
    convert = jax2tf.convert(
        program,
        polymorphic_shapes=[f"({batch}, {height}, {width}, 3)"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    images = tf.TensorSpec((program.batch, height, width, 3), program.dtype, name=IMAGES)
    module = tf.Module()
    module.run = tf.function(convert, input_signature=[images], autograph=False)
    with quiet():
        with lowering.plain_lowering():  # the program is traced here
            run = module.run.get_concrete_function()
        try:
            tf.saved_model.save(module, str(path), signatures={SIGNATURE: run})
        except tf.errors.OpError as error:  # of a full disk, too
            raise OSError(first_line(error)) from error
    (path / _FACTS).parent.mkdir()
    (path / _FACTS).write_text(json.dumps(metadata.of(program, options.precision)))


class Folder:
    """A SavedModel as a function of a batch of images.

    Attributes:
      metadata: see `export.metadata`.
      operators: the number of operators of each kind. The network is one of them, XlaCallModule.
    """

    metadata: Mapping[str, Any]
    operators: Mapping[str, int]
    not_run = ""

    def __init__(self, path: pathlib.Path):
        try:
            self.metadata = json.loads((path / _FACTS).read_text())
            with quiet():
                self._model = tf.saved_model.load(str(path))  # the signature needs it alive
            self._run = self._model.signatures[SIGNATURE]
        except Exception as error:  # of TensorFlow, json or the disk, which depends on the damage
            raise UserError(
                f"{path} is no folder of `python -m mbv2_jax.export --to=savedmodel`, or it is "
                f"damaged: {first_line(error)}"
            ) from None
        graph = self._run.graph.as_graph_def()
        functions = [node for function in graph.library.function for node in function.node_def]
        self.operators = Counter(node.op for node in (*graph.node, *functions))

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the folder's outputs by name for images, (N, H, W, 3)."""
        found = self._run(**{IMAGES: tf.constant(images)})
        return {name: array.numpy() for name, array in found.items()}


def open_file(path: pathlib.Path, threads: int | None = None) -> Folder:
    """Opens a folder that `write` wrote; TensorFlow chooses its threads.

    Raises:
      UserError: it cannot be read, or it is no such folder.
    """
    del threads
    return Folder(path)
