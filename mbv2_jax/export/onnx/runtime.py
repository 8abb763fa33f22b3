"""ONNX files in ONNX Runtime."""

import json
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.export import metadata

LAYOUT = "layout"  # of the images: a key of the file's metadata


class Session:
    """An ONNX file as a function of a batch of images.

    Attributes:
      metadata: see `export.metadata`, with "layout", "nhwc" or "nchw", of the file's images.
      operators: the number of operators of each kind.
    """

    metadata: Mapping[str, Any]
    operators: Mapping[str, int]
    not_run = ""

    def __init__(self, path: pathlib.Path, threads: int | None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0 leaves it to ONNX Runtime
        try:
            content = path.read_bytes()
            model = onnx.load_model_from_string(content)
            facts = {prop.key: prop.value for prop in model.metadata_props}
            self.metadata = json.loads(facts[metadata.KEY])
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except OSError as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
        except Exception as error:  # of protobuf, json or ONNX Runtime, which depends on the damage
            raise UserError(
                f"{path} is no file of `python -m mbv2_jax.export --to=onnx`, or it is damaged: "
                f"{first_line(error)}"
            ) from None
        self.operators = Counter(node.op_type for node in model.graph.node)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the file's outputs by name for images, (N, H, W, 3) in either layout."""
        if self.metadata[LAYOUT] == "nchw":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        names = [output.name for output in self._session.get_outputs()]
        found = self._session.run(names, {"images": images})
        return dict(zip(names, found, strict=True))


def open_file(path: pathlib.Path, threads: int | None = None) -> Session:
    """Opens a file that `write` wrote, for CPUs.

    Args:
      path: the file.
      threads: of an operation; None leaves them to ONNX Runtime.

    Raises:
      UserError: the file cannot be read, or it is no such file.
    """
    return Session(path, threads)
