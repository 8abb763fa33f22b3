"""SIGTERM and SIGINT as a request to stop training at the end of a step."""

import os
import signal
import sys
from typing import Any

from jax.experimental import multihost_utils

from mbv2_jax.runtime import processes


class StopRequest:
    """A context manager that notes SIGTERM and SIGINT; a second SIGINT ends the process at once.

    In a run of several processes a signal to any of them stops all of them after the same step:
    JAX's preemption service, which listens for SIGTERM, tells the others and agrees on the step.
    """

    def __init__(self) -> None:
        self._several = processes.count() > 1
        self._requested = False
        self._former_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
            self._former_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore_handlers()

    def reached(self, step: int) -> bool:
        """Returns whether to stop after `step`; every process must call it after every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _handle(self, number: int, frame: object) -> None:
        del frame
        self._requested = True
        print(
            f"{signal.Signals(number).name}: finishing the step and saving; once more ends at once",
            file=sys.stderr,
        )
        self._restore_handlers()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore_handlers(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
