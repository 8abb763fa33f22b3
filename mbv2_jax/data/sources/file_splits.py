"""Splits of a folder of files: their names, random parts of them, and those made of a whole folder.

Files are sorted by class or by time, so a part such as "train[10000:]" is a random one: the range
selects from numpy.random.RandomState(0).permutation(number of files), and the selected files are
read in sorted order. Disjoint ranges have no file in common.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from mbv2_jax.data.sources import held_out, parts
from mbv2_jax.errors import UserError

# TFDS's name of the split, torchvision's and Roboflow's, each of which also finds the others.
_VALIDATION = ("validation", "val", "valid")

# The names by which a folder is a split.
NAMES = held_out.TRAINING | held_out.EVALUATION


def spellings(name: str) -> tuple[str, ...]:
    """Returns the names under which a split may be found, the given one first."""
    if name not in _VALIDATION:
        return (name,)
    return (name, *(other for other in _VALIDATION if other != name))


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The files of a folder that belong to a split.

    Attributes:
      numbers: of the files, sorted: int64 (files,); None for all of them.
      parts: as `sources.Source` describes them.
      note: a sentence for the user about a split that was made here; "" if there is none.
    """

    numbers: np.ndarray | None
    parts: list[parts.Part]
    note: str


def split_name(path: str, split: str) -> str:
    """Returns the name of the split of which an expression takes parts.

    Raises:
      UserError: the expression names several splits.
    """
    if not parts.is_expression(split) or os.path.isdir(os.path.join(path, split)):
        return split
    names = {term.split("[")[0].strip() for term in split.split("+")}
    if len(names) > 1 or "shard" in split.partition("[")[2]:
        raise UserError(
            f"cannot take {split!r} of the folder {path}: give parts of one split, such as"
            " 'train[10000:]', 'train[:90%]' or 'train[:20%]+train[40%:]'"
        )
    return names.pop()


def choose(root: str, split: str, name: str, count: int) -> Chosen:
    """Returns the files of a split, or of parts of it, where a folder holds just that split.

    Args:
      root: the folder.
      split: the split's name, or an expression as `parts.read` takes it.
      name: of the split, from `split_name`.
      count: the number of files in the folder.

    Raises:
      UserError: the expression cannot be read.
    """
    chosen = parts.read(split, {name: [count]}, root)
    found = _moved(chosen, root, 0)
    if [len(part) for part in chosen] == [count]:
        return Chosen(None, found, "")
    order = np.random.RandomState(0).permutation(count)  # a stream that NumPy never changes
    return Chosen(_numbers(found, order), found, "")


def choose_held_out(
    path: str, split: str, name: str, files: Sequence[tuple[str, int]], contents: str
) -> Chosen:
    """Returns the files of a split that is made of a folder without splits (held_out.py).

    Args:
      path: the folder.
      split, name: as for `choose`.
      files: the path of each file, relative to the folder, and its label.
      contents: what the folder holds: "classes", or anything else where all labels are equal.

    Raises:
      UserError: there is no such split, it is empty, or the expression cannot be read.
    """
    order, first = held_out.order(files)
    start, size = _range(path, name, first, len(files), contents)
    note = "" if name == held_out.EVERYTHING else _note(path, first, len(files), contents)
    chosen = parts.read(split, {name: [size]}, path)
    found = _moved(chosen, path, start)
    is_whole = [len(part) for part in chosen] == [len(files)]
    return Chosen(None if is_whole else _numbers(found, order), found, note)


def _moved(chosen: Sequence[parts.Part], root: str, start: int) -> list[parts.Part]:
    location = os.path.realpath(root)
    return [parts.Part(location, start + part.start, start + part.stop) for part in chosen]


def _numbers(chosen: Sequence[parts.Part], order: np.ndarray) -> np.ndarray:
    """Returns the numbers of the files in the parts of an order, sorted: int64 (files,)."""
    return np.sort(np.concatenate([order[part.start : part.stop] for part in chosen]))


def _range(path: str, name: str, first: int, count: int, contents: str) -> tuple[int, int]:
    """Returns start and size of a split in the order of `held_out.order`.

    Args:
      path: the folder.
      name: of the split.
      first: the number of files that are held out.
      count: the number of all files.
      contents: what the folder holds.
    """
    known = {held_out.EVERYTHING: (0, count)}
    known |= dict.fromkeys(held_out.TRAINING, (first, count - first))
    known |= dict.fromkeys(held_out.EVALUATION, (0, first))
    if name not in known:
        raise UserError(
            f"no split {name!r} in {path}, which has {contents} and no splits; 'train', 'val' and "
            "'all' are made of it"
        )
    if not known[name][1]:
        each = " for each class" if contents == "classes" else ""
        raise UserError(
            f"{path} has {contents} and no splits, and one image{each}: nothing can be held "
            "out for evaluation (--config.data.eval_split=all evaluates all of them)"
        )
    return known[name]


def _note(path: str, first: int, count: int, contents: str) -> str:
    share = "a fifth of each class" if contents == "classes" else "a fifth"
    return (
        f"{path} has {contents} and no splits: {count - first:,} of its {count:,} images are for "
        f"training, and {first:,}, {share}, are held out for evaluation, always the "
        "same ones; --config.data.eval_split=all evaluates all of them"
    )
