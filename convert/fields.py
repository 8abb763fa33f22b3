"""The fields that weight files leave open: named as in a config, set by --set."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from mbv2_jax import spec as spec_lib
from mbv2_jax import tasks
from mbv2_jax.errors import UserError, nearest
from mbv2_jax.spec import SECTIONS, ModelSpec

T = TypeVar("T")

# All the fields that a model of any task keeps, except those that can be told from its arrays.
SETTABLE = tuple(
    dict.fromkeys(
        name
        for task in tasks.BUILT_IN
        for name, field in spec_lib.inherited(tasks.settings(task).Head).items()
        if not field.metadata["shapes"]
    )
)


def settable(spec: ModelSpec) -> dict[str, Any]:
    """Returns the values of the settable fields that a model has, by their names in a config."""
    values = spec.values()
    return {name: values[name] for name in SETTABLE if name in values}


def replace(spec: ModelSpec, values: Mapping[str, Any]) -> ModelSpec:
    """Returns `spec` with other values of some settable fields.

    Raises:
      UserError: a field is unknown or not settable, or a value is impossible; lists every fault.
    """
    own = settable(spec)
    for name in values:
        if name not in own:
            raise UserError(f"{name} cannot be set; {nearest(name, own)}")
    changed = dataclasses.replace(
        spec,
        backbone=_replace(spec.backbone, values),
        preprocessing=_replace(spec.preprocessing, values),
        mode=_replace(spec.mode, values),
        head=None if spec.head is None else _replace(spec.head, values),
    )
    parts = [changed.backbone, changed.preprocessing, changed.mode]
    parts += [] if spec.head is None else [changed.head]
    faults = [
        fault for part in parts for fault in spec_lib.faults(type(part), vars(part), _section(part))
    ]
    if faults:
        raise UserError("; ".join(faults))
    return changed


def _replace(part: T, values: Mapping[str, Any]) -> T:
    """Returns one dataclass of a spec with the values of its own fields."""
    section = _section(part)
    own = {
        field.name: spec_lib.frozen(values[f"{section}.{field.name}"])
        for field in dataclasses.fields(part)  # type: ignore[arg-type] # of the spec
        if f"{section}.{field.name}" in values
    }
    return dataclasses.replace(part, **own)  # type: ignore[type-var] # of the spec


def _section(part: Any) -> str:
    """Returns the section of a config with the fields of a dataclass; a head's are in "model"."""
    return SECTIONS.get(type(part), "model")
