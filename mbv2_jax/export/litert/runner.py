"""A .tflite file in LiteRT's interpreter."""

import json
import pathlib
import zipfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.export import metadata
from mbv2_jax.export.litert import flatbuffer
from mbv2_jax.export.quiet import quiet


class File:
    """A .tflite file as a function of a batch of images.

    Attributes:
      metadata: see `export.metadata`.
      operators: the number of operators of each kind.
    """

    metadata: Mapping[str, Any]
    operators: Mapping[str, int]
    not_run = ""

    def __init__(self, path: pathlib.Path, threads: int | None = None):
        try:
            content = path.read_bytes()
            with zipfile.ZipFile(path) as archive:
                self.metadata = json.loads(archive.read(metadata.FILE))
            with quiet():
                self._interpreter = Interpreter(model_content=content, num_threads=threads)
                self._run = self._interpreter.get_signature_runner(flatbuffer.SIGNATURE)
            self.operators = Counter(op.kind for op in flatbuffer.operators(content))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
        except Exception as error:  # of zipfile, json or the interpreter: it depends on the damage
            raise UserError(
                f"{path} is no file of `python -m mbv2_jax.export --to=litert`, or it is damaged: "
                f"{first_line(error)}"
            ) from None
        self._input = self._run.get_input_details()[flatbuffer.INPUT]
        self._outputs = self._run.get_output_details()

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of the file's "outputs" for images, (N, H, W, 3).

        Arrays of 8-bit numbers are scaled: images to them, and outputs to float32 from them.

        Args:
          images: of the dtype of "input" in `metadata`; N is the file's batch, or any number.
        """
        found = self._run(**{flatbuffer.INPUT: _quantised(images, self._input)})
        return {name: _floats(array, self._outputs[name]) for name, array in found.items()}


def _quantised(array: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """Returns the numbers that a tensor holds for an array."""
    scale, zero = details["quantization"]
    if not scale:
        return array
    limits = np.iinfo(details["dtype"])
    return np.clip(np.rint(array / scale) + zero, limits.min, limits.max).astype(details["dtype"])


def _floats(array: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """Returns the values that a tensor's numbers stand for."""
    scale, zero = details["quantization"]
    return (array.astype(np.float32) - np.float32(zero)) * np.float32(scale) if scale else array
