"""The file of --out: the prediction for every image of an evaluation, as its task writes it."""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from mbv2_jax.data.sources import Source
from mbv2_jax.errors import RunFailed
from mbv2_jax.storage import atomic, bucket
from mbv2_jax.tasks.task import Task


def check_path(out: str) -> pathlib.Path:
    """Returns the path of --out, on a disk or in a bucket.

    Raises:
      UserError: the file cannot be written, or exists already.
    """
    path = bucket.parse_path(out, "--out")
    atomic.check_writable(path, "--out")
    return path


def write(path: pathlib.Path, rows: Mapping[str, np.ndarray], source: Source, task: Task) -> None:
    """Writes the predictions of an evaluation, complete or not at all, in the first process.

    Args:
      path: the file, on a disk or in a bucket.
      rows: the rows of all examples, in the source's order.
      source: the split that was evaluated.
      task: the model's task.

    Raises:
      RunFailed: the file cannot be written.
    """
    if jax.process_index() != 0:
        return
    try:
        with atomic.open_file(path, "w") as file:
            file.writelines(task.records(rows, source))
    except OSError as error:
        raise RunFailed(f"--out={path} cannot be written: {error.strerror}") from None
