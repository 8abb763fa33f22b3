"""Names of the checkpoints of a training run: RUN:best, RUN:last and RUN:STEP.

    --checkpoint=runs/mine:best    the best checkpoint that was kept, by checkpoint.best_metric
    --checkpoint=runs/mine:last    the newest checkpoint
    --checkpoint=runs/mine:414     the checkpoint of step 414

A file or folder that really has such a name comes first.
"""

import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from mbv2_jax.errors import UserError
from mbv2_jax.storage import bucket

BEST, LAST = "best", "last"
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


def _best(run: pathlib.Path, steps: Sequence[int]) -> int:
    """Returns the best of the checkpoints that were evaluated, the latest of equal ones."""
    folders = {step: run / "checkpoints" / str(step) for step in sorted(steps)}
    scored = {
        step: _read(folder / "metrics" / "metrics")
        for step, folder in folders.items()
        if (folder / "metrics").is_dir()
    }
    if not scored:
        known = ", ".join(map(str, folders))
        raise UserError(
            f"{run}:{BEST}: no checkpoint in {run} was evaluated when it was saved; name one by "
            f"its step: {known}"
        )
    newest = folders[max(folders)]
    metric = _read(newest / "config" / "metadata")["checkpoint"]["best_metric"]
    best = max(scored, key=lambda step: (rank(metric, scored[step][metric]), step))
    print(f"{run}:{BEST} is step {best}: {metric} {scored[best][metric]:.6g}", file=sys.stderr)
    ever = _read(newest / "model" / "metadata")["origin"].get("best", {})
    if ever.get("by") == metric and ever["step"] not in (None, *folders):
        print(f"step {ever['step']} was better, but it has no checkpoint", file=sys.stderr)
    return best


def _read(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged or cannot be read: {error}") from None
