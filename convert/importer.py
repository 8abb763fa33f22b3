"""Another framework's weights -> a model of ours: arrays, conventions, class names."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mbv2_jax import model_dir
from mbv2_jax.data import classes, transforms
from mbv2_jax.errors import UserError, nearest
from mbv2_jax.models.mobilenet_v2 import MobileNetV2

from . import download, matching, published, readers
from .layouts import Layout
from .matching import Match
from .published import PublishedWeights
from .readers import ForeignFile

# The config fields that a person may set; the arrays decide the other two.
SETTABLE = tuple(
    name for name in model_dir.FIELDS if name not in ("model.width", "model.num_classes")
)

BACKGROUND = "background"  # the name of class 0 where a head has 1001


@dataclasses.dataclass(frozen=True)
class Imported:
    """What came of a file.

    Attributes:
      saved: the model.
      summary: what a person should check, by its name.
      warnings: what had to be assumed, a line each.
    """

    saved: model_dir.SavedModel
    summary: dict[str, str]
    warnings: list[str]


def load(
    source: str | os.PathLike[str],
    *,
    layout: str = "auto",
    ema: bool | None = None,
    drop_background: bool = False,
    fields: Mapping[str, Any] | None = None,
    class_names: tuple[str, ...] = (),
) -> Imported:
    """Reads another framework's weights.

    Args:
      source: a file, an https address, or the name of published weights.
      layout: a key of LAYOUTS, or "auto" to tell it from the names in the file.
      ema: the averaged weights (True) or the raw ones (False) of a file that holds both; None =
        those that its own framework would use.
      drop_background: leave out class 0 of a head with 1001 classes.
      fields: values of SETTABLE config fields, in place of the layout's conventions.
      class_names: in place of the file's; as many as there are classes, after dropping one.

    Raises:
      UserError: the source cannot be had or read, or is not this network; lists every fault.
    """
    fields = dict(fields or {})
    file = readers.read(download.locate(os.fspath(source)), ema=ema)
    match = matching.match(file, layout)
    if drop_background:
        match = _without_background(file, match)
    known, described = published.identify(file.sha256), _described(file)
    conventions = _conventions(match.layout, known, described) | fields
    _check(conventions)
    shape = {"model.width": match.width, "model.num_classes": match.num_classes}
    names, names_from = _class_names(class_names, described, file, match.num_classes)
    origin = {
        "kind": "converted, sha256 of the file",
        "sha256": file.sha256,
        "file": file.path.name,
        "layout": match.name,
        "weights": file.weights,
    }
    # Figures were published for the weights as they were: with 1000 classes, and these conventions.
    card = None if fields or drop_background else _card(known, described)
    info = model_dir.describe(conventions | shape, names, origin, card)
    saved = model_dir.SavedModel(**match.variables, info=info, path=file.path)
    assumed = [] if described else [*match.layout.guesses, *([] if known else ["data.image_size"])]
    warnings = [
        *file.guesses,
        *_assumptions({name: conventions[name] for name in assumed if name not in fields}),
        *_about_classes(names_from, match.num_classes, known),
    ]
    return Imported(saved, _summary(saved, file, match, known, names_from), warnings)


def _without_background(file: ForeignFile, match: Match) -> Match:
    """Takes class 0 out of the classifier."""
    if match.num_classes != 1001:
        raise UserError(
            "dropping the background is for heads of 1001 classes, of which it is the first; "
            f"{file.path} has {match.num_classes or 'no'} classes"
        )
    params = dict(match.variables["params"])
    params["classifier"] = {
        name: np.ascontiguousarray(array[..., 1:]) for name, array in params["classifier"].items()
    }
    variables = match.variables | {"params": params}
    return dataclasses.replace(match, num_classes=1000, variables=variables)


def _described(file: ForeignFile) -> dict[str, Any]:
    """Returns the model.json which our own .safetensors files carry; {} where there is none."""
    if "model.json" not in file.metadata:
        return {}
    try:
        info = json.loads(file.metadata["model.json"])
        for section, key in model_dir.FIELDS.values():
            info[section][key]
        return info | {"class_names": tuple(info["class_names"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file.path}: the model.json in its metadata is damaged: {error}"
        ) from None


def _conventions(
    layout: Layout, known: tuple[str, PublishedWeights] | None, described: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the SETTABLE fields: what the file says of itself, else what is the custom."""
    settled = {"model.strides": tuple(MobileNetV2.strides), **layout.conventions}
    if known:
        settled["data.image_size"] = known[1].image_size
        settled["data.eval_transforms"] = known[1].eval_transforms
    if described:
        places = {name: model_dir.FIELDS[name] for name in SETTABLE}
        settled |= {name: described[section][key] for name, (section, key) in places.items()}
    return settled


def _check(conventions: Mapping[str, Any]) -> None:
    """Refuses what a person, or a damaged file, set to something impossible."""
    for name, value in conventions.items():
        if name not in SETTABLE:
            raise UserError(f"{name} cannot be set; {nearest(name, SETTABLE)}")
        if name in ("data.mean", "data.std"):
            good = _numbers(value, 3) and (name == "data.mean" or min(value) > 0)
            wanted = "three numbers, of R, G and B, 0-255" + (", above 0" * (name == "data.std"))
        elif name == "model.padding":
            good, wanted = value in ("torch", "same"), "'torch' or 'same'"
        elif name == "data.image_size":
            good, wanted = type(value) is int and value > 0, "a number of pixels"
        elif name == "model.bn_epsilon":
            good, wanted = _numbers([value], 1) and value > 0, "a number above 0"
        elif name in ("model.bn_momentum", "model.dropout"):
            good, wanted = _numbers([value], 1) and 0 <= value <= 1, "a number from 0 to 1"
        elif name == "model.strides":
            good = isinstance(value, (tuple, list)) and len(value) == 8 and set(value) <= {1, 2}
            wanted = "8 numbers, each 1 or 2"
        else:
            good, wanted = isinstance(value, str), "a string such as resize_edge(256)|..."
        if not good:
            raise UserError(f"{name} is {value!r}: it must be {wanted}")
    transforms.make_transform(conventions["data.eval_transforms"], conventions["data.image_size"])


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, (tuple, list))
        and len(values) == count
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    )


def _class_names(
    given: tuple[str, ...],
    described: Mapping[str, Any],
    file: ForeignFile,
    num_classes: int | None,
) -> tuple[tuple[str, ...], str]:
    """Returns the names in the order of the logits, and where they are from."""
    if num_classes is None:
        return (), "none"
    if given:
        if len(given) != num_classes:
            raise UserError(f"{len(given)} class names were given, {file.path} has {num_classes}")
        return given, "as given"
    own = described.get("class_names") or file.class_names
    if len(own) in (num_classes, num_classes + 1):  # + 1: a background that was dropped
        return own[len(own) - num_classes :], "the file's"
    if num_classes in (1000, 1001):
        background = (BACKGROUND,) * (num_classes - 1000)
        return (*background, *classes.IMAGENET_NAMES), "ImageNet's"
    return tuple(map(str, range(num_classes))), "numbers"


def _card(
    known: tuple[str, PublishedWeights] | None, described: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns the figures that were published for the weights."""
    if known is None:
        return described.get("published")
    name, weights = known
    return {
        "top1": weights.top1,
        "top5": weights.top5,
        "examples": 50000,
        "source": f"{name}: {weights.source}",
    }


def _assumptions(values: Mapping[str, Any]) -> list[str]:
    if not values:
        return []
    listed = ", ".join(f"{name}={value}" for name, value in values.items())
    return [f"the file does not say, and so it is assumed: {listed}; --set=FIELD=VALUE changes it"]


def _about_classes(
    names_from: str, num_classes: int | None, known: tuple[str, PublishedWeights] | None
) -> list[str]:
    if num_classes is None:
        return ["there is no classifier in the file: the model gives features only"]
    lines = []
    if num_classes == 1001:
        lines.append("of 1001 classes the first is the background; --drop-background leaves it out")
    if names_from == "ImageNet's" and not known:
        lines.append(
            f"the file has no class names: as it has {num_classes} classes, ImageNet's are taken; "
            "--class-names=FILE gives others"
        )
    if names_from == "numbers":
        lines.append("the file has no class names: classes are numbered; or --class-names=FILE")
    return lines


def _summary(
    saved: model_dir.SavedModel,
    file: ForeignFile,
    match: Match,
    known: tuple[str, PublishedWeights] | None,
    names_from: str,
) -> dict[str, str]:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(saved.params))
    head = f"{match.num_classes} classes" if match.num_classes else "no classifier"
    lines = {
        "file": f"{file.path} ({file.container})",
        "SHA-256": file.sha256,
        "published as": f"{known[0]}: {known[1].top1} top-1, {known[1].top5} top-5 "
        f"({known[1].source})"
        if known
        else "unknown: not one of the published files in the list",
        "layout": f"{match.name} ({match.layout.owner})",
        "weights": file.weights or "the only ones",
        "network": f"MobileNetV2, width {match.width}, {head}, {parameters:,} parameters",
        "arrays": f"{len(file.tensors) - match.ignored} used, {match.ignored} ignored"
        + (f" ({', '.join(match.layout.ignored.values())})" if match.ignored else ""),
        "class names": names_from,
    }
    if saved.class_names:
        lines["class names"] += f": {saved.class_names[0]!r} ... {saved.class_names[-1]!r}"
    conventions = [
        f"{name.partition('.')[2]} {saved.field(name)}"
        for name in ("model.padding", "model.bn_epsilon", "model.bn_momentum", "model.dropout")
    ]
    lines["conventions"] = ", ".join(conventions)
    mean, std = saved.field("data.mean"), saved.field("data.std")
    size, spec = saved.field("data.image_size"), saved.field("data.eval_transforms")
    lines["evaluation"] = f"{spec} with size={size}, then (pixel - {mean}) / {std}"
    return lines
