"""The head of converted weights for classification.

Its layers and the number of classes come from the arrays; the background class can be removed. No
other module of the conversion knows its layers.
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
from mbv2_jax.models.mobilenet_v2 import feature_info
from mbv2_jax.tasks.classification.settings import Head

from .class_names import ClassNames
from .head import FoundHead
from .layouts import Array, Framework, Layout
from .readers import ForeignFile
from .recognition import Recognised

DESCRIPTION = "a classifier of dense layers"

LAYER = "classifier"  # our name of the dense layer to the logits
HIDDEN = "hidden_{}"  # and of those before it
_MOST_LAYERS = 20  # dense ones in a head
_LAST_NAMES = ("classifier", "logits", "predictions", "output", "out")
BACKGROUND = "background"  # the name of class 0 where a head has 1001


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


def find_head(file: ForeignFile, rest: Mapping[str, np.ndarray], found: Recognised) -> FoundHead:
    """Returns the head in a file: dense layers with ReLU between them, the last one to logits.

    A layer may have any name. Their order is the file's own, where it describes its layers, and
    else the one in which each takes as many numbers as the one before gives.

    Args:
      file, rest, found: see `heads.Kind`.
    """
    contents, framework = file.contents, found.layout.framework
    channels = list(feature_info(found.backbone).values())[-1].channels  # pooled
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
    return FoundHead(Head(params[LAYER]["bias"].size, hidden), params, notes=tuple(notes))


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


def usual_names(head: Head | None) -> ClassNames | None:
    """Returns ImageNet's names for 1000 classes, or 1001 with the background; None for others."""
    if head is None or head.num_classes not in (1000, 1001):
        return None
    background = (BACKGROUND,) * (head.num_classes - 1000)
    return ClassNames(background + classes.IMAGENET_NAMES, "ImageNet's")


def warnings(head: Head | None, command: str) -> list[str]:
    """Returns a line about a background among the classes, or about a head that is not there."""
    if head is None:
        return ["there is no classifier in the file: the model gives features only"]
    if head.num_classes != 1001:
        return []
    return [
        f"of 1001 classes the first is the background ({command} --drop-background leaves it out)"
    ]


def summarize(head: Head) -> str:
    """Returns the size of the classifier in words."""
    widths = " and ".join(map(str, head.hidden))
    return f"{head.num_classes} classes" + (f" after hidden layers of {widths}" if widths else "")


def misfits(layout: Layout, head: Head | None) -> list[str]:
    """Returns a line about hidden layers, which no framework's network has."""
    del layout
    hidden = () if head is None else head.hidden
    return [f"model.hidden is {hidden}, there it is ()"] if hidden else []


def arrays(layout: Layout, head: Head | None) -> dict[str, Array]:
    """Returns the position of each array of a head in our tree, by its whole name there."""
    hidden = 0 if head is None else len(head.hidden)
    layers = [] if head is None else [*map(HIDDEN.format, range(hidden)), LAYER]
    return {name: array for layer in layers for name, array in layout.dense(layer).items()}
