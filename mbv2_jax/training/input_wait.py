"""The time for which the devices wait for input, and advice on how to shorten it."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax

from mbv2_jax.data import workers
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.data.transforms.operation import ResizedCrop
from mbv2_jax.training.settings import Data

# Percent of the time above which waiting is reported.
REPORTED_ABOVE = 10.0

_PATIENCE = 60.0  # seconds to wait for the devices at the end

T = TypeVar("T")


class _Started(NamedTuple):
    """A step that the devices have been given.

    Attributes:
      asked: the time.monotonic() at which the host began to wait for its batch.
      got: the time.monotonic() at which the batch came.
      output: an array that the step computes.
    """

    asked: float
    got: float
    output: Any


class InputWait:
    """Measures the time for which the devices are idle because their next batch is not ready.

    The wait begins when the host asks for the batch or when the devices finish the previous step,
    whichever is later, and ends when the batch comes. Compilation, evaluation and checkpoints delay
    a step too, but are not input and do not count; neither does the wait for the very first batch.

    A thread waits for the end of each step, since the host runs ahead of the devices and must not
    wait for them.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # waited so far
        self._asked = self._got = 0.0
        self._steps: queue.SimpleQueue[_Started | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="input wait", daemon=True)
        self._thread.start()

    def batches(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the batches; records the times at which each was asked for and came."""
        while True:
            self._asked = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._got = time.monotonic()
            yield batch

    def started(self, output: Any) -> None:
        """Records that the step with the last batch was started.

        Args:
          output: an array that the step computes and that no later step may overwrite.
        """
        self._steps.put(_Started(self._asked, self._got, output))

    def close(self) -> None:
        """Ends the thread, after the devices have finished their steps.

        A thread that is inside jax when the interpreter exits would abort the process.
        """
        self._steps.put(None)
        self._thread.join(_PATIENCE)

    def _watch(self) -> None:
        finished = float("inf")  # when the previous step ended
        while (step := self._steps.get()) is not None:
            self.seconds += max(0.0, step.got - max(step.asked, finished))
            try:
                jax.block_until_ready(step.output)
            except Exception:  # the step failed, which the reader of its metrics will see
                return
            finished = time.monotonic()


def remedy(data: Data, cores: int | None = None) -> str:
    """Returns advice for faster input as text, the easiest first.

    Args:
      data: the config's section.
      cores: the number of cores; None: this machine's.
    """
    cores = cores or workers.cores()
    advice = []
    if data.workers == 0 and cores > workers.parallel(0):
        advice.append(f"--config.data.workers={cores} (now 0: {workers.parallel(0)} threads)")
    elif 0 < data.workers < cores:
        advice.append(f"--config.data.workers={cores} (now {data.workers}), one per core")
    elif data.workers > cores:
        advice.append(
            f"--config.data.workers={cores} (now {data.workers}: more than the {cores} cores)"
        )
    # The first operation does not depend on the size.
    first = pipeline.make_transform(data.train_transforms, 224).operations[0]
    if data.train_decode == "exact" and isinstance(first, ResizedCrop):
        advice.append("--config.data.train_decode=fast (now exact)")
    advice.append(f"more cores (now {cores})")
    return ", or ".join(advice)
