"""Exact evaluation: every example of a split is scored once, on any batch and device count."""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.data import loader, sources
from mbv2_jax.data.sources import Source
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.runtime import processes
from mbv2_jax.runtime.processes import Group
from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.task import Aligned, Chance, Task
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import predictions, splits
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.config import Settings

Result = dict[str, Any]
EXPECTED_WITHIN = 0.05  # percentage points that --expect allows


class Score(NamedTuple):
    """The outcome of an evaluation.

    Attributes:
      result: of `Task.summarize`.
      chance: of `Task.chance`, to compare the result with.
      details: of `Task.summarize`, to print before the result.
    """

    result: Result
    chance: Chance | None
    details: str = ""


class Published(NamedTuple):
    """The figures that were published for a model.

    Attributes:
      figures: by name, in percent.
      source: who published them.
      unlike: why an evaluation cannot be compared with them; "" where it can.
    """

    figures: dict[str, float]
    source: str
    unlike: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of a network on a split.

    Attributes:
      task, network, preprocessing: of the model.
      source, transform: the split, and the operations on its images.
      batch_size: global.
      workers: processes that decode.
      mesh: the devices.
      tta: whether the outputs of several views of each image are merged (`Task.views`).
    """

    task: Task
    network: nn.Module
    preprocessing: Preprocessing
    source: Source
    transform: pipeline.Transform
    batch_size: int
    workers: int
    mesh: Mesh
    tta: bool = False

    def score(
        self,
        variables: Mapping[str, Any],
        *,
        record: Callable[[Mapping[str, np.ndarray]], object] | None = None,
        progress: bool = False,
    ) -> Score:
        """Scores every example exactly once.

        Args:
          variables: {"params", "batch_stats"}.
          record: called with each global batch's rows: those of `Task.evaluate`, "index", "mask",
            and those of the task's targets that have one value for each example.
          progress: whether to show a progress bar.

        Raises:
          RunFailed: a sum is infinite or NaN, or the count of examples is not the split's.
        """
        step = _jitted_eval_step(self.task, self.network, self.preprocessing, self.mesh, self.tta)
        batches = loader.eval_batches(
            self.source,
            self.transform,
            self.task,
            batch_size=self.batch_size,
            workers=self.workers,
            **mesh_lib.process(),
        )
        totals: dict[str, Any] = {}
        kept: list[Mapping[str, np.ndarray]] = []
        hidden = not (progress and sys.stderr.isatty())
        bar = tqdm.tqdm(total=len(self.source), unit="image", desc="evaluating", disable=hidden)
        with contextlib.closing(batches), bar:
            for batch in mesh_lib.prefetch(batches, self.mesh):
                sums, rows = step(variables, batch)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
                if record is not None or self.task.needs_rows:
                    fetched = jax.device_get(rows)
                    kept += [fetched] if self.task.needs_rows else []
                    if record is not None:
                        record(fetched)
                bar.update(int(sums["examples"]))
        self._check(totals)
        in_split = in_order(kept, len(self.source)) if kept else {}
        result, details = self.task.summarize(totals, in_split, self.source)
        return Score(result, self.task.chance(totals), details)

    def _check(self, totals: Mapping[str, Any]) -> None:
        if totals["examples"] != len(self.source):
            raise RunFailed(
                f"evaluated {totals['examples']:.0f} examples of a split of {len(self.source)}: "
                "no result is reported"
            )
        for name, total in totals.items():
            if not np.isfinite(total).all():
                raise RunFailed(f"the {name} of the evaluation is {total}: no result is reported")


def in_order(batches: Sequence[Mapping[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """Returns the rows of an evaluation in the order of its split, without padding.

    Args:
      batches: the rows of each global batch, with their "index" and "mask".
      count: the number of examples.

    Raises:
      RunFailed: an example is missing, or there twice.
    """
    mask = np.concatenate([batch["mask"] for batch in batches])
    names = [name for name in batches[0] if name != "mask"]
    rows = {name: np.concatenate([batch[name] for batch in batches])[mask] for name in names}
    order = np.argsort(rows["index"])
    if not np.array_equal(rows["index"][order], np.arange(count)):
        raise RunFailed("not every image was evaluated exactly once")
    return {name: values[order] for name, values in rows.items()}


@functools.lru_cache(maxsize=4)
def _jitted_eval_step(
    task: Task, network: nn.Module, preprocessing: Preprocessing, mesh: Mesh, tta: bool
) -> Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Returns the jitted step, compiled once for all the evaluations of a run."""

    def step(
        variables: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        sums, rows = step_lib.eval_step(
            variables, batch, task=task, network=network, preprocessing=preprocessing, tta=tta
        )
        # Each row goes with its example's index, since a mesh may order processes in its own way.
        single = {name: array for name, array in batch.items() if array.ndim == 1}
        return sums, rows | single

    everywhere = mesh_lib.replicated(mesh)
    return jax.jit(step, in_shardings=(everywhere, mesh_lib.split(mesh)), out_shardings=everywhere)


def eval_transform(preprocessing: Preprocessing) -> pipeline.Transform:
    """Returns the transform of data.eval_transforms; raises UserError if it is random."""
    if preprocessing.transform.random:
        name = preprocessing.eval_transforms
        raise UserError(f"data.eval_transforms {name!r} is random: evaluation must not be")
    return preprocessing.transform


def evaluate(
    config: ConfigDict,
    checkpoint: str | None,
    overrides: Mapping[str, Any],
    group: Group,
    *,
    tta: bool = False,
    out: str | None = None,
) -> tuple[Result, Published | None]:
    """Evaluates a saved model on the evaluation split of a config.

    Args:
      config: names the data to evaluate; the network and its preprocessing are the checkpoint's,
        whatever the config sets.
      checkpoint: anything that model_dir.read takes.
      overrides: --config.KEY=VALUE of the command line, which win over the checkpoint, and are
        reported.
      group: the processes.
      tta: whether several views of each image are merged.
      out: a file for the prediction of each image.

    Returns:
      The result of `Task.summarize`; and the figures that were published for the model, if any.

    Raises:
      UserError: there is no such checkpoint or data, the data has classes that the model does not
        have, or the file exists. RunFailed: see `Evaluation.score`; or the file cannot be written,
        in which case the message has the result.
    """
    out_path = predictions.check_path(out) if out else None
    saved, aligned, evaluation = open_evaluation(config, checkpoint, overrides, group, tta=tta)
    batches: list[Mapping[str, np.ndarray]] = []
    score = evaluation.score(
        saved.variables(), record=batches.append if out else None, progress=True
    )
    result = score.result
    if score.details:
        processes.say(score.details, file=sys.stdout)
    if out_path is not None:
        try:
            rows = in_order(batches, len(aligned.source))
            predictions.write(out_path, rows, aligned.source, evaluation.task)
        except RunFailed as failure:  # a result that took hours is not lost
            raise RunFailed(f"{failure}; the result is {json.dumps(result)}") from None
    return result, published(saved, aligned, overrides, tta)


def open_evaluation(
    config: ConfigDict,
    checkpoint: str | None,
    overrides: Mapping[str, Any],
    group: Group,
    *,
    tta: bool = False,
) -> tuple[SavedModel, Aligned, Evaluation]:
    """Opens a saved model, and the evaluation split of a config, without evaluating yet.

    Args:
      config, checkpoint, overrides, group, tta: see `evaluate`.

    Returns:
      The model; the split, whose targets use the model's classes; and the evaluation of the two.

    Raises:
      UserError: see `evaluate`.
    """
    settings = config_lib.read(config_lib.without_groups(config))
    if not checkpoint:
        raise UserError("an evaluation needs --checkpoint=PATH, or --workdir=DIR with --mode=eval")
    saved = read_checkpoint(checkpoint, group)
    if saved.features_only:
        raise UserError(
            f"{saved.path} has no head, only features: train one on your data with --mode=train "
            f"--checkpoint={checkpoint}, and evaluate that run's --workdir"
        )
    aligned = _open_split(settings, saved)
    spec = config_lib.evaluated_spec(settings, saved, overrides)
    mesh = mesh_lib.create()
    mesh_lib.check_batch(mesh, settings.run.batch_size)
    task = settings.task.for_model(spec.head, saved.classes)
    evaluation = Evaluation(
        task=task,
        network=task.network(spec.backbone, spec.mode),
        preprocessing=spec.preprocessing,
        source=aligned.source,
        transform=eval_transform(spec.preprocessing),
        batch_size=settings.run.batch_size,
        workers=settings.data.workers,
        mesh=mesh,
        tta=tta,
    )
    return saved, aligned, evaluation


def read_checkpoint(checkpoint: str, group: Group) -> SavedModel:
    """Reads a model in every process; raises UserError if they do not all read the same.

    Args:
      checkpoint: anything that model_dir.read takes.
      group: the processes.
    """
    saved = model_dir.read(checkpoint)
    if group.count > 1:
        digest = model_dir.arrays_sha256([saved.params, saved.batch_stats])
        remedy = "Give one that all hosts share, or the same file on each"
        group.check_same("checkpoint", {f"SHA-256 of {checkpoint}'s arrays": digest}, remedy)
    return saved


def _open_split(settings: Settings, saved: SavedModel) -> Aligned:
    """Returns the evaluation split, whose targets use the model's classes."""
    source = splits.open_split(settings, settings.data.eval_split)
    for note in sources.notes(source):
        processes.say(note)
    aligned = saved.task().align(source, settings.data.source, str(saved.path))
    if aligned.note:
        processes.say(aligned.note)
    return aligned


def published(
    saved: SavedModel, aligned: Aligned, overrides: Mapping[str, Any], tta: bool
) -> Published | None:
    """Returns the figures published for a model, and whether an evaluation compares with them.

    It does if the data looks like the data of the figures, and nothing on the command line changes
    the result.

    Args:
      saved: the model.
      aligned: the split that was evaluated.
      overrides, tta: as `evaluate` takes them.
    """
    card, task = saved.description.published, saved.task()
    if card is None:
        return None
    values, examples = saved.spec.values(), len(aligned.source)
    changed = [name for name in values if overrides.get(name, values[name]) != values[name]]
    if overrides.get("model.dtype", "float32") == "bfloat16":  # which rounds to 3 digits
        changed.append("model.dtype=bfloat16")
    if examples != card["examples"]:
        unlike = f"they are for {card['examples']:,} images, this result for {examples:,}"
    elif not (unlike := task.unlike_published(aligned)):
        if tta:
            unlike = "they are without --tta"
        elif changed:
            unlike = f"they are without {' '.join(f'--config.{name}' for name in changed)}"
    figures = {name: card[name] for name in task.figures if name in card}
    return Published(figures, card["source"], unlike)


def report(result: Result, expected: Mapping[str, float] | Published | None) -> None:
    """Prints the difference of a result from the expected figures, then the result as JSON.

    Args:
      result: the result of an evaluation.
      expected: figures by name; or published ones, which are printed, and compared where possible.

    Raises:
      RunFailed: they differ by more than 0.05.
    """
    if isinstance(expected, Published):
        figures = ", ".join(f"{name} {value:.2f}" for name, value in expected.figures.items())
        verdict = f"; not compared, since {expected.unlike}" if expected.unlike else ""
        processes.say(f"published by {expected.source}: {figures}{verdict}")
        expected = None if expected.unlike else expected.figures
    say = functools.partial(processes.say, file=sys.stdout)
    far = False
    for name, wanted in (expected or {}).items():
        # Percentages are stated with two digits, and compared with as many.
        difference = round(result[name] - wanted, 2)
        far |= not abs(difference) <= EXPECTED_WITHIN
        say(f"{name}: expected {wanted:.2f}, got {result[name]:.2f}, difference {difference:+.2f}")
    say(json.dumps(result))
    if far:
        raise RunFailed(f"the result is not within {EXPECTED_WITHIN} of the expected figures")
