"""The best evaluation of a run so far, and the number of evaluations since."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mbv2_jax import checkpoint_names


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far; every checkpoint carries it in its model.json.

    Attributes:
      metric: the metric that decides, checkpoint.best_metric.
      step: the step of the best evaluation, of equally good ones the latest; None before the first.
      result: the best evaluation.
      stale: the number of evaluations in a row, up to the last one, that were not better than all
        before.
    """

    metric: str
    step: int | None = None
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stale: int = 0

    @classmethod
    def continued(cls, origin: Mapping[str, Any], metric: str, total_steps: int) -> "Best":
        """Returns the best so far of a run that continues.

        Args:
          origin: from the model.json of the checkpoint.
          metric: the metric that decides now; with another one than before, the best starts anew.
          total_steps: of the run; if it was made longer, the evaluations count anew.
        """
        saved = origin.get("best", {})
        if saved.get("by") != metric:
            return cls(metric)
        longer = total_steps > origin["total_steps"]
        stale = 0 if longer else saved["evaluations_since"]
        return cls(metric, saved["step"], saved["result"], stale)

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of model.json."""
        return {
            "by": self.metric,
            "step": self.step,
            "result": dict(self.result),
            "evaluations_since": self.stale,
        }

    def after(self, step: int, result: Mapping[str, Any]) -> "Best":
        """Returns the best after one more evaluation."""
        if self.step is None:
            return dataclasses.replace(self, step=step, result=result)
        new, old = (
            checkpoint_names.rank(self.metric, each[self.metric]) for each in (result, self.result)
        )
        if new > old:
            return dataclasses.replace(self, step=step, result=result, stale=0)
        if new == old:
            return dataclasses.replace(self, step=step, result=result, stale=self.stale + 1)
        return dataclasses.replace(self, stale=self.stale + 1)

    def describe(self, result: Mapping[str, Any]) -> str:
        """Returns the metric's name and its value in a result."""
        return f"{self.metric} {result[self.metric]:{'.4f' if self.metric == 'loss' else '.2f'}}"

    def has_stalled(self, patience: int | None) -> bool:
        """Returns whether `patience` evaluations in a row were not better; None is endless."""
        return patience is not None and self.stale >= patience
