"""How long the devices wait for input, and what to change where that is long."""

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

# The share of the time, in percent, from which waiting is worth a word.
WORTH_A_WORD = 10.0

_PATIENCE = 60.0  # seconds; devices that take longer are not waited for

T = TypeVar("T")


class _Started(NamedTuple):
    """A step that was given to the devices.

    Attributes:
      asked: when the host began to wait for its batch, by time.monotonic().
      got: when the batch was there.
      output: an array that the step makes.
    """

    asked: float
    got: float
    output: Any


class InputWait:
    """Measures how long the devices have nothing to do because their next batch is not there.

    That is from when the host asks for the batch, or from when the devices finish the step before,
    whichever is later, until the batch comes. What else keeps the host from starting a step, a
    compilation, an evaluation or a checkpoint, is not input, and does not count; nor does the wait
    for the first batch of all, which nothing comes before.

    Only a thread that waits for each step's end knows when that is: the host runs ahead of the
    devices, and must not wait for them.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # waited so far
        self._asked = self._got = 0.0
        self._steps: queue.SimpleQueue[_Started | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="input wait", daemon=True)
        self._thread.start()

    def batches(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the batches; notes when each was asked for and when it came."""
        while True:
            self._asked = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._got = time.monotonic()
            yield batch

    def started(self, output: Any) -> None:
        """Notes that the step with the last batch was started.

        Args:
          output: one of the arrays that it makes, which no later step is given to overwrite.
        """
        self._steps.put(_Started(self._asked, self._got, output))

    def close(self) -> None:
        """Ends the thread, which waits for the devices to finish what they were given.

        A thread that is inside of jax when the interpreter ends would abort the process.
        """
        self._steps.put(None)
        self._thread.join(_PATIENCE)

    def _watch(self) -> None:
        finished = float("inf")  # of the step before
        while (step := self._steps.get()) is not None:
            self.seconds += max(0.0, step.got - max(step.asked, finished))
            try:
                jax.block_until_ready(step.output)
            except Exception:  # of the step: whoever reads its metrics is told
                return
            finished = time.monotonic()


def remedy(data: Data, cores: int | None = None) -> str:
    """Returns advice for faster input, in words, the nearest first.

    Args:
      data: the section of the config.
      cores: of this machine; None: counted.
    """
    cores = cores or workers.cores()
    advice = []
    if data.workers == 0 and cores > workers.parallel(0):
        advice.append(f"--config.data.workers={cores} (now 0: {workers.parallel(0)} threads)")
    elif 0 < data.workers < cores:
        advice.append(f"--config.data.workers={cores} (now {data.workers}), one a core")
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
