"""Messages at the end of a run: the checkpoint in `model/`, and signs that nothing was learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbv2_jax import checkpoint_names
from mbv2_jax.tasks.task import Chance
from mbv2_jax.training.best import Best
from mbv2_jax.training.evaluation import Result
from mbv2_jax.training.plan import Plan
from mbv2_jax.training.schedule import warmup_steps

# Of the logged losses, the first third is compared with the last third, if each has this many.
_FEWEST = 3
_ERRORS = 2  # standard errors by which the loss has to fall
_LOOK = "check the targets: `python -m mbv2_jax.data browse` with this config shows them"


def describe_model(
    run: Plan, best: Best, *, step: int, last: int, result: Result, has_best: bool
) -> str:
    """Returns a line about the checkpoint that `model/` is, and about the best one.

    Args:
      run: the plan.
      best: the best evaluation of the run.
      step: whose weights are in `model/`.
      last: the step after which the run ended.
      result: the evaluation of `model/`.
      has_best: whether the best step has a checkpoint.
    """
    metric = best.metric
    if step == best.step:
        also = " and the best" if step == last else f"; {run.workdir}:last opens the last, {last}"
        which = "the last" if step == last else "the best"
        return f"model/ is step {step}, {which} ({best.describe(result)}){also}"
    text = (
        f"model/ is step {step}, the last ({best.describe(result)}); the best was step "
        f"{best.step} ({best.describe(best.result)})"
    )
    if not has_best:
        return f"{text}, which has no checkpoint (checkpoint.keep_best, checkpoint.every_epochs)"
    gain = abs(best.result[metric] - result[metric])
    if gain <= run.task.standard_error(metric, result):
        return f"{text}, which is within the noise of an evaluation"
    return f"{text}: use it with --checkpoint={run.workdir}:{checkpoint_names.BEST}"


def faults(
    run: Plan, last: int, result: Result, chance: Chance | None, lines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns a line for each sign that a run did not learn, with a cause and a remedy.

    Args:
      run: the plan.
      last: the step after which the run ended.
      result: the evaluation of its model.
      chance: the score that needs no network.
      lines: of metrics.jsonl, from the beginning of the run.
    """
    above = chance is not None and result[chance.figure] > chance.value + chance.margin
    found = []
    if chance is not None and not above:
        found.append(_at_chance(run, result, chance))
    # Weights that were trained before may have nothing left to learn.
    if not above and (text := _loss_stayed([x["loss"] for x in lines if x["split"] == "train"])):
        found.append(text)
    warmup = warmup_steps(run.settings.schedule, run.steps_per_epoch)
    if 0 < last <= warmup:
        found.append(
            f"the learning rate never left its warm-up, which takes {warmup} steps, and the run "
            f"ended after {last}: raise num_epochs, or lower schedule.warmup_epochs or warmup_steps"
        )
    return found


def _at_chance(run: Plan, result: Result, chance: Chance) -> str:
    figure, rate = chance.figure, f"schedule.base_lr is {run.settings.schedule.base_lr:g}"
    cause = f"the learning rate may be too high ({rate}): lower it"
    if not run.total_steps:
        cause = "the features of the checkpoint do not tell these classes apart"
    elif run.spec.mode.norm_eval:
        cause = (
            "with model.norm_eval the statistics of normalisation stay as they are, which bears "
            f"only a low learning rate ({rate}): lower it, set optimizer.clip_units to 0.02, or "
            "set model.norm_eval to False"
        )
    luck = chance.value + chance.margin
    return (
        f"{figure} is {result[figure]:.2f}, no better than chance ({chance.value:.2f} "
        f"{chance.how}, {luck:.2f} with luck): {cause}; or {_LOOK}"
    )


def _loss_stayed(losses: Sequence[float]) -> str:
    """Returns a sentence if the training loss did not fall beyond its noise, else ""."""
    count = len(losses) // 3
    if count < _FEWEST:
        return ""
    first, last = np.array(losses[:count]), np.array(losses[-count:])
    error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / count)
    if first.mean() - last.mean() > _ERRORS * error:
        return ""
    return (
        f"the training loss did not fall: {first.mean():.4f} at the beginning, {last.mean():.4f} "
        f"at the end (means of {count} logged steps): the learning rate is far too high or too "
        f"low; change schedule.base_lr, or {_LOOK}"
    )
