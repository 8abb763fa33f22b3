"""Names of the checkpoints of a training run: RUN:best, RUN:last and RUN:STEP.

    --checkpoint=runs/mine:best    the best checkpoint that was kept, by checkpoint.best_metric
    --checkpoint=runs/mine:last    the newest checkpoint
    --checkpoint=runs/mine:414     the checkpoint of step 414

A file or folder that really has such a name comes first.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mbv2_jax import spec
from mbv2_jax.errors import UserError
from mbv2_jax.storage import bucket

BEST, LAST = "best", "last"
# The fields of config.data without which evaluations cannot be compared.
_EVALUATION = ("source", "eval_split", "eval_transforms", "image_size", "mean", "std")
_NAMED = re.compile(rf"(.+):({BEST}|{LAST}|[0-9]+)")


def split(source: str) -> tuple[str, str]:
    """Splits RUN:NAME.

    Args:
      source: anything that --checkpoint takes.

    Returns:
      The run, and the name of one of its checkpoints; `source` and "" where no checkpoint is named.
    """
    match = _NAMED.fullmatch(source)
    if match is None or ("://" in source and not bucket.is_address(source)):
        return source, ""
    return match.group(1), match.group(2)


def choose(run: pathlib.Path, steps: Sequence[int], name: str) -> int:
    """Returns the step of the checkpoint that a name stands for.

    Args:
      run: the workdir.
      steps: the steps of its checkpoints.
      name: "best", "last" or a step, as `split` returns it.

    Raises:
      UserError: there is no such checkpoint, none was evaluated, or one of them is damaged.
    """
    if not steps:
        raise UserError(f"{run}:{name}: {run} is not a training run with checkpoints")
    if name == LAST:
        return max(steps)
    if name == BEST:
        return _best(run, steps)
    if int(name) not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise UserError(f"{run} has no checkpoint of step {name}; it has {known}")
    return int(name)


def rank(metric: str, value: float) -> float:
    """Returns a number that is larger for a better value of a metric."""
    return -value if metric == "loss" else value


def same_evaluation(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether two nested configs evaluate on the same images, prepared in the same way."""
    values = (
        [spec.frozen(config["data"].get(name)) for name in _EVALUATION] for config in (one, other)
    )
    return next(values) == next(values)


def results(run: pathlib.Path, steps: Sequence[int], config: Mapping[str, Any]) -> dict[int, Any]:
    """Returns the evaluations of checkpoints by step, in rising order.

    Args:
      run: the workdir.
      steps: the steps of its checkpoints; those that were not evaluated are left out.
      config: nested; evaluations on other data than this config's are left out.

    Raises:
      UserError: a file is damaged.
    """
    found = {}
    for step in sorted(steps):
        folder = run / "checkpoints" / str(step)
        if (folder / "metrics").is_dir() and same_evaluation(_config(run, step), config):
            found[step] = _read(folder / "metrics" / "metrics")
    return found


def _best(run: pathlib.Path, steps: Sequence[int]) -> int:
    """Returns the best of the checkpoints that were evaluated, the latest of equal ones."""
    from mbv2_jax.runtime import processes  # here: it imports jax, which takes seconds

    config = _config(run, max(steps))
    scored = results(run, steps, config)
    if not scored:
        known = ", ".join(map(str, sorted(steps)))
        raise UserError(
            f"{run}:{BEST}: no checkpoint in {run} was evaluated when it was saved; name one by "
            f"its step: {known}"
        )
    metric = config["checkpoint"]["best_metric"]
    best = max(scored, key=lambda step: (rank(metric, scored[step][metric]), step))
    processes.say(f"{run}:{BEST} is step {best}: {metric} {scored[best][metric]:.6g}")
    newest = run / "checkpoints" / str(max(steps))
    ever = _read(newest / "model" / "metadata")["origin"].get("best", {})
    if ever.get("by") == metric and ever["step"] not in (None, *steps):
        processes.say(f"step {ever['step']} was better, but it has no checkpoint")
    return best


def _config(run: pathlib.Path, step: int) -> Any:
    return _read(run / "checkpoints" / str(step) / "config" / "metadata")


def _read(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged or cannot be read: {error}") from None
