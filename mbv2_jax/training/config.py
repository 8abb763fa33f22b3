"""Checks a run's config, and fills in what it leaves to the checkpoint or to the data."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mbv2_jax.command_line import flatten
from mbv2_jax.errors import UserError, nearest
from mbv2_jax.model_dir import FIELDS, SavedModel
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.runtime import processes, profiler

# What a field that is None means where no checkpoint says otherwise: the page's model.
DEFAULTS: dict[str, Any] = {
    "model.width": 1.0,
    "model.strides": tuple(MobileNetV2.strides),
    "model.dropout": 0.0,
    "model.padding": "torch",
    "model.bn_epsilon": 1e-5,
    "model.bn_momentum": 0.9,
    "data.image_size": 224,
    "data.eval_transforms": "resize_edge(256)|center_crop(size)",
    "data.mean": (123.675, 116.28, 103.53),
    "data.std": (58.395, 57.12, 57.375),
}

# Weights trained under one of these give wrong answers, or do not fit, under another.
CONVENTIONS = (
    "model.width",
    "model.padding",
    "model.bn_epsilon",
    "model.bn_momentum",
    "data.mean",
    "data.std",
)

OPTIONS: dict[str, Sequence[str]] = {
    "model.padding": ("torch", "same"),
    "model.dtype": ("float32", "bfloat16", "float64"),
    "data.last_batch": ("fill", "drop"),
    "data.train_decode": ("exact", "fast"),
    "data.corrupt": ("raise", "skip"),
    "optimizer.name": ("sgd", "rmsprop", "adamw"),
    "schedule.name": ("constant", "step", "exponential", "cosine"),
    "checkpoint.best_metric": ("top1", "top5", "loss"),
}

# What model.bn_group_size may be besides a number: each device's share of the batch.
PER_DEVICE = "device"

# Field -> (smallest, largest or None, whether the smallest itself is allowed).
RANGES: dict[str, tuple[float, float | None, bool]] = {
    "batch_size": (1, None, True),
    "num_epochs": (0, None, False),
    "seed": (0, 2**32 - 1, True),
    "label_smoothing": (0, 1, True),
    "mixup_alpha": (0, 100, True),  # of what is published 1 is the largest; 100 is half and half
    "cutmix_alpha": (0, 100, True),
    "model.width": (0, None, False),
    "model.num_classes": (1, None, True),
    "model.dropout": (0, 1, True),
    "model.bn_epsilon": (0, None, False),
    "model.bn_momentum": (0, 1, True),
    "model.frozen_stages": (-1, 7, True),
    "data.image_size": (1, None, True),
    "data.workers": (0, None, True),
    "data.repeats": (1, None, True),
    "optimizer.momentum": (0, 1, True),
    "optimizer.rms_decay": (0, 1, True),
    "optimizer.epsilon": (0, None, True),
    "optimizer.weight_decay": (0, None, True),
    "optimizer.clip_norm": (0, None, False),
    "schedule.base_lr": (0, None, True),
    "schedule.reference_batch_size": (1, None, True),
    "schedule.warmup_epochs": (0, None, True),
    "schedule.warmup_start": (0, 1, True),
    "schedule.factor": (0, None, True),
    "schedule.decay_epochs": (0, None, False),
    "schedule.min_lr": (0, None, True),
    "ema.decay": (0, 1, True),
    "ema.every_steps": (1, None, True),
    "checkpoint.every_epochs": (0, None, False),
    "checkpoint.every_steps": (1, None, True),
    "checkpoint.keep_last": (1, None, True),
    "checkpoint.keep_best": (0, None, True),
    "log.every_steps": (1, None, True),
    "log.eval_every_epochs": (0, None, False),
}


def check(config: ConfigDict) -> None:
    """Raises UserError at the first field whose value is impossible; None is left to `resolve`."""
    flat = flatten(config.to_dict())
    for name, options in OPTIONS.items():
        if flat[name] is not None and flat[name] not in options:
            raise UserError(f"{name} is {flat[name]!r}: {nearest(flat[name], options)}")
    for name, (low, high, closed) in RANGES.items():
        value = flat[name]
        if value is None:
            continue
        # Written so that NaN is refused too.
        if not ((value >= low if closed else value > low) and (high is None or value <= high)):
            bound = f"{low} or more" if closed else f"above {low}"
            bound += "" if high is None else f", at most {high}"
            raise UserError(f"{name} is {value}: it must be {bound}")
    if flat["model.dtype"] == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("model.dtype is 'float64': set JAX_ENABLE_X64=1 in the environment too")
    _check_tuples(flat)
    profiler.parse(config.profile)
    cache = flat["compilation_cache"] or ""
    if "://" in cache and not cache.startswith("gs://"):
        raise UserError(f"compilation_cache is {cache!r}: it must be a folder, or gs://BUCKET/...")
    _check_groups(flat["model.bn_group_size"], config.batch_size)


def _check_groups(size: Any, batch_size: int) -> None:
    name = "model.bn_group_size"
    if isinstance(size, str) and size != PER_DEVICE:
        raise UserError(f"{name} is {size!r}: {nearest(size, [PER_DEVICE])}, or a number")
    if size == PER_DEVICE:
        return
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UserError(
            f"{name} is {size}: it must be 0 (the global batch), {PER_DEVICE!r} (each device's "
            "share of it) or a number of examples"
        )
    if size > batch_size:
        raise UserError(f"{name} {size} is more than batch_size {batch_size}: give 0 for all of it")
    if size and batch_size % size:
        raise UserError(f"batch_size {batch_size} does not divide into groups of {name} {size}")


def _check_tuples(flat: Mapping[str, Any]) -> None:
    strides = flat["model.strides"]
    if strides is not None and (len(strides) != 8 or not set(strides) <= {1, 2}):
        raise UserError(
            f"model.strides is {strides}: it must be 8 numbers, each 1 or 2, such as "
            f"{DEFAULTS['model.strides']}"
        )
    for name in ("data.mean", "data.std"):
        values = flat[name]
        numbers = values is None or all(isinstance(value, (int, float)) for value in values)
        if values is not None and (len(values) != 3 or not numbers):
            raise UserError(f"{name} is {values}: it must be three numbers, of R, G and B, 0-255")
    if flat["data.std"] is not None and min(flat["data.std"]) <= 0:
        raise UserError(f"data.std is {flat['data.std']}: each must be above 0")
    for rule in flat["optimizer.lr_multipliers"]:
        try:
            pattern, factor = rule
            re.compile(pattern)
            float(factor)
        except (TypeError, ValueError, re.error):
            raise UserError(
                f"optimizer.lr_multipliers has {rule!r}: each must be (regular expression, factor)"
            ) from None


def resolve(
    config: ConfigDict,
    class_names: Sequence[str],
    saved: SavedModel | None = None,
    previous: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """Returns a copy of `config` without None in the fields that make up a model.

    Args:
      config: as given; a field that is set stays.
      class_names: of the training data.
      saved: the --checkpoint that training starts from, whose values fill what is None.
      previous: the config of the run that goes on, which fills it first.

    Raises:
      UserError: the class counts disagree; or a convention is set to other than the checkpoint's.
    """
    config = config.copy_and_resolve_references()
    flat = flatten(config.to_dict())
    if saved is not None:
        _check_conventions(flat, saved)
    before = flatten(previous) if previous else {}
    for name, default in DEFAULTS.items():
        if flat[name] is None:
            value = before.get(name)
            if value is None:
                value = saved.field(name) if saved else default
            _set(config, name, tuple(value) if isinstance(value, list) else value)
    if config.model.num_classes is None:
        config.model.num_classes = len(class_names)
    if config.model.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but {config.data.source} has "
            f"{len(class_names)} classes: leave it unset, or set it to {len(class_names)}"
        )
    check(config)
    return config


def with_defaults(config: ConfigDict) -> ConfigDict:
    """Returns a copy with DEFAULTS in place of None."""
    config = config.copy_and_resolve_references()
    flat = flatten(config.to_dict())
    for name, default in DEFAULTS.items():
        if flat[name] is None:
            _set(config, name, default)
    return config


def as_saved(config: ConfigDict, saved: SavedModel, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy that describes the saved model; only `overrides` win over it, and say so."""
    config = config.copy_and_resolve_references()
    for name in FIELDS:
        value = saved.field(name)
        if name in overrides and overrides[name] != value:
            if name in ("model.width", "model.num_classes"):
                raise UserError(
                    f"{name} is {overrides[name]}, but {saved.path} was trained with {value}, and "
                    "its arrays have those shapes"
                )
            processes.say(f"{name}: {overrides[name]} instead of the checkpoint's {value}")
        else:
            _set(config, name, value)
    if config.data.image_size != saved.field("data.image_size"):
        # Its edge, unlike its crop, is a number that does not follow the size.
        processes.say(f"data.eval_transforms is {config.data.eval_transforms}")
    check(config)
    return config


def _check_conventions(flat: Mapping[str, Any], saved: SavedModel) -> None:
    faults = [
        f"{name} is {flat[name]}, the checkpoint's is {saved.field(name)}"
        for name in CONVENTIONS
        if flat[name] is not None and flat[name] != saved.field(name)
    ]
    if faults:
        remedy = " ".join(
            f"--config.{name}={_plain(saved.field(name))}"
            for name in CONVENTIONS
            if flat[name] is not None and flat[name] != saved.field(name)
        )
        raise UserError(f"{saved.path} does not fit: {'; '.join(faults)}. To use it: {remedy}")


def _plain(value: Any) -> str:
    return f"'{value}'" if isinstance(value, tuple) else str(value)


def _set(config: ConfigDict, name: str, value: Any) -> None:
    section, _, key = name.partition(".")
    config[section][key] = value


def model_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the values of model_dir.FIELDS in a resolved config."""
    flat = flatten(config.to_dict())
    return {name: flat[name] for name in FIELDS}


def model(config: ConfigDict, devices: int = 1) -> MobileNetV2:
    """Returns the network of a resolved config, as it is trained.

    Args:
      config: from `resolve`.
      devices: over how many a batch is split; only `model.bn_group_size` 'device' depends on it.
    """
    attributes = config.model.to_dict()
    if config.model.bn_group_size == PER_DEVICE:
        attributes["bn_group_size"] = config.batch_size // devices
    return MobileNetV2(**attributes | {"dtype": jax.numpy.dtype(config.model.dtype)})
