"""SIGTERM and SIGINT as a request to stop, which training heeds at the end of a step."""

import signal
import sys
from typing import Any


class StopRequest:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one acts as it always does."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        del frame
        self.requested = True
        print(
            f"{signal.Signals(number).name}: finishing the step and saving; once more ends at once",
            file=sys.stderr,
        )
        for each, handler in self._before.items():
            signal.signal(each, handler)
