"""A config, checked once and resolved into frozen settings; the raw config travels no further."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from mbv2_jax import spec as spec_lib
from mbv2_jax import tasks
from mbv2_jax.command_line import flatten
from mbv2_jax.data.sources import Source
from mbv2_jax.errors import UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.runtime import processes, profiler
from mbv2_jax.spec import PER_DEVICE, ModelSpec, TrainingMode
from mbv2_jax.storage import bucket
from mbv2_jax.tasks.task import Task
from mbv2_jax.training import settings as settings_lib
from mbv2_jax.training.settings import (
    Checkpoint,
    Data,
    Distributed,
    Ema,
    Log,
    Optimizer,
    Run,
    Schedule,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked config.

    Attributes:
      given: every field by name ("model.width"), as the config has it; None where it is unset.
      run: the fields beside the sections.
      data, optimizer, schedule, ema, checkpoint, log, distributed: the sections that only training
        reads. The network and its preprocessing come from `resolve`.
    """

    given: Mapping[str, Any] = dataclasses.field(compare=False)
    run: Run
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    ema: Ema
    checkpoint: Checkpoint
    log: Log
    distributed: Distributed

    @property
    def task(self) -> type[Task]:
        """The class of the task."""
        return tasks.find(self.run.task)

    def to_dict(self, spec: ModelSpec) -> dict[str, Any]:
        """Returns the resolved config, nested, as config.json and checkpoints hold it."""
        values = dict(self.given) | spec.values()
        values["checkpoint.best_metric"] = self.checkpoint.best_metric
        nested: dict[str, Any] = {}
        for name, value in values.items():
            section, _, key = name.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[key] = value
        return nested


def read(config: ConfigDict) -> Settings:
    """Checks a config.

    Raises:
      UserError: the first field whose value is impossible.
    """
    given = {name: spec_lib.frozen(value) for name, value in flatten(config.to_dict()).items()}
    task = tasks.find(given["task"])
    for name, field in settings_lib.declared(given["task"]).items():
        if name not in given:
            raise UserError(
                f"the config has no field {name}: start from default.get_config({given['task']!r})"
            )
        if given[name] is None and (field.metadata["inherited"] or field.metadata["optional"]):
            continue
        fault = field.metadata["values"].fault(given[name])
        if fault:
            raise UserError(f"{name} {fault}")
    _check_combinations(given)
    sections: dict[str, Any] = {
        name: spec_lib.from_json(cls, _section(given, name))
        for name, cls in settings_lib.SECTIONS.items()
    }
    sections["checkpoint"] = _with_best_metric(sections["checkpoint"], task)
    return Settings(given=given, run=spec_lib.from_json(Run, given), **sections)


def without_groups(config: ConfigDict) -> ConfigDict:
    """Returns a copy of a config with model.bn_group_size 0.

    Only training uses that field, and not every batch size suits it.
    """
    config = config.copy_and_resolve_references()
    with config.ignore_type():  # it may be a number or a string
        config.model.bn_group_size = 0
    return config


def _section(given: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Returns the fields of a section by their names in it."""
    prefix = f"{section}."
    return {name.removeprefix(prefix): given[name] for name in given if name.startswith(prefix)}


def _with_best_metric(checkpoint: Checkpoint, task: type[Task]) -> Checkpoint:
    metric, known = checkpoint.best_metric or task.figures[0], (*task.figures, "loss")
    fault = spec_lib.choice(*known).fault(metric)
    if fault:
        raise UserError(f"checkpoint.best_metric {fault}")
    return dataclasses.replace(checkpoint, best_metric=metric)


def _check_combinations(given: Mapping[str, Any]) -> None:
    """Refuses values that are impossible with each other, or in this environment."""
    if given["model.dtype"] == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("model.dtype is 'float64': set JAX_ENABLE_X64=1 in the environment too")
    if not given["num_epochs"] and not given["fit_head"]:
        raise UserError(
            "num_epochs is 0, and nothing would be learned: give more, or set fit_head to fit the "
            "head alone"
        )
    profiler.parse(given["profile"])
    bucket.check_scheme(given["compilation_cache"] or "", "compilation_cache")
    if given["checkpoint.patience"] is not None and not given["checkpoint.keep_best"]:
        raise UserError(
            "checkpoint.patience needs the best checkpoint: set checkpoint.keep_best to 1 or more"
        )
    size, batch_size = given["model.bn_group_size"], given["batch_size"]
    name = "model.bn_group_size"
    if size == PER_DEVICE or not size:
        return
    if size > batch_size:
        raise UserError(f"{name} {size} is more than batch_size {batch_size}: give 0 for all of it")
    if batch_size % size:
        raise UserError(f"batch_size {batch_size} does not divide into groups of {name} {size}")


def resolve(
    settings: Settings,
    source: Source | None,
    saved: SavedModel | None = None,
    previous: Mapping[str, Any] | None = None,
) -> tuple[ModelSpec, Task]:
    """Returns the network and the task that a config describes.

    Args:
      settings: the config; the fields that it sets stay as they are.
      source: the training split, which decides whatever the task leaves to it; None where no data
        is opened.
      saved: the --checkpoint that training starts from, whose values fill the unset fields.
      previous: the nested config of the run that is continued, whose values come before those.

    Raises:
      UserError: the settings and the data disagree, or a convention has another value than in the
        checkpoint.
    """
    if saved is not None:
        _check_conventions(settings.given, saved)
    before = flatten(previous) if previous else {}
    starting = saved.spec.values() if saved else {}
    values = dict(settings.given)
    if saved and saved.spec.task != settings.run.task:  # whose head has fields of its own
        starting = {name: starting[name] for name in spec_lib.inherited()}
    for name, field in spec_lib.inherited(settings.task.Head).items():
        known = (values[name], before.get(name), starting.get(name), field.default)
        values[name] = spec_lib.frozen(next(value for value in known if value is not None))
    task = settings.task.for_training(values, source)
    mode = spec_lib.from_json(TrainingMode, _section(values, "model"))
    spec = ModelSpec(
        task=settings.run.task,
        backbone=task.backbone(spec_lib.from_json(spec_lib.Backbone, _section(values, "model"))),
        head=task.head,
        preprocessing=spec_lib.from_json(spec_lib.Preprocessing, _section(values, "data")),
        mode=mode,
    )
    return spec, task


def check_statistics(mode: TrainingMode) -> None:
    """Raises UserError for a training mode that its statistics or its roundings do not allow."""
    if mode.quantize == spec_lib.INT8 and not mode.norm_eval:
        raise UserError(
            "model.quantize is 'int8': normalisations are part of 8-bit weights, and must not "
            "change with each batch. Give --config.model.norm_eval=true, or "
            "--config.model.quantize=none"
        )
    if mode.quantize == spec_lib.INT8 and mode.dtype == "bfloat16":
        raise UserError(
            "model.quantize is 'int8' and model.dtype bfloat16, whose steps are wider than those "
            "of 8 bits: give --config.model.dtype=float32"
        )
    if mode.folded_norm and not mode.norm_eval:
        raise UserError(
            "model.folded_norm is True: the file of these weights had BatchNorm folded into its "
            "convolutions, and training with a batch's statistics would destroy them. Give "
            "--config.model.norm_eval=true"
        )


def on_devices(mode: TrainingMode, batch_size: int, devices: int) -> TrainingMode:
    """Returns a training mode whose bn_group_size is a number of examples, also for 'device'."""
    if mode.bn_group_size != PER_DEVICE:
        return mode
    return dataclasses.replace(mode, bn_group_size=batch_size // devices)


def evaluated_spec(
    settings: Settings, saved: SavedModel, overrides: Mapping[str, Any]
) -> ModelSpec:
    """Returns the spec with which a saved model is evaluated.

    Args:
      settings: the config, which decides the dtype.
      saved: the model.
      overrides: --config.KEY=VALUE of the command line, which win over the model and are reported.

    Raises:
      UserError: an override changes the shapes of the model's arrays.
    """
    if settings.run.task != saved.spec.task:
        raise UserError(
            f"{saved.path} is a model for {saved.spec.task!r}, and the config for "
            f"{settings.run.task!r}: give a config of its task"
        )
    changes: dict[str, Any] = {}
    for name, value in saved.spec.values().items():
        wanted = spec_lib.frozen(overrides.get(name))
        if wanted is None or wanted == value:
            continue
        field = spec_lib.inherited(settings.task.Head).get(name)
        in_floats = (name, wanted) == ("model.quantize", "none")  # the ranges are not used
        if field is None or (field.metadata["shapes"] and not in_floats):
            raise UserError(
                f"{name} is {wanted}, but {saved.path} was trained with {value}, and its arrays "
                "have those shapes"
            )
        processes.say(f"{name}: {wanted} instead of the checkpoint's {value}")
        changes[name] = wanted
    if "data.image_size" in changes and "data.eval_transforms" not in changes:
        # The crop follows image_size, but the edge that images are resized to is a fixed number.
        processes.say(f"data.eval_transforms is {saved.spec.preprocessing.eval_transforms}")
    mode = {"model.dtype": settings.given["model.dtype"]}
    return saved.spec.replace(changes | mode)


def _check_conventions(given: Mapping[str, Any], saved: SavedModel) -> None:
    """Refuses conventions whose values in the config are not the checkpoint's."""
    theirs = saved.spec.values()
    odd = [
        name
        for name, field in spec_lib.inherited().items()
        if field.metadata["convention"] and given[name] not in (None, theirs[name])
    ]
    if odd:
        faults = "; ".join(
            f"{name} is {given[name]}, the checkpoint's is {theirs[name]}" for name in odd
        )
        remedy = " ".join(f"--config.{name}={_quoted(theirs[name])}" for name in odd)
        raise UserError(f"{saved.path} does not fit: {faults}. To use it: {remedy}")


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, tuple) else str(value)
