"""SIGTERM and SIGINT as a request to stop, which training heeds at the end of a step."""

import os
import signal
import sys
from typing import Any

from jax.experimental import multihost_utils

from mbv2_jax.runtime import processes


class StopRequest:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT acts as it always does.

    In a run of several processes a signal to any of them stops all, after the same step: JAX's
    preemption service, which listens for SIGTERM, tells the others and settles which step that is.
    """

    def __init__(self) -> None:
        self._several = processes.count() > 1
        self._requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process must ask after every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _note(self, number: int, frame: object) -> None:
        del frame
        self._requested = True
        print(
            f"{signal.Signals(number).name}: finishing the step and saving; once more ends at once",
            file=sys.stderr,
        )
        for each, handler in self._before.items():
            signal.signal(each, handler)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
