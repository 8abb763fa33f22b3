"""The split of a folder that has classes and no splits: a fifth of each class is held out.

The files of a class are ordered by a hash of their names, and the first fifth is held out. So the
split is the same on every machine and in every listing order, every class has its share on both
sides, and of the files that are there already a new one moves at most one to the other side.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

PARTS = 5  # one of them is held out: 80/20, the usual split where nobody chose another

# The names by which configs ask for each side, and for both together.
TRAINING = frozenset({"train", "training"})
EVALUATION = frozenset({"val", "valid", "validation", "test", "eval"})
EVERYTHING = "all"


def order(files: Sequence[tuple[str, int]]) -> tuple[np.ndarray, int]:
    """Orders the files of a folder so that those held out come first.

    Args:
      files: the path of each file, relative to the folder, and its label.

    Returns:
      The numbers of the files, int64 (files,), in each part in an order that is as good as random;
      and how many are held out. A class of at least two files has at least one on either side, and
      the file of a class of one is for training.
    """
    digests = [hashlib.sha256(os.fsencode(path)).digest() for path, _ in files]
    by_class: dict[int, list[int]] = {}
    for number in sorted(range(len(files)), key=digests.__getitem__):
        by_class.setdefault(files[number][1], []).append(number)
    held_out, training = [], []
    for numbers in by_class.values():
        count = _count(len(numbers))
        held_out += numbers[:count]
        training += numbers[count:]
    both = [sorted(part, key=digests.__getitem__) for part in (held_out, training)]
    return np.array(both[0] + both[1], np.int64), len(held_out)


def _count(size: int) -> int:
    """Returns how many files of a class are held out."""
    rounded = (size + PARTS // 2) // PARTS
    return min(max(1, rounded), size - 1)
