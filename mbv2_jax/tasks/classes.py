"""The classes of a task that has some: as many as the data's, and the same in both splits."""

from collections.abc import Mapping
from typing import Any

from mbv2_jax.data.sources import Source
from mbv2_jax.errors import UserError, listed


def count(settings: Mapping[str, Any], source: Source | None) -> int | None:
    """Returns the number of classes of a config and its data.

    Args:
      settings: with "model.num_classes", None where the data decides.
      source: the training split; None where no data is opened.

    Returns:
      The number; None where it is left to the data and no data is opened.

    Raises:
      UserError: the data has another number of classes than the config.
    """
    given: int | None = settings["model.num_classes"]
    if source is None:
        return given
    found = len(source.class_names)
    if given not in (None, found):
        raise UserError(
            f"model.num_classes is {given}, but the data has {found} classes: leave it unset, or "
            f"set it to {found}"
        )
    return found


def split_fault(train: Source, evaluation: Source) -> str:
    """Returns "" if both splits have the same classes in the same order; see Task.split_fault."""
    if train.class_names == evaluation.class_names:
        return ""
    odd = sorted(set(train.class_names) ^ set(evaluation.class_names)) or ["their order"]
    return f"the classes of {{}} and {{}} differ; in only one of them: {listed(odd, 5, ', ')}"
