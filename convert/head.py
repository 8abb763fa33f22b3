"""The head of a file, as each module of a kind of head finds it."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class FoundHead:
    """The head of a file.

    Attributes:
      spec: its fields, a dataclass of the task; None where the file holds a backbone alone.
      params, batch_stats: the arrays of its layers, nested dicts of float32 numpy arrays.
      notes: the assumptions about it, one line each.
      faults: why it is no head of this network, one line each.
    """

    spec: Any
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
