"""--out: what an evaluation made of every image, as a file of one JSON object a line."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mbv2_jax.data.sources import Source
from mbv2_jax.errors import RunFailed
from mbv2_jax.storage import atomic, bucket


def parse_out(out: str) -> pathlib.Path:
    """Returns the path of --out, on a disk or in a bucket.

    Raises:
      UserError: `write` could not write there, or would overwrite a file.
    """
    path = bucket.parse_path(out, "--out")
    atomic.check_writable(path, "--out")
    return path


def write(path: pathlib.Path, batches: Sequence[Mapping[str, np.ndarray]], source: Source) -> None:
    """Writes the predictions of an evaluation, complete or not at all; only the first process does.

    A line is {"image", "label", "class", "loss", "predictions": [{"label", "class", "score"}, ...]}
    with the five best classes, the best first. `image` is the source's name of it, and lines are in
    the source's order; labels count as the logits do.

    Args:
      path: the file, on a disk or in a bucket.
      batches: of each batch {"index", "label", "mask"} (N,), and what tasks/classification.py's
        `predictions` returns.
      source: what was evaluated, with the model's classes.

    Raises:
      RunFailed: an image is not there exactly once, or the file cannot be written.
    """
    if jax.process_index() != 0:
        return
    mask = np.concatenate([batch["mask"] for batch in batches])
    columns = {
        name: np.concatenate([batch[name] for batch in batches])[mask]
        for name in ("index", "label", "loss", "best", "scores")
    }
    order = np.argsort(columns["index"])
    if not np.array_equal(columns["index"][order], np.arange(len(source))):
        raise RunFailed(f"--out={path}: not every image was evaluated exactly once")
    rows = ({name: values[row] for name, values in columns.items()} for row in order)
    try:
        with atomic.open_file(path) as file:
            file.writelines(json.dumps(_line(row, source)) + "\n" for row in rows)
    except OSError as error:
        raise RunFailed(f"--out={path} cannot be written: {error.strerror}") from None


def _line(row: Mapping[str, Any], source: Source) -> dict[str, Any]:
    names, label = source.class_names, int(row["label"])
    ranked = [
        {"label": int(best), "class": names[best], "score": float(score)}
        for best, score in zip(row["best"], row["scores"], strict=True)
    ]
    return {
        "image": source.describe(int(row["index"])),
        "label": label,
        "class": names[label],
        "loss": float(row["loss"]),
        "predictions": ranked,
    }
