"""The file of --out: the prediction for every image of an evaluation, one JSON object per line."""

import json
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

    A line has "image", the image's name in the source, and the members of `Task.record`. Lines are
    in the source's order.

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
    lines = (
        json.dumps(
            {"image": source.describe(index)}
            | task.record({name: values[index] for name, values in rows.items()})
        )
        + "\n"
        for index in range(len(source))
    )
    try:
        with atomic.open_file(path, "w") as file:
            file.writelines(lines)
    except OSError as error:
        raise RunFailed(f"--out={path} cannot be written: {error.strerror}") from None
