"""The head of converted weights for classification.

The number of classes comes from the arrays; the background class can be removed. No other module of
the conversion knows the classifier.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbv2_jax.data import classes
from mbv2_jax.errors import UserError
from mbv2_jax.tasks.classification.settings import Head

from .layouts import Array

LAYER = "classifier"  # our name of the dense layer
BACKGROUND = "background"  # the name of class 0 where a head has 1001


@dataclasses.dataclass(frozen=True)
class ClassNames:
    """The names of the classes in the order of the logits, and their origin for messages."""

    names: tuple[str, ...]
    origin: str


def read_head(tensors: Mapping[str, np.ndarray], arrays: Mapping[str, Array]) -> Head | None:
    """Returns the classifier in a file; None where the file holds a backbone alone.

    Args:
      tensors: the file's.
      arrays: the layout's arrays by name.
    """
    for name, array in arrays.items():
        if LAYER in array.path and name in tensors:
            shape = tensors[name].shape
            if len(shape) == len(array.axes):
                return Head(num_classes=shape[array.axes[-1]])
    return None


def without_background(
    path: pathlib.Path, head: Head | None, variables: Mapping[str, Any]
) -> tuple[Head, dict[str, Any]]:
    """Returns the head and the variables of a network without its class 0.

    Raises:
      UserError: there are not 1001 classes.
    """
    if head is None or head.num_classes != 1001:
        raise UserError(
            "dropping the background is for heads of 1001 classes, of which it is the first; "
            f"{path} has {'no' if head is None else head.num_classes} classes"
        )
    params = dict(variables["params"])
    params[LAYER] = {
        name: np.ascontiguousarray(array[..., 1:]) for name, array in params[LAYER].items()
    }
    return Head(num_classes=1000), {**variables, "params": params}


def choose_names(given: Sequence[str], own: Sequence[str], head: Head | None) -> ClassNames:
    """Returns the names of the classes: those given, else the file's, ImageNet's, or numbers.

    Args:
      given: the user's; () for none.
      own: the file's; () where it has none.
      head: the classifier.

    Raises:
      UserError: a name is not printable, or the number of given names is not that of the classes.
    """
    unprintable = [name for name in given or own if not name.isprintable()]
    if unprintable:
        raise UserError(
            f"a class name is not printable: {unprintable[0]!a}; --class-names=FILE gives others"
        )
    if head is None:
        return ClassNames((), "none")
    count = head.num_classes or 0
    if given and len(given) != count:
        raise UserError(f"{len(given)} class names were given, but there are {count} classes")
    if given:
        return ClassNames(tuple(given), "as given")
    if len(own) == count:
        return ClassNames(tuple(own), "the file's")
    if not own and count in (1000, 1001):
        background = (BACKGROUND,) * (count - 1000)
        return ClassNames((*background, *classes.IMAGENET_NAMES), "ImageNet's")
    return ClassNames(tuple(map(str, range(count))), "numbers")


def warnings(chosen: ClassNames, own: Sequence[str], head: Head | None, command: str) -> list[str]:
    """Returns the assumptions about the head, a line each.

    Args:
      chosen, own, head: from `choose_names`, and its arguments.
      command: the beginning of a command that converts, such as "python -m convert".
    """
    if head is None:
        return ["there is no classifier in the file: the model gives features only"]
    count = head.num_classes or 0
    lines = []
    if count == 1001:
        lines.append(
            f"of 1001 classes the first is the background ({command} --drop-background leaves it "
            "out)"
        )
    if chosen.origin in ("ImageNet's", "numbers"):
        found = f"names {len(own)} classes and has {count}" if own else "names no classes"
        instead = "they are numbered" if chosen.origin == "numbers" else "ImageNet's names are used"
        lines.append(f"the file {found}: {instead} ({command} --class-names=FILE gives others)")
    return lines


def summarize(head: Head | None) -> str:
    """Returns the size of the classifier in words."""
    return "no classifier" if head is None else f"{head.num_classes} classes"


def figures(published: Mapping[str, Any]) -> str:
    """Returns published figures in words."""
    return f"{published['top1']} top-1, {published['top5']} top-5"
