"""Exact evaluation: every example of a split is scored once, on any batch and device count."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.data import classes, labels, loader, sources
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.model_dir import FIELDS
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.runtime import processes
from mbv2_jax.runtime.processes import Group
from mbv2_jax.tasks import classification
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import predictions
from mbv2_jax.training import step as step_lib

Result = dict[str, float | int]
EXPECTED_WITHIN = 0.05  # percentage points that --expect allows


class Card(NamedTuple):
    """What was published for a model.

    Attributes:
      figures: top-1 and top-5 in percent.
      source: who published them.
      unlike: why an evaluation cannot be compared with them; "" where it can.
    """

    figures: tuple[float, float]
    source: str
    unlike: str


def evaluate(
    config: ConfigDict,
    checkpoint: str | None,
    overrides: Mapping[str, Any],
    *,
    flip: bool = False,
    out: str | None = None,
    group: Group | None = None,
) -> tuple[Result, Card | None]:
    """Evaluates a saved model on the evaluation split of `config`.

    Args:
      config: which data; the model itself, its normalisation and its transform are the
        checkpoint's, whatever the config says of them.
      checkpoint: whatever model_dir.read takes.
      overrides: --config.KEY=VALUE of the command line, which do count, and are said.
      flip: whether the mirror image has an equal say.
      out: a file for the prediction of each image.
      group: the processes of the run; None: this process has no others.

    Returns:
      What `score` returns; and what was published for the model, if anything was.

    Raises:
      UserError: no such checkpoint or data, classes that the model does not have, or a file that
        is there. RunFailed: see `score`; or the file cannot be written: with the result.
    """
    config = config.copy_and_resolve_references()
    config.model.bn_group_size = 0  # it is of training; here any batch size will do
    config_lib.check(config)
    if not checkpoint:
        raise UserError("--mode=eval needs --checkpoint=PATH or --workdir=DIR")
    out_path = predictions.parse_out(out) if out else None
    saved = read_checkpoint(checkpoint, group or processes.single())
    if saved.features_only:
        raise UserError(
            f"{saved.path} has no classifier, only features: train one on your data with "
            f"--mode=train --checkpoint={checkpoint}, and evaluate that run's --workdir"
        )
    source, found = _open_source(config.data, saved)
    config = config_lib.as_saved(config, saved, overrides)
    mesh = mesh_lib.create()
    mesh_lib.check_batch(mesh, config.batch_size)
    batches: list[Mapping[str, np.ndarray]] = []
    result = score(
        {"params": saved.params, "batch_stats": saved.batch_stats},
        source,
        transform(config.data.eval_transforms, config.data.image_size),
        model=config_lib.model(config),
        config=config,
        mesh=mesh,
        flip=flip,
        record=batches.append if out else None,
        progress=True,
    )
    if out_path is not None:
        try:
            predictions.write(out_path, batches, source)
        except RunFailed as failure:  # what took hours is not lost
            raise RunFailed(f"{failure}; the result is {json.dumps(result)}") from None
    return result, published(saved, found, len(source), overrides, flip)


def read_checkpoint(checkpoint: str, group: Group) -> model_dir.SavedModel:
    """Reads a model in every process; raises UserError where it is another one in some of them.

    Args:
      checkpoint: whatever model_dir.read takes.
      group: the processes of the run.
    """
    saved = model_dir.read(checkpoint)
    if group.count > 1:
        digest = model_dir.arrays_sha256([saved.params, saved.batch_stats])
        remedy = "Give one that all hosts share, or the same file on each"
        name = f"SHA-256 of {checkpoint}'s arrays"
        group.check_same("checkpoint", {name: digest}, remedy)
    return saved


def _open_source(
    data: ConfigDict, saved: model_dir.SavedModel
) -> tuple[labels.Relabelled, tuple[int, ...]]:
    """Returns the evaluation split with the model's labels, and which of them its classes are."""
    source = sources.open_source(data.source, data.eval_split, data.data_dir)
    found, how = labels.match(
        source.class_names, saved.class_names, data=data.source, model=str(saved.path)
    )
    if how:
        processes.say(how)
    return labels.Relabelled(source, found, saved.class_names), found


def published(
    saved: model_dir.SavedModel,
    found: Sequence[int],
    examples: int,
    overrides: Mapping[str, Any],
    flip: bool,
) -> Card | None:
    """Returns what was published for a model, and whether an evaluation can be compared with it.

    It can where the data looks like what the figures are of, ImageNet's validation images, and
    nothing was changed on the command line that changes the result.

    Args:
      saved: the model.
      found: the model's indices of the data's classes.
      examples: how many images were evaluated.
      overrides, flip: as `evaluate` takes them.
    """
    card = saved.published
    if card is None:
        return None
    offset = classes.imagenet_offset(saved.class_names)
    changed = [
        name for name in FIELDS if name in overrides and overrides[name] != saved.field(name)
    ]
    if overrides.get("model.dtype", "float32") == "bfloat16":  # which rounds to 3 digits
        changed.append("model.dtype=bfloat16")
    unlike = ""
    if examples != card["examples"]:
        unlike = f"that is of {card['examples']:,} images, this of {examples:,}"
    elif offset is None:
        unlike = "that is of ImageNet, and the model's classes are not known to be ImageNet's"
    elif not set(found) >= set(range(offset, offset + 1000)):
        unlike = f"that is of ImageNet's 1000 classes, and the data has {len(set(found))} classes"
    elif flip:
        unlike = "that is without --tta"
    elif changed:
        unlike = f"that is without {' '.join(f'--config.{name}' for name in changed)}"
    return Card((card["top1"], card["top5"]), card["source"], unlike)


def score(
    variables: Mapping[str, Any],
    source: sources.Source,
    transform: pipeline.Transform,
    *,
    model: MobileNetV2,
    config: ConfigDict,
    mesh: Mesh,
    flip: bool = False,
    record: Callable[[Mapping[str, np.ndarray]], object] | None = None,
    progress: bool = False,
) -> Result:
    """Scores every example of `source` exactly once.

    Args:
      variables: {"params", "batch_stats"}.
      source: the split.
      transform: of its images.
      model: the network.
      config: resolved; batch_size, data.mean, data.std and data.workers are read.
      mesh: the devices.
      flip: whether the mirror image has an equal say: the mean of the probabilities counts.
      record: is given each global batch's {"index", "label", "mask", "loss", "best", "scores"}; see
        data/loader.py and tasks/classification.py.
      progress: whether to show a bar.

    Returns:
      {"top1", "top5" (percent), "loss", "examples"}.

    Raises:
      RunFailed: an infinite or NaN loss, or a count of examples that is not the split's.
    """
    step = _jitted_eval_step(model, tuple(config.data.mean), tuple(config.data.std), mesh, flip)
    batches = loader.eval_batches(
        source,
        transform,
        batch_size=config.batch_size,
        workers=config.data.workers,
        **mesh_lib.process(),
    )
    totals = {"loss": 0.0, "top1": 0.0, "top5": 0.0, "examples": 0.0}
    hidden = not (progress and sys.stderr.isatty())
    bar = tqdm.tqdm(total=len(source), unit="image", desc="evaluating", disable=hidden)
    with contextlib.closing(batches), bar:
        for batch in mesh_lib.prefetch(batches, mesh):
            sums, rows = step(variables, batch)
            for name in totals:
                totals[name] += float(sums[name])
            if record is not None:
                record(jax.device_get(rows))
            bar.update(int(sums["examples"]))
    if totals["examples"] != len(source):
        raise RunFailed(
            f"evaluated {totals['examples']:.0f} examples of a split of {len(source)}: "
            "no result is reported"
        )
    if not np.isfinite(totals["loss"]):
        raise RunFailed(f"the loss of the evaluation is {totals['loss']}: no result is reported")
    return classification.summarize(totals)


@functools.lru_cache(maxsize=4)
def _jitted_eval_step(
    model: MobileNetV2, mean: tuple[float, ...], std: tuple[float, ...], mesh: Mesh, flip: bool
) -> Callable[..., tuple[classification.Sums, dict[str, jax.Array]]]:
    """Compiled once for all the evaluations of a run."""

    def step(
        variables: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[classification.Sums, dict[str, jax.Array]]:
        sums, predicted = step_lib.eval_step(
            variables, batch, model=model, mean=mean, std=std, flip=flip
        )
        # With which image each row is of: a mesh may order processes in its own way.
        return sums, predicted | {name: batch[name] for name in ("index", "label", "mask")}

    everywhere = mesh_lib.replicated(mesh)
    return jax.jit(step, in_shardings=(everywhere, mesh_lib.split(mesh)), out_shardings=everywhere)


def transform(spec: str, image_size: int) -> pipeline.Transform:
    """Returns the transform of data.eval_transforms; raises UserError if it is random."""
    made = pipeline.make_transform(spec, image_size)
    if made.random:
        raise UserError(f"data.eval_transforms {spec!r} is random: evaluation must not be")
    return made


def report(result: Result, expected: tuple[float, float] | Card | None) -> None:
    """Prints a result, as JSON in the last line, and before it how far it is from the expected.

    Args:
      result: of an evaluation.
      expected: top-1 and top-5 in percent; or what was published, which is shown, and compared
        where it can be.

    Raises:
      RunFailed: they differ by more than 0.05.
    """
    if isinstance(expected, Card):
        figures = "top1 {:.2f}, top5 {:.2f}".format(*expected.figures)
        verdict = f"; not compared, since {expected.unlike}" if expected.unlike else ""
        processes.say(f"published by {expected.source}: {figures}{verdict}")
        expected = None if expected.unlike else expected.figures
    say = functools.partial(processes.say, file=sys.stdout)
    far = False
    for name, wanted in zip(("top1", "top5"), expected or (), strict=False):
        got = result[name]
        # Percentages are stated with two digits: so is the comparison.
        difference = round(got - wanted, 2)
        far |= not abs(difference) <= EXPECTED_WITHIN
        say(f"{name}: expected {wanted:.2f}, got {got:.2f}, difference {difference:+.2f}")
    say(json.dumps(result))
    if far:
        raise RunFailed(f"the result is not within {EXPECTED_WITHIN} of what was expected")
