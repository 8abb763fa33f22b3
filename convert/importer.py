"""The import of another framework's weights: arrays, conventions and class names -> a model."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

from mbv2_jax import spec as spec_lib
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import UserError, listed
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.model_json import Description
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing

from . import class_names as class_names_lib
from . import (
    classifier,
    download,
    heads,
    matching,
    own_file,
    published,
    readers,
    timm_config,
    transformers_config,
)
from . import fields as fields_lib
from .class_names import ClassNames
from .matching import Match
from .published import PublishedWeights
from .readers import ForeignFile

COMMAND = f"python -m {__package__}"  # for messages: convert in the clone, or mbv2_jax.convert


@dataclasses.dataclass(frozen=True)
class Imported:
    """An imported model and the report of its import.

    Attributes:
      saved: the model.
      summary: the facts that a person should check, by name.
      warnings: the assumptions, one line each.
    """

    saved: SavedModel
    summary: dict[str, str]
    warnings: list[str]


def load(
    source: str | os.PathLike[str],
    *,
    layout: str = "auto",
    ema: bool | None = None,
    drop_background: bool = False,
    features_only: bool = False,
    fields: Mapping[str, Any] | None = None,
    class_names: tuple[str, ...] = (),
) -> Imported:
    """Reads another framework's weights.

    Args:
      source: a file, a folder of timm or transformers, an https address, hf:OWNER/NAME[@REVISION],
        or the name of published weights.
      layout: a key of LAYOUTS, or "auto" to recognise it by the names in the file.
      ema: selects the averaged weights (True) or the raw ones (False) of a file that holds both;
        None selects those that its own framework would use.
      drop_background: whether to remove class 0 of a head with 1001 classes.
      features_only: whether to leave out whatever follows the backbone.
      fields: values of fields.SETTABLE, to use instead of the file's and of the layout's.
      class_names: names to use instead of the file's, one for each class that is kept.

    Raises:
      UserError: the source cannot be found or read, or is not this network; lists every fault.
    """
    fields = dict(fields or {})
    file = readers.read(download.locate(os.fspath(source)), ema=ema)
    known = published.PUBLISHED.get(os.fspath(source)) or published.identify(file.sha256)
    match = matching.match(file, layout, features_only=features_only)
    if drop_background:
        head, variables = classifier.without_background(file.path, match.head, match.variables)
        match = dataclasses.replace(match, head=head, variables=variables)
    stated = _stated(file, match, known)
    spec = _spec(file, match, stated.fields, fields)
    own = stated.class_names[1:] if drop_background else stated.class_names
    kind, count = heads.of(match.layout.task), getattr(match.head, "num_classes", None)
    names = class_names_lib.choose(class_names, own, count, kind.usual_names(match.head))
    # Published figures hold only for the original classes and conventions.
    card = None if fields or drop_background or features_only else stated.published
    description = Description(spec, names.names, _origin(file, match), card)
    saved = SavedModel(**match.variables, description=description, path=file.path)
    warnings = [
        *file.contents.guesses,
        *match.notes,
        *stated.notes,
        *_assumptions(match, spec, stated.fields.keys() | fields.keys()),
        *([] if features_only else kind.warnings(match.head, COMMAND)),
        *class_names_lib.warnings(names, own, COMMAND),
    ]
    return Imported(saved, _summary(saved, file, match, names), warnings)


@dataclasses.dataclass(frozen=True)
class _Stated:
    """The facts about a file beyond its arrays; empty where nothing is known.

    Attributes:
      fields: values of settable fields.
      class_names: in the order of the outputs.
      published: as in `Description`.
      notes: lines for the user about these facts.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    published: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def _stated(file: ForeignFile, match: Match, weights: PublishedWeights | None) -> _Stated:
    """Returns the facts in a file, in files beside it, or known from its publisher.

    Args:
      file, match: the file and its match.
      weights: the published weights that it is; None for another file.
    """
    own = own_file.description(file)
    if own is not None:
        return _Stated(fields_lib.settable(own.spec), own.classes, own.published)
    contents = file.contents
    if (beside := _beside(file, match)).fields:
        return dataclasses.replace(beside, class_names=beside.class_names or contents.class_names)
    if weights is None:
        return _Stated(contents.stated, contents.class_names)
    return _published(file, match, weights)


def _beside(file: ForeignFile, match: Match) -> _Stated:
    """Returns the facts in a config beside the weights, as timm and transformers write it."""
    if match.name == "timm":
        return _Stated(*timm_config.read(file.path))
    if match.name == "transformers":
        notes = transformers_config.notes(file.path, match.layout)
        return _Stated(*transformers_config.read(file.path, match.layout), notes=notes)
    return _Stated()


def _published(file: ForeignFile, match: Match, weights: PublishedWeights) -> _Stated:
    """Returns the facts about published weights, whose conventions are those of their figures."""
    usual = _usual_spec(file, match)
    conventions = dataclasses.replace(usual, preprocessing=weights.preprocessing)
    fields = fields_lib.settable(conventions)
    names = file.contents.class_names
    if not names and (known := heads.of(match.layout.task).usual_names(match.head)):
        names = known.names
    notes = tuple(
        f"the graph in the file has {name}={value}, and the published figures are for "
        f"{fields[name]}, which is used ({COMMAND} --set={name}={value} takes the graph's)"
        for name, value in file.contents.stated.items()
        if fields.get(name, value) != value
    )
    return _Stated(fields, names, weights.card(), notes)


def _usual_spec(file: ForeignFile, match: Match) -> ModelSpec:
    """Returns the network in a file with the conventions of its layout."""
    layout = match.layout
    mode = dataclasses.replace(layout.mode, folded_norm=file.contents.folded)
    return ModelSpec(layout.task, match.backbone, match.head, layout.preprocessing, mode)


def _spec(
    file: ForeignFile, match: Match, stated: Mapping[str, Any], given: Mapping[str, Any]
) -> ModelSpec:
    """Returns the network in a file with all its conventions.

    If only the image size is given, evaluation still sees the same share of an image: the edge in
    the usual evaluation transform is scaled with the size.

    Args:
      file, match: the file and its match, whose layout's conventions apply where nothing else is
        known.
      stated: the fields that are known for the file.
      given: the user's fields.
    """
    usual = _usual_spec(file, match)
    own = fields_lib.settable(usual)  # a backbone alone has no fields of a head
    stated = {name: value for name, value in stated.items() if name in own}
    spec = fields_lib.replace(usual, {**stated, **given})
    preprocessing = spec.preprocessing
    transforms, size = preprocessing.eval_transforms, preprocessing.image_size
    if pipeline.make_transform(transforms, size).random:
        raise UserError(
            f"data.eval_transforms {transforms!r} is random: evaluation must not be random"
        )
    if "data.eval_transforms" not in given:
        usual_size = usual.preprocessing.image_size
        if "data.eval_transforms" in stated:
            usual_size = stated.get("data.image_size", usual_size)
        scaled = _scaled(transforms, size, usual_size)
        preprocessing = dataclasses.replace(preprocessing, eval_transforms=scaled)
    return dataclasses.replace(spec, preprocessing=preprocessing)


def _scaled(transforms: str, size: int, usual_size: int) -> str:
    """Returns an evaluation transform with its edge in proportion to another image size."""
    return re.sub(
        r"resize_edge\((\d+)",
        lambda edge: f"resize_edge({int(edge[1]) * size // usual_size}",
        transforms,
    )


def _origin(file: ForeignFile, match: Match) -> dict[str, str]:
    """Returns the origin of a model, for model.json."""
    return {
        "kind": "converted, sha256 of the file",
        "sha256": file.sha256,
        "file": file.path.name,
        "layout": match.name,
        "weights": file.contents.selection,
    }


def _assumptions(match: Match, spec: ModelSpec, stated: set[str]) -> list[str]:
    """Returns a line about the fields that neither the file nor the user states; [] without any."""
    preprocessing = spec_lib.named(spec_lib.SECTIONS[Preprocessing], spec.preprocessing)
    open_fields = [name for name in (*match.layout.guesses, *preprocessing) if name not in stated]
    if not open_fields:
        return []
    values = spec.values()
    assumed = ", ".join(f"{name}={values[name]}" for name in dict.fromkeys(open_fields))
    return [f"the file does not say, and so it is assumed: {assumed} ({COMMAND} --set=FIELD=VALUE)"]


def _summary(
    saved: SavedModel, file: ForeignFile, match: Match, names: ClassNames
) -> dict[str, str]:
    """Returns the facts about an imported model, by name."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(saved.params))
    ignored = sum(match.ignored.values())
    used = len(file.tensors) - ignored - len(match.dropped)
    head = "no head" if match.head is None else heads.of(match.layout.task).summarize(match.head)
    unused = f"{ignored} ignored" + (f" ({', '.join(match.ignored)})" if ignored else "")
    card = saved.description.published
    ends = dict.fromkeys([*names.names[:1], *names.names[-1:]])  # one class has one name
    first_and_last = f": {' ... '.join(map(repr, ends))}" if ends else ""
    backbone, mode, images = saved.spec.backbone, saved.spec.mode, saved.spec.preprocessing
    layout = f"{match.name} ({match.layout.owner})"
    if match.prefix != match.layout.prefix:
        layout += f", its backbone's names begin with {match.prefix!r}"
    if match.dropped:
        unused += f", left out: {listed(match.dropped, 20, ', ')}"
    return {
        "file": f"{file.path} ({file.container})",
        "SHA-256": file.sha256,
        "published": f"{published.figures(card)} ({card['source']})"
        if card
        else "no figures are known of these weights",
        "layout": layout,
        "weights": file.contents.selection or "all of the file",
        "network": f"MobileNetV2, {_size(saved.spec)}, {head}, {parameters:,} parameters",
        "arrays": f"{used} used, {unused}",
        "classes": names.origin + first_and_last,
        "conventions": f"padding {backbone.padding}, bn_epsilon {backbone.bn_epsilon}, "
        f"bn_momentum {mode.bn_momentum}, dropout {mode.dropout}",
        "evaluation": f"{images.eval_transforms} with size={images.image_size}, then "
        f"(pixel - {images.mean}) / {images.std}",
    }


def _size(spec: ModelSpec) -> str:
    """Returns the width and, where they are not the paper's, depth and output stride in words."""
    backbone = spec.backbone
    words = [f"width {backbone.width}"]
    words += [f"depth {backbone.depth}"] if backbone.depth != 1 else []
    if backbone.output_stride != Backbone.output_stride:
        words.append(f"output stride {backbone.output_stride}")
    return ", ".join(words)
