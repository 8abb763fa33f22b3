"""Parts of splits: expressions such as "train[10000:]" and "train[:10%]".

The notation is that of TFDS: https://www.tensorflow.org/datasets/splits.
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

from mbv2_jax.errors import UserError, nearest
from mbv2_jax.installed import require


@dataclasses.dataclass(frozen=True)
class Part:
    """The examples `start` to `stop - 1` of a split, in the split's own order.

    Attributes:
      split: the split's name or location, the same for all parts of it.
      start, stop: numbers of examples.
    """

    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def is_expression(split: str) -> bool:
    """Returns whether `split` is more than a name."""
    return "[" in split or "+" in split


def read(split: str, sizes: Mapping[str, Sequence[int]], where: str) -> list[Part]:
    """Returns the parts that a split's name or expression stands for, in its order.

    Args:
      split: a name, or an expression.
      sizes: the number of examples in each file of every split of the dataset.
      where: the dataset, for messages.

    Returns:
      The parts that are not empty; their `split` is a key of `sizes`.

    Raises:
      UserError: the expression cannot be parsed, names an unknown split, reaches past the split's
        end, or stands for an example twice or for none.
    """
    if split in sizes:
        ranges = [(split, 0, sum(sizes[split]))]
    elif not is_expression(split) and split != "all":
        raise UserError(f"no split {split!r} in {where}; {nearest(split, sizes)}")
    else:
        ranges = _ranges(split, sizes, where)
    found = [Part(name, start, stop) for name, start, stop in ranges if start < stop]
    if any(overlap([part], found[:number]) for number, part in enumerate(found)):
        raise UserError(
            f"the parts of split {split!r} of {where} overlap: some examples would count twice"
        )
    if not found:
        raise UserError(f"split {split!r} of {where} is empty")
    return found


def _ranges(
    split: str, sizes: Mapping[str, Sequence[int]], where: str
) -> list[tuple[str, int, int]]:
    """Returns (name, start, stop) of an expression's terms."""
    require(f"split {split!r}", "tensorflow_datasets")
    from tensorflow_datasets.core import splits as tfds_splits  # slow to import

    for term in split.split("+"):
        name = term.split("[")[0].strip()
        if name not in sizes and name != "all":
            raise UserError(f"no split {split!r} in {where}; {nearest(name, sizes)}")
    infos = {
        name: tfds_splits.SplitInfo(name=name, shard_lengths=list(lengths), num_bytes=0)
        for name, lengths in sizes.items()
    }
    try:
        found = tfds_splits.AbstractSplit.from_spec(split).to_absolute(infos)
    # TFDS raises ValueError, NotImplementedError or AssertionError.
    except Exception as error:
        counts = ", ".join(f"{name} has {sum(lengths)}" for name, lengths in sizes.items())
        raise UserError(
            f"cannot take {split!r} of {where} ({counts} examples); a part is written such as"
            " 'train[10000:]', 'train[:10000]' or 'train[:90%]'"
        ) from error
    ranges = []
    for part in found:
        stop = sum(sizes[part.splitname]) if part.to is None else part.to
        ranges.append((part.splitname, part.from_ or 0, stop))
    return ranges


def overlap(parts: Sequence[Part], others: Sequence[Part]) -> bool:
    """Returns whether any example is in both."""
    by_split: dict[str, list[Part]] = {}
    for other in others:
        by_split.setdefault(other.split, []).append(other)
    return any(
        part.start < other.stop and other.start < part.stop
        for part in parts
        for other in by_split.get(part.split, ())
    )


def locate(stops: Sequence[int], index: int) -> tuple[int, int]:
    """Finds an element in a concatenation of runs.

    Args:
      stops: the end of each run; the first begins at 0.
      index: of the element, 0 <= index < stops[-1].

    Returns:
      The number of the run, and the number of the element in it.
    """
    run = bisect.bisect_right(stops, index)
    return run, index - (stops[run - 1] if run else 0)
