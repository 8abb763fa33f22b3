"""A dataset's labels as a model's: each becomes the index of the same class in the model."""

import collections
import difflib
import re
from collections.abc import Sequence
from typing import Any

from mbv2_jax.data import classes
from mbv2_jax.data.sources import Source
from mbv2_jax.errors import UserError


class Relabelled:
    """A split with a model's labels; its images, their order and their names stay.

    Args:
      source: the split.
      labels: of each of its classes, as `match` gives them.
      class_names: the model's.
    """

    def __init__(self, source: Source, labels: Sequence[int], class_names: Sequence[str]):
        self.class_names = tuple(class_names)
        self._source, self._labels = source, tuple(labels)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        label = example["label"]
        # A negative one says that there is none, which is the loader's to refuse.
        return example | {"label": self._labels[label] if label >= 0 else label}

    def describe(self, index: int) -> str:
        return self._source.describe(index)


def match(
    theirs: Sequence[str], ours: Sequence[str], *, data: str, model: str
) -> tuple[tuple[int, ...], str]:
    """Finds each of a dataset's classes among a model's.

    They are the same where the names are equal and stand for one class only; where the dataset's
    name is the WordNet id of a class of an ImageNet model; where all the dataset's names are
    numbers, which the model's classes do not have for names: they count as the logits do; and, each
    by its place, where both lists are ImageNet's in another wording, or have equally many names and
    share none.

    Args:
      theirs: class names of the dataset, in the order of its labels.
      ours: class names of the model, in the order of its logits.
      data: the dataset's name, for messages.
      model: the model's.

    Returns:
      For each of the dataset's classes the model's index; and a sentence that says how they were
      matched, empty where the lists are one and the same.

    Raises:
      UserError: a class of the dataset that the model does not have, or that could be two of them.
    """
    if tuple(theirs) == tuple(ours):
        return tuple(range(len(ours))), ""
    offset = classes.imagenet_offset(ours)
    ids = (
        {} if offset is None else {id_: offset + i for i, id_ in enumerate(classes.IMAGENET_WNIDS)}
    )
    index = {name: ours.index(name) for name in _unique(ours)} | ids
    known = _unique(theirs) & index.keys()
    missing = [name for name in theirs if name not in known]
    if not missing:
        by_id = known <= ids.keys()
        whose = "ImageNet's 1000 classes" if by_id else f"{model}'s {len(ours)} classes"
        how = f"{data}: {len(theirs)} of {whose}, by {'WordNet id' if by_id else 'name'}"
        return tuple(index[name] for name in theirs), how
    # An id has no other wording: one that is not known is of another class.
    strange_id = offset is not None and any(re.fullmatch(r"n\d{8}", name) for name in missing)
    if strange_id:
        raise UserError(_stranger(missing, ours, data, model))
    numbers = () if set(theirs) & set(ours) else _numbers(theirs)
    if numbers:
        return _by_number(theirs, numbers, ours, data, model)
    start = classes.imagenet_offset(theirs)
    if offset is not None and start is not None:
        if start > offset:
            raise UserError(f"{model} has no class {theirs[0]!r}, which is the first of {data}")
        how = f"{data}: ImageNet's classes in another wording, by their order"
        return tuple(offset - start + i for i in range(len(theirs))), how
    if known or set(theirs) & set(ours):
        raise UserError(_stranger(missing, ours, data, model))
    return _by_place(theirs, ours, data, model)


def _by_number(
    theirs: Sequence[str], numbers: tuple[int, ...], ours: Sequence[str], data: str, model: str
) -> tuple[tuple[int, ...], str]:
    """Takes names for the model's indices: by their places folders come as '0', '1', '10', '2'."""
    if max(numbers) >= len(ours):
        raise UserError(
            f"{model} has the classes 0 to {len(ours) - 1}, and {data} one named "
            f"{theirs[numbers.index(max(numbers))]!r}"
        )
    return numbers, f"{data}: {len(theirs)} of {model}'s {len(ours)} classes, by number"


def _by_place(
    theirs: Sequence[str], ours: Sequence[str], data: str, model: str
) -> tuple[tuple[int, ...], str]:
    """Takes other names throughout for another vocabulary, which they are as likely as classes."""
    first = f"class 0 is {ours[0]!r} in {model} and {theirs[0]!r} in {data}; no name is shared"
    if len(theirs) != len(ours):
        raise UserError(f"{model} has {len(ours)} classes, {data} {len(theirs)}: {first}")
    return tuple(range(len(ours))), f"{first}: taken as the same classes in the same order"


def same(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether two lists are of the same classes in the same order: equal, or both ImageNet's.

    ImageNet's are called by WordNet ids, as by folders and TFDS, or by names in anyone's wording.
    """
    if tuple(theirs) == tuple(ours):
        return True
    return classes.imagenet_offset(theirs) == classes.imagenet_offset(ours) == 0


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    """The names as numbers; () where one is none, or two are the same."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return ()
    numbers = tuple(map(int, names))
    return numbers if len(set(numbers)) == len(numbers) else ()


def _unique(names: Sequence[str]) -> set[str]:
    """The names that stand for one class; ImageNet has a crane that flies and one that lifts."""
    return {name for name, count in collections.Counter(names).items() if count == 1}


def _stranger(missing: Sequence[str], ours: Sequence[str], data: str, model: str) -> str:
    """Returns what to say of classes that cannot be found: the first, and how many there are."""
    name = missing[0]
    if name in ours:
        return (
            f"{name!r} names more than one class of {model} or of {data}: give the folders names "
            "of their own, to ImageNet's classes WordNet ids"
        )
    close = difflib.get_close_matches(name, ours, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    more = f", nor {len(missing) - 1} more of them" if len(missing) > 1 else ""
    return f"{model} has no class {name!r}, which is one of {data}{more}{hint}"
