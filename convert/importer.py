"""Another framework's weights -> a model of ours: arrays, conventions, class names."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mbv2_jax import model_dir
from mbv2_jax.data import classes
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import UserError, nearest
from mbv2_jax.models.mobilenet_v2 import MobileNetV2

from . import download, matching, published, readers, transformers_config
from .matching import Match
from .readers import ForeignFile

# The config fields that a person may set; the arrays decide the other two.
SETTABLE = tuple(
    name for name in model_dir.FIELDS if name not in ("model.width", "model.num_classes")
)

PREPROCESSING = ("data.image_size", "data.eval_transforms", "data.mean", "data.std")
COMMAND = f"python -m {__package__}"  # for messages: convert in the clone, or mbv2_jax.convert
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
    stated = _stated(file, match)
    usual = {"model.strides": tuple(MobileNetV2.strides), **match.layout.conventions}
    usual |= stated.fields
    conventions = usual | fields
    _check(conventions)
    if "data.eval_transforms" not in fields:
        conventions["data.eval_transforms"] = _scaled(usual, conventions["data.image_size"])
    own = stated.class_names[1:] if drop_background else stated.class_names
    names, names_from = _class_names(class_names, own, match.num_classes)
    shape = {"model.width": match.width, "model.num_classes": match.num_classes}
    origin = {
        "kind": "converted, sha256 of the file",
        "sha256": file.sha256,
        "file": file.path.name,
        "layout": match.name,
        "weights": file.weights,
    }
    # Figures were published for the weights as they were: all classes, and their conventions.
    card = None if fields or drop_background else stated.published
    info = model_dir.describe(conventions | shape, names, origin, card)
    saved = model_dir.SavedModel(**match.variables, info=info, path=file.path)
    said = stated.fields.keys() | fields.keys()
    assumed = [name for name in (*match.layout.guesses, *PREPROCESSING) if name not in said]
    warnings = [
        *file.guesses,
        *_assumptions({name: conventions[name] for name in assumed}),
        *_about_classes(names_from, match.num_classes, len(own)),
    ]
    return Imported(saved, _summary(saved, file, match, names_from), warnings)


@dataclasses.dataclass(frozen=True)
class _Stated:
    """What is known of a file beyond its arrays; empty where nothing is."""

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    published: Mapping[str, Any] | None = None


def _stated(file: ForeignFile, match: Match) -> _Stated:
    """Returns what a file says of itself, or files beside it, or whoever published it."""
    if "model.json" in file.metadata:
        return _own_description(file)
    if match.name == "transformers":
        return _Stated(*(transformers_config.read(file.path) or ()))
    known = published.identify(file.sha256)
    if known is None:
        return _Stated(class_names=file.class_names)
    _, weights = known
    fields = dict(match.layout.conventions) | {
        "data.image_size": weights.image_size,
        "data.eval_transforms": weights.eval_transforms,
    }
    card = {"top1": weights.top1, "top5": weights.top5, "examples": 50000, "source": weights.source}
    return _Stated(fields, file.class_names or classes.IMAGENET_NAMES, card)  # all of 1000 classes


def _own_description(file: ForeignFile) -> _Stated:
    """Reads the model.json which our own .safetensors files carry."""
    try:
        info = json.loads(file.metadata["model.json"])
    except ValueError as error:
        raise UserError(f"{file.path}: model.json in its metadata is damaged: {error}") from None
    faults = model_dir.info_faults(info) if isinstance(info, dict) else ["it is no object"]
    if faults:
        raise UserError(f"{file.path}: model.json in its metadata: {'; '.join(faults)}")
    fields = {name: info[section][key] for name, (section, key) in model_dir.FIELDS.items()}
    settable = {name: fields[name] for name in SETTABLE}
    return _Stated(settable, tuple(info["class_names"]), info.get("published"))


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


def _scaled(usual: Mapping[str, Any], size: int) -> str:
    """Returns the usual evaluation transform with its edge in proportion to another image size."""
    return re.sub(
        r"resize_edge\((\d+)",
        lambda match: f"resize_edge({int(match[1]) * size // usual['data.image_size']}",
        usual["data.eval_transforms"],
    )


def _check(conventions: Mapping[str, Any]) -> None:
    """Refuses what a person, or files beside the weights, set to something impossible."""
    for name in conventions.keys() - set(SETTABLE):
        raise UserError(f"{name} cannot be set; {nearest(name, SETTABLE)}")
    faults = model_dir.field_faults(conventions)
    if faults:
        raise UserError("; ".join(faults))
    spec = conventions["data.eval_transforms"]
    if pipeline.make_transform(spec, conventions["data.image_size"]).random:
        raise UserError(f"data.eval_transforms {spec!r} is random: evaluation must not be")


def _class_names(
    given: tuple[str, ...], own: tuple[str, ...], num_classes: int | None
) -> tuple[tuple[str, ...], str]:
    """Returns the names in the order of the logits, and where they are from."""
    odd = [name for name in given or own if not name.isprintable()]
    if odd:
        raise UserError(
            f"a class name is not printable: {odd[0]!a}; --class-names=FILE gives others"
        )
    if num_classes is None:
        return (), "none"
    if given and len(given) != num_classes:
        raise UserError(f"{len(given)} class names were given, there are {num_classes} classes")
    if given:
        return given, "as given"
    if len(own) == num_classes:
        return own, "the file's"
    if not own and num_classes in (1000, 1001):
        background = (BACKGROUND,) * (num_classes - 1000)
        return (*background, *classes.IMAGENET_NAMES), "ImageNet's"
    return tuple(map(str, range(num_classes))), "numbers"


def _assumptions(values: Mapping[str, Any]) -> list[str]:
    if not values:
        return []
    listed = ", ".join(f"{name}={value}" for name, value in values.items())
    return [f"the file does not say, and so it is assumed: {listed} ({COMMAND} --set=FIELD=VALUE)"]


def _about_classes(names_from: str, num_classes: int | None, own: int) -> list[str]:
    if num_classes is None:
        return ["there is no classifier in the file: the model gives features only"]
    lines = []
    if num_classes == 1001:
        lines.append(
            f"of 1001 classes the first is the background ({COMMAND} --drop-background leaves it "
            "out)"
        )
    if names_from in ("ImageNet's", "numbers"):
        what = f"names {own} classes and has {num_classes}" if own else "names no classes"
        instead = "they are numbered" if names_from == "numbers" else "ImageNet's names are taken"
        lines.append(f"the file {what}: {instead} ({COMMAND} --class-names=FILE gives others)")
    return lines


def _summary(
    saved: model_dir.SavedModel, file: ForeignFile, match: Match, names_from: str
) -> dict[str, str]:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(saved.params))
    head = f"{match.num_classes} classes" if match.num_classes else "no classifier"
    ignored = f" ({', '.join(match.layout.ignored.values())})" if match.ignored else ""
    card = saved.published
    names = saved.class_names
    conventions = ("model.padding", "model.bn_epsilon", "model.bn_momentum", "model.dropout")
    mean, std = saved.field("data.mean"), saved.field("data.std")
    size, spec = saved.field("data.image_size"), saved.field("data.eval_transforms")
    return {
        "file": f"{file.path} ({file.container})",
        "SHA-256": file.sha256,
        "published": f"{card['top1']} top-1, {card['top5']} top-5 ({card['source']})"
        if card
        else "no figures are known of these weights",
        "layout": f"{match.name} ({match.layout.owner})",
        "weights": file.weights or "all of the file",
        "network": f"MobileNetV2, width {match.width}, {head}, {parameters:,} parameters",
        "arrays": f"{len(file.tensors) - match.ignored} used, {match.ignored} ignored{ignored}",
        "classes": names_from + (f": {names[0]!r} ... {names[-1]!r}" if names else ""),
        "conventions": ", ".join(f"{name[6:]} {saved.field(name)}" for name in conventions),
        "evaluation": f"{spec} with size={size}, then (pixel - {mean}) / {std}",
    }
