"""Matching of a dataset's classes with a model's, and sources with the model's labels."""

import collections
import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

from mbv2_jax.data import classes
from mbv2_jax.data.sample import Sample
from mbv2_jax.data.sources import Source
from mbv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """A source with a model's classes; its images, their order and their names stay the same.

    This class gives images their labels. A task whose targets hold classes otherwise overrides
    `targets`.

    Attributes:
      source: the split.
      matches: the model's class of each of the split's, from `match`.
      class_names: of the model.
    """

    source: Source
    matches: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def parts(self) -> Any:
        return self.source.parts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return dataclasses.replace(sample, targets=sample.targets | self.targets(sample))

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def targets(self, sample: Sample) -> dict[str, Any]:
        """Returns those targets of a sample of the split that hold classes, with the model's."""
        label = sample.targets.get("label", -1)
        if label < 0:  # unknown, or data for another task: the model's task refuses it
            return {}
        return {"label": self.matches[label]}


def match(
    theirs: Sequence[str], ours: Sequence[str], *, data: str, model: str
) -> tuple[tuple[int, ...], str]:
    """Finds each of a dataset's classes among a model's.

    Classes are matched, in this order:
    - by name, or by WordNet id if the model has ImageNet's classes; a name counts only if it stands
      for one class;
    - by number, if all the dataset's names are numbers and the model has none of these names: they
      are indices of the logits;
    - by position, if both lists are ImageNet's in different wordings, or if they have the same
      length and no name in common.

    Args:
      theirs: class names of the dataset, in the order of its labels.
      ours: class names of the model, in the order of its logits.
      data: the dataset's name, for messages.
      model: the model's name, for messages.

    Returns:
      The model's index of each of the dataset's classes; and a sentence for the user about how they
      were matched, "" if the lists are equal.

    Raises:
      UserError: the model lacks a class of the dataset, or has several of that name.
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
    # An id has no other wording: an unknown id is another class.
    if offset is not None and any(re.fullmatch(r"n\d{8}", name) for name in missing):
        raise UserError(_unmatched(missing, ours, data, model))
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
        raise UserError(_unmatched(missing, ours, data, model))
    return _by_position(theirs, ours, data, model)


def find(name: str, ours: Sequence[str]) -> int:
    """Finds a class that a user names among a model's classes.

    Args:
      name: the class's name, its number, its WordNet id if the classes are ImageNet's, or the first
        of its synonyms ("tench" of "tench, Tinca tinca").
      ours: class names of the model, in the order of its logits.

    Returns:
      Its index.

    Raises:
      UserError: there is no such class, or there are several.
    """
    offset = classes.imagenet_offset(ours)
    if name in _unique(ours):
        return ours.index(name)
    if re.fullmatch(r"[0-9]{1,9}", name) and int(name) < len(ours):
        return int(name)
    if offset is not None and name in classes.IMAGENET_WNIDS:
        return offset + classes.IMAGENET_WNIDS.index(name)
    named = [i for i, other in enumerate(ours) if name in (other, other.partition(",")[0])]
    if len(named) == 1:
        return named[0]
    if named:
        numbers = " or ".join(map(str, named))
        raise UserError(f"{name!r} names {len(named)} classes: give the number, {numbers}")
    close = difflib.get_close_matches(name, [other.partition(",")[0] for other in ours], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(
        f"there is no class {name!r}: {hint}give a name, or a number from 0 to {len(ours) - 1}; "
        f"class 0 is {ours[0]!r}"
    )


def _by_number(
    theirs: Sequence[str], numbers: tuple[int, ...], ours: Sequence[str], data: str, model: str
) -> tuple[tuple[int, ...], str]:
    """Matches names that are the model's indices; folders are sorted as '0', '1', '10', '2'."""
    if max(numbers) >= len(ours):
        raise UserError(
            f"{model} has the classes 0 to {len(ours) - 1}, and {data} one named "
            f"{theirs[numbers.index(max(numbers))]!r}"
        )
    return numbers, f"{data}: {len(theirs)} of {model}'s {len(ours)} classes, by number"


def _by_position(
    theirs: Sequence[str], ours: Sequence[str], data: str, model: str
) -> tuple[tuple[int, ...], str]:
    """Matches lists without a common name, which may be the same classes in other words."""
    first = f"class 0 is {ours[0]!r} in {model} and {theirs[0]!r} in {data}; no name is shared"
    if len(theirs) != len(ours):
        raise UserError(f"{model} has {len(ours)} classes, {data} {len(theirs)}: {first}")
    return tuple(range(len(ours))), f"{first}: taken as the same classes in the same order"


def same(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Returns whether two lists name the same classes in the same order: equal, or both ImageNet's.

    ImageNet's classes may be WordNet ids, as in folders and TFDS, or names in any common wording.
    """
    if tuple(theirs) == tuple(ours):
        return True
    return classes.imagenet_offset(theirs) == classes.imagenet_offset(ours) == 0


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    """Returns the names as numbers; () if one is not a number, or two are equal."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return ()
    numbers = tuple(map(int, names))
    return numbers if len(set(numbers)) == len(numbers) else ()


def _unique(names: Sequence[str]) -> set[str]:
    """Returns the names that stand for one class: in ImageNet a crane is a bird and a machine."""
    return {name for name, count in collections.Counter(names).items() if count == 1}


def _unmatched(missing: Sequence[str], ours: Sequence[str], data: str, model: str) -> str:
    """Returns a message about classes that the model does not have: the first and their number."""
    name = missing[0]
    if name in ours:
        return (
            f"{name!r} names more than one class of {model} or of {data}: give each folder a name "
            "of its own; for ImageNet's classes, WordNet ids"
        )
    close = difflib.get_close_matches(name, ours, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    more = f", nor {len(missing) - 1} more of them" if len(missing) > 1 else ""
    return f"{model} has no class {name!r}, which is one of {data}{more}{hint}"
