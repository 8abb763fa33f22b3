"""The contents of model.json: everything about a model except its arrays.

    {"format": 2, "task": "classification",
     "backbone": {"name": "mobilenet_v2", "width": 1.0, ...}, "head": {"num_classes": 1000},
     "preprocessing": {"image_size": 224, ...}, "training": {"dropout": 0.0, "bn_momentum": 0.9},
     "classes": ["tench", ...], "origin": {...}, "published": {...}}

The fields are those of spec.py and of the task's head. Files of format 1 are read as well.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from mbv2_jax import spec as spec_lib
from mbv2_jax import tasks
from mbv2_jax.errors import UserError
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode

FORMAT = 2
NAME = "mobilenet_v2"  # of the backbone

# Fields that are missing in files written before the field existed.
_LATER = {
    "backbone": ("output_stride", "depth", "fixed_ends", "divisor", "last_convolution"),
    "head": ("hidden",),
    "training": ("dropout", "folded_norm", "quantize"),
}

# The sections of format 1 in which the fields of each of today's sections stand.
_FORMAT_1 = {
    "backbone": {
        "name": "architecture",
        "width": "architecture",
        "strides": "architecture",
        "padding": "conventions",
        "bn_epsilon": "conventions",
    },
    "head": {"num_classes": "architecture"},
    "training": {"dropout": "conventions", "bn_momentum": "conventions"},
}


@dataclasses.dataclass(frozen=True)
class Description:
    """A model without its arrays.

    Attributes:
      spec: the network and its preprocessing.
      classes: the names of the classes in the order of the outputs; () for a backbone alone.
      origin: where the model came from; a "sha256" identifies it.
      published: {figure: value, ..., "examples", "source"}: the figures that the publisher of these
        weights reported for them, and on how many examples; None where nothing is known.
    """

    spec: ModelSpec
    classes: tuple[str, ...]
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of model.json."""
        spec = self.spec
        info: dict[str, Any] = {
            "format": FORMAT,
            "task": spec.task,
            "backbone": {"name": NAME, **spec_lib.to_json(spec.backbone)},
            "head": None if spec.head is None else spec_lib.to_json(spec.head),
            "preprocessing": spec_lib.to_json(spec.preprocessing),
            "training": spec_lib.to_json(spec.mode, spec_lib.KEPT),
            "classes": list(self.classes),
            "origin": dict(self.origin),
        }
        if self.published is not None:
            info["published"] = dict(self.published)
        return info


def is_model(path: pathlib.Path) -> bool:
    """Returns whether a folder, on a disk or in a bucket, holds a model directory and no more."""
    return path.is_dir() and {child.name for child in path.iterdir()} == {"arrays", "model.json"}


def parse(info: Any) -> Description:
    """Reads the contents of model.json.

    Raises:
      UserError: the format or the task is unknown, or a value is missing or impossible; the message
        lists every fault.
    """
    found = info.get("format") if isinstance(info, dict) else None
    if found not in (1, FORMAT):
        raise UserError(f"has format {found!r}; this version reads 1 and {FORMAT}")
    if found == 1:
        info = _upgraded(info)
    task = info.get("task")
    head_type = tasks.settings(task).Head if isinstance(task, str) else None
    if head_type is None:
        raise UserError(f"is damaged: task is {task!r}")
    faults = _faults(info, head_type)
    if faults:
        raise UserError(f"is damaged: {'; '.join(faults)}")
    head = info["head"]
    return Description(
        spec=ModelSpec(
            task=task,
            backbone=spec_lib.from_json(Backbone, info["backbone"]),
            head=None if head is None else spec_lib.from_json(head_type, head),
            preprocessing=spec_lib.from_json(Preprocessing, info["preprocessing"]),
            mode=spec_lib.from_json(TrainingMode, info["training"]),
        ),
        classes=tuple(info["classes"]),
        origin=info.get("origin", {}),
        published=info.get("published"),
    )


def _upgraded(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of a file of format 1 as those of today's format."""
    upgraded: dict[str, Any] = {"task": info.get("task", "classification")}
    for section, fields in _FORMAT_1.items():
        upgraded[section] = {
            name: info[old][name]
            for name, old in fields.items()
            if isinstance(info.get(old), dict) and name in info[old]
        }
    if upgraded["head"] == {"num_classes": None}:
        upgraded["head"] = None
    kept = {name: info[name] for name in ("preprocessing", "origin", "published") if name in info}
    return upgraded | kept | {"classes": info.get("class_names")}


def _faults(info: Mapping[str, Any], head_type: type) -> list[str]:
    """Returns a line for each missing or impossible value without which no model can be built."""
    backbone, head = info.get("backbone"), info.get("head")
    faults = _section_faults(info, "backbone", Backbone)
    if isinstance(backbone, dict) and backbone.get("name") != NAME:
        faults.append(f"backbone.name is not {NAME!r}")
    if head is not None:
        faults += _section_faults(info, "head", head_type)
    faults += _section_faults(info, "preprocessing", Preprocessing)
    faults += _section_faults(info, "training", TrainingMode, spec_lib.KEPT)
    names = info.get("classes")
    if not isinstance(names, list):
        faults.append("classes is missing")
    elif not all(isinstance(name, str) and name.isprintable() for name in names):
        faults.append("classes are not all printable text")
    elif isinstance(head, dict) or head is None:
        count = (head or {}).get("num_classes", 0 if head is None else len(names))
        if len(names) != count:
            faults.append(f"classes are {len(names)}, head.num_classes is {count}")
    if "published" in info and not _is_card(info["published"]):
        faults.append("published is not {figures, examples, source}")
    return faults


def _section_faults(
    info: Mapping[str, Any], section: str, cls: type, names: tuple[str, ...] | None = None
) -> list[str]:
    """Returns a line for each field of a section that is missing or impossible."""
    values = info.get(section)
    if not isinstance(values, dict):
        return [f"{section} is missing"]
    wanted = names or tuple(f.name for f in dataclasses.fields(cls))
    present = {name: values[name] for name in wanted if name in values}
    later = _LATER.get(section, ())
    missing = [name for name in wanted if name not in present and name not in later]
    faults = [f"{section}.{name} is missing" for name in missing]
    return faults + spec_lib.faults(cls, present, section)


def _is_card(card: Any) -> bool:
    return (
        isinstance(card, dict)
        and isinstance(card.get("source"), str)
        and "examples" in card
        and all(spec_lib.is_number(value) for name, value in card.items() if name != "source")
    )
