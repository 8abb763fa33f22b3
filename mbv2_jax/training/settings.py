"""The fields of a config that only training reads, each declared once, as in spec.py.

A config has a section for each dataclass, and the fields of `Run` beside the sections. Plain data:
nothing here imports jax.
"""

import dataclasses
import re
import textwrap
from typing import Any

from ml_collections import ConfigDict, config_dict

from mbv2_jax import spec, tasks
from mbv2_jax.spec import (
    choice,
    declare,
    flag,
    integer,
    is_number,
    number,
    numbers,
    sequence,
    text,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The fields beside the sections."""

    task: str = declare(
        tasks.DEFAULT,
        text("the name of a task, or module:Class"),
        "a built-in task, or a class of your own as 'module:Class'",
    )
    seed: int = declare(
        0,
        integer(0, 2**32 - 1),
        "seed of initialisation, data order, augmentation and dropout",
    )
    batch_size: int = declare(
        256, integer(1), "examples per step, over all devices and processes together"
    )
    num_epochs: float = declare(
        300.0,
        number(0),
        "passes over the training split; may be a fraction; 0, with fit_head, fits the head alone",
    )
    fit_head: bool = declare(
        False,
        flag(),
        "fit a new head to the features of the checkpoint's backbone before training (a linear "
        "probe, in closed form), instead of starting from a random one; a checkpoint with the same "
        "classes keeps its head",
    )
    profile: str | None = declare(
        None,
        text("FIRST:LAST, two steps counted from 1, such as 20:24"),
        "'FIRST:LAST': the steps to trace with the profiler, counted from 1; None: none",
        optional=True,
    )
    compilation_cache: str | None = declare(
        None,
        text("a folder, or gs://BUCKET/FOLDER"),
        "folder, or gs:// address, that keeps compiled programs between runs; '': none; None: in "
        "the user's cache ($XDG_CACHE_HOME or ~/.cache, then mbv2_jax/compiled)",
        optional=True,
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """Describes the source of the images, and the augmentation in training."""

    source: str = declare(
        "imagenet2012",
        text("the name of a TFDS builder, or KIND:PATH, such as folder:PATH"),
        "a TFDS builder's name, or KIND:PATH, such as folder:PATH; docs/data.md lists the kinds",
    )
    data_dir: str | None = declare(
        None,
        text("a folder, or gs://BUCKET/FOLDER"),
        "where TFDS keeps its data; None: its default",
        optional=True,
    )
    train_split: str = declare(
        "train",
        text("a split's name"),
        "a split's name, or a part of one: train[:90%]; of a folder without splits, 'train' is "
        "four fifths, 'val' the rest, and 'all' everything",
    )
    eval_split: str = declare("validation", text("a split's name"), "as train_split")
    train_transforms: str = declare(
        "random_resized_crop(size)|random_flip(0.5)",
        text("operations joined by '|'"),
        "operations on a training image; `size` is image_size",
    )
    workers: int = declare(0, integer(0), "processes that decode; 0: threads of this process")
    last_batch: str = declare(
        "fill",
        choice("fill", "drop"),
        "the last, incomplete batch of an epoch: 'fill' fills it with the epoch's first examples, "
        "'drop' leaves it out",
    )
    repeats: int = declare(
        1, integer(1), "times that an example occurs in an epoch, each time augmented anew"
    )
    train_decode: str = declare(
        "exact", choice("exact", "fast"), "'exact': mmpretrain's pixels; 'fast': close to them"
    )
    corrupt: str = declare(
        "raise",
        choice("raise", "skip"),
        "unreadable training images: 'raise' stops, 'skip' counts and reports them",
    )


def _is_rule(rule: Any) -> bool:
    if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not is_number(rule[1]):
        return False
    try:
        re.compile(rule[0])
    except (TypeError, re.error):
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Describes the optimizer: how it updates the parameters from their gradients."""

    name: str = declare(
        "sgd",
        choice("sgd", "rmsprop", "adamw"),
        "'sgd' (PyTorch's semantics), 'rmsprop' (TensorFlow's) or 'adamw'",
    )
    momentum: float = declare(0.9, number(0, 1), "sgd, rmsprop; 0: none")
    nesterov: bool = declare(False, flag(), "sgd")
    rms_decay: float = declare(
        0.9, number(0, 1), "rmsprop: share of the old mean square that a step keeps"
    )
    betas: tuple[float, ...] = declare(
        (0.9, 0.999),
        numbers(2, "two numbers"),
        "adamw: shares of the old first and second moment that a step keeps",
    )
    epsilon: float = declare(
        1e-8, number(0), "adamw: added to the root; rmsprop: added under the root"
    )
    weight_decay: float = declare(
        0.0, number(0), "sgd, rmsprop: times the parameter, added to the gradient; adamw: decoupled"
    )
    decay_norm: bool = declare(True, flag(), "whether BatchNorm's scales and biases decay too")
    decay_bias: bool = declare(True, flag(), "whether the biases of the head decay")
    clip_norm: float | None = declare(
        None,
        number(0, above=True),
        "largest global norm of a gradient; None: any",
        optional=True,
    )
    clip_units: float | None = declare(
        None,
        number(0, above=True),
        "largest norm of the gradient of an output channel's kernel, or of a bias or scale, as a "
        "share of that parameter's own norm, which counts as 0.001 at least (adaptive gradient "
        "clipping, arXiv:2102.06171), such as 0.02; None: any",
        optional=True,
    )
    lr_multipliers: tuple[tuple[str, float], ...] = declare(
        (),
        sequence("pairs of (regular expression, factor)", _is_rule),
        "((regular expression, factor), ...): the first expression that matches the beginning of a "
        "parameter's path ('layer7_0/expand/conv/kernel') scales its learning rate",
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step."""

    name: str = declare(
        "constant",
        choice("constant", "step", "exponential", "cosine", "poly"),
        "'constant', 'step', 'exponential', 'cosine' or 'poly'",
    )
    base_lr: float = declare(0.045, number(0), "learning rate, for a batch of reference_batch_size")
    reference_batch_size: int | None = declare(
        None,
        integer(1),
        "lr = base_lr * batch_size / reference_batch_size; None: base_lr whatever the batch",
        optional=True,
    )
    warmup_epochs: float = declare(0.0, number(0), "epochs of linear rise at the beginning")
    warmup_steps: int | None = declare(
        None, integer(0), "steps of linear rise; None: warmup_epochs decides", optional=True
    )
    warmup_start: float = declare(
        0.0, number(0, 1), "share of the learning rate at step 0 of the warm-up"
    )
    milestones: tuple[float, ...] = declare(
        (),
        sequence("numbers of epochs", is_number),
        "step: epochs after which the rate is multiplied by factor",
    )
    factor: float = declare(
        1.0, number(0), "factor of the rate; step: at milestones; exponential: every decay_epochs"
    )
    decay_epochs: float = declare(
        1.0,
        number(0, above=True),
        "exponential: epochs between two falls; may be a fraction",
    )
    min_lr: float = declare(0.0, number(0), "cosine, poly: the rate at the end")
    power: float = declare(
        0.9, number(0, above=True), "poly: exponent of the share of the steps that are left"
    )


@dataclasses.dataclass(frozen=True)
class Ema:
    """The exponential moving average of parameters and statistics."""

    decay: float | None = declare(
        None,
        number(0, 1),
        "share of the average that an update keeps, such as 0.9999; None: none",
        optional=True,
    )
    every_steps: int = declare(1, integer(1), "steps between two updates of the average")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are saved, and which are kept."""

    every_epochs: float = declare(
        1.0,
        number(0, above=True),
        "epochs between two checkpoints; the last step is saved too",
    )
    every_steps: int | None = declare(
        None, integer(1), "steps between two checkpoints; None: every_epochs decides", optional=True
    )
    keep_last: int = declare(3, integer(1), "number of the newest checkpoints to keep")
    keep_best: int = declare(1, integer(0), "number of the best, by best_metric, to keep as well")
    best_metric: str | None = declare(
        None,
        text("a metric of the evaluation"),
        "a metric of the evaluation, such as 'loss'; None: the first of the task's figures",
        optional=True,
    )
    patience: int | None = declare(
        None,
        integer(1),
        "evaluations in a row without a better best_metric that end the run early; model/ is then "
        "the best checkpoint, not the last; None: the run goes to its end",
        optional=True,
    )


@dataclasses.dataclass(frozen=True)
class Log:
    """When metrics are logged and evaluations run."""

    every_steps: int = declare(50, integer(1), "steps between two lines of metrics.jsonl")
    eval_every_epochs: float = declare(
        1.0,
        number(0, above=True),
        "epochs between two evaluations; the last step is evaluated too",
    )


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Describes how long the processes of a run wait for each other."""

    initialization_timeout: int = declare(
        300, integer(1), "seconds to wait for the other processes to start"
    )
    heartbeat_timeout: int = declare(
        100, integer(1), "seconds of silence after which a process counts as dead"
    )


SECTIONS: dict[str, type] = {
    "data": Data,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "ema": Ema,
    "checkpoint": Checkpoint,
    "log": Log,
    "distributed": Distributed,
}


def declared(task: str) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields of a config by name, such as "batch_size" and "model.width".

    Args:
      task: the name of a task, whose own fields are among them.
    """
    own = tasks.settings(task)
    places = [("", Run), ("", own.Settings), ("model", spec.Backbone), ("model", own.Head)]
    places += [("model", spec.TrainingMode), ("data", spec.Preprocessing), *SECTIONS.items()]
    return {
        f"{section}.{field.name}".lstrip("."): field
        for section, cls in places
        for field in dataclasses.fields(cls)
    }


def make_config(task: str) -> ConfigDict:
    """Returns a task's locked config of defaults, in which fields that may be unset are None."""
    config = ConfigDict()
    for name, field in declared(task).items():
        section, _, key = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        unset = field.metadata["inherited"] or field.default is None
        kind = field.metadata["values"].type
        inside = config[section] if section else config
        if unset:
            inside[key] = config_dict.placeholder(kind)
        elif kind is object:
            inside[key] = config_dict.FieldReference(field.default, field_type=object)
        else:
            inside[key] = field.default
    config.task = task
    return config.lock()


def explain(task: str, beside: str | None = None) -> str:
    """Returns the fields of a config with their defaults and their meanings, as text.

    Args:
      task: the config's.
      beside: another task, whose fields are left out; None for every field.
    """
    lines = []
    known = {} if beside is None else declared(beside)
    for name, field in declared(task).items():
        if known.get(name) is field:
            continue
        unset = field.metadata["inherited"]
        default = f"the checkpoint's, or {field.default}" if unset else repr(field.default)
        text = f"{field.metadata['help']} (default: {default})"
        lines.append(f"  {name}")
        lines.append(textwrap.fill(text, 96, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
