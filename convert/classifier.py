"""The head of converted weights for classification.

Its layers and the number of classes come from the arrays; the background class can be removed. No
other module of the conversion knows the classifier.
"""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mbv2_jax.data import classes
from mbv2_jax.errors import UserError, listed
from mbv2_jax.tasks.classification.settings import Head

from .layouts import Framework
from .readers.contents import Contents

LAYER = "classifier"  # our name of the dense layer to the logits
HIDDEN = "hidden_{}"  # and of those before it
_MOST_LAYERS = 20  # dense ones in a head
_LAST_NAMES = ("classifier", "logits", "predictions", "output", "out")
BACKGROUND = "background"  # the name of class 0 where a head has 1001


@dataclasses.dataclass(frozen=True)
class ClassNames:
    """The names of the classes in the order of the logits, and their origin for messages."""

    names: tuple[str, ...]
    origin: str


class _Layer(NamedTuple):
    """A dense layer of a file.

    Attributes:
      kernel: (inputs, outputs).
      bias: (outputs,); None where the layer has none.
      arrays: the names of both in the file.
    """

    kernel: np.ndarray
    bias: np.ndarray | None
    arrays: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FoundHead:
    """The head of a file.

    Attributes:
      spec: its fields; None where the file holds a backbone alone.
      params: the parameters of its layers, nested dicts of float32 numpy arrays.
      notes: the assumptions about it, one line each.
      faults: why it is no head of this network, one line each.
    """

    spec: Head | None
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def find_head(
    contents: Contents, rest: Mapping[str, np.ndarray], framework: Framework, channels: int
) -> FoundHead:
    """Returns the head in a file: dense layers with ReLU between them, the last one to logits.

    A layer may have any name. Their order is the file's own, where it describes its layers, and
    else the one in which each takes as many numbers as the one before gives.

    Args:
      contents: the file's.
      rest: its arrays that are not of the backbone.
      framework: its names for the arrays of layers.
      channels: that the backbone gives, pooled.
    """
    layers = _dense_layers(rest, framework)
    faults = list(contents.obstacles)
    if len(layers) > _MOST_LAYERS:
        many = f"it has {len(layers):,} dense layers or 1x1 convolutions, {_MOST_LAYERS} at most"
        return FoundHead(None, faults=(*faults, many))
    if others := no_dense(rest, framework):
        faults.append(f"not of this network: {listed(others, 20, ', ')}")
    if not layers and not faults:
        return FoundHead(None)
    described = contents.head
    if described is not None and {dense.name for dense in described} == layers.keys():
        chain, several = [dense.name for dense in described], False
    else:
        described = None
        chain, several = _chain(layers, channels)
    faults += _size_faults(layers, chain, channels)
    activations = {dense.name: dense.activation for dense in described or ()}
    faults += _activation_faults(chain, activations)
    if faults:
        return FoundHead(None, faults=tuple(faults))
    head = _built([layers[name] for name in chain], chain, activations)
    if not several:
        return head
    order = f"the dense layers fit in several orders: {', '.join(chain)} is assumed by their names"
    return dataclasses.replace(head, notes=(order, *head.notes))


def no_dense(rest: Mapping[str, np.ndarray], framework: Framework) -> list[str]:
    """Returns the names of the arrays that are of no dense layer."""
    used = {name for layer in _dense_layers(rest, framework).values() for name in layer.arrays}
    return sorted(name for name in rest if name not in used)


def _dense_layers(rest: Mapping[str, np.ndarray], framework: Framework) -> dict[str, _Layer]:
    """Returns the dense layers among some arrays by name; 1x1 convolutions are dense layers too."""
    found = {}
    separator, bias_name = framework.separator, framework.linear["bias"].name
    for name, array in rest.items():
        layer, _, variable = name.rpartition(separator)
        if not np.issubdtype(array.dtype, np.floating):
            continue
        if array.ndim == 2 and variable == framework.linear["kernel"].name:
            kernel = array.transpose(framework.linear["kernel"].axes)
        elif array.ndim == 4 and variable == framework.conv["kernel"].name:
            kernel = array.transpose(framework.conv["kernel"].axes)
            if kernel.shape[:2] != (1, 1):
                continue
            kernel = kernel[0, 0]
        else:
            continue
        names: tuple[str, ...] = (name,)
        bias = rest.get(f"{layer}{separator}{bias_name}")
        if bias is not None and bias.shape == kernel.shape[1:]:
            names = (name, f"{layer}{separator}{bias_name}")
        else:
            bias = None
        found[layer] = _Layer(kernel, bias, names)
    return found


def _chain(layers: Mapping[str, _Layer], channels: int) -> tuple[list[str], bool]:
    """Returns the names of dense layers in an order in which their sizes fit, if there is one.

    Of several such orders, as layers of equal sizes have, it is that of the numbers in their names,
    with a layer whose name is that of a last one at the end. The second value says whether there
    may be several.
    """
    chain: list[str] = []
    several = False
    remaining = sorted(layers, key=lambda name: (_last_part(name) in _LAST_NAMES, _natural(name)))
    while remaining:
        inputs = Counter(layers[name].kernel.shape[0] for name in remaining)
        fitting = [name for name in remaining if layers[name].kernel.shape[0] == channels]
        # After one of the others nothing could follow.
        continued = [
            name
            for name in fitting
            if inputs[outputs := layers[name].kernel.shape[1]] > (outputs == channels)
        ]
        several |= len(continued) > 1
        following = (continued or fitting or remaining)[0]
        remaining.remove(following)
        chain.append(following)
        channels = layers[following].kernel.shape[1]
    return chain, several


def _last_part(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a sorting key by which classifier.10 comes after classifier.9."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _size_faults(layers: Mapping[str, _Layer], chain: Sequence[str], channels: int) -> list[str]:
    """Returns a line for the first layer that does not take what comes before it."""
    before = "the backbone"
    for name in chain:
        inputs, outputs = layers[name].kernel.shape
        if inputs != channels:
            return [f"{name} takes {inputs:,} numbers, and {before} gives {channels:,}"]
        before, channels = name, outputs
    return []


def _activation_faults(chain: Sequence[str], activations: Mapping[str, str]) -> list[str]:
    """Returns a line for each activation that the head here does not have."""
    faults = []
    for place, name in enumerate(chain):
        last = place == len(chain) - 1
        possible = ("linear", "softmax", "sigmoid") if last else ("relu",)
        activation = activations.get(name)
        if activation and activation not in possible:
            faults.append(f"the activation of {name} is {activation}, not {possible[0]}")
    return faults


def _built(
    layers: Sequence[_Layer], names: Sequence[str], activations: Mapping[str, str]
) -> FoundHead:
    """Returns a head of layers that fit.

    One logit becomes two, 0 and the file's own, whose softmax is the logit's sigmoid.
    """
    notes = []
    params = {}
    if not all(activations.get(name) for name in names[:-1]):
        notes.append(f"the file does not say what lies between {', '.join(names)}: ReLU is assumed")
    hidden = tuple(layer.kernel.shape[1] for layer in layers[:-1])
    notes += [
        f"{n} has no bias" for n, layer in zip(names, layers, strict=True) if layer.bias is None
    ]
    for place, layer in enumerate(layers):
        kernel = np.ascontiguousarray(layer.kernel, np.float32)
        bias = np.zeros(kernel.shape[1]) if layer.bias is None else layer.bias
        ours = LAYER if place == len(hidden) else HIDDEN.format(place)
        params[ours] = {"kernel": kernel, "bias": np.ascontiguousarray(bias, np.float32)}
    classifier = params[LAYER]
    activation = activations.get(names[-1], "")
    if classifier["bias"].size == 1:
        params[LAYER] = {
            name: np.concatenate([np.zeros_like(array), array], -1)
            for name, array in classifier.items()
        }
        known = "" if activation == "sigmoid" else ", if it is the logit of a sigmoid"
        notes.append(
            f"the one output of {names[-1]} became two classes{known}: its own is the second"
        )
    elif activation == "sigmoid":
        notes.append(
            f"the outputs of {names[-1]} are sigmoids, of which several may be large; here the "
            "scores are a softmax of the same logits, and add up to 1"
        )
    return FoundHead(Head(params[LAYER]["bias"].size, hidden), params, tuple(notes))


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
    return dataclasses.replace(head, num_classes=1000), {**variables, "params": params}


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
    if not own and (imagenet := imagenet_names(head)):
        return ClassNames(imagenet, "ImageNet's")
    return ClassNames(tuple(map(str, range(count))), "numbers")


def imagenet_names(head: Head | None) -> tuple[str, ...]:
    """Returns ImageNet's names for 1000 classes, or 1001 with the background; () for others."""
    if head is None or head.num_classes not in (1000, 1001):
        return ()
    return (BACKGROUND,) * (head.num_classes - 1000) + classes.IMAGENET_NAMES


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
    if head is None:
        return "no classifier"
    widths = " and ".join(map(str, head.hidden))
    return f"{head.num_classes} classes" + (f" after hidden layers of {widths}" if widths else "")


def layers(head: Head | None) -> list[str]:
    """Returns our names of the head's dense layers, from the first to the last."""
    if head is None:
        return []
    return [*(HIDDEN.format(place) for place in range(len(head.hidden))), LAYER]


def figures(published: Mapping[str, Any]) -> str:
    """Returns published figures in words."""
    return f"{published['top1']} top-1, {published['top5']} top-5"
