"""Threads and worker processes that make batches ahead of time, with Grain.

Grain sees a random-access dataset whose elements are whole batches, and starts at the wanted one.
So a batch depends on its number only, whatever the number of workers, and no iterator state is
saved: Grain's own depends on the number of workers.
"""

import functools
import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from multiprocessing import connection, resource_tracker
from typing import Any, Protocol

import numpy as np

from mbv2_jax.errors import UserError
from mbv2_jax.installed import require

Batch = dict[str, np.ndarray]

# Batches that each worker process keeps ready besides the one that it is making.
_READY_PER_WORKER = 2

# The most threads that make batches, one batch each, if there are no worker processes. Pillow
# releases the interpreter's lock while it decodes and resizes.
_MAX_THREADS = 8


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel(workers: int) -> int:
    """Returns the number of batches made at a time: one per worker process; for 0, per thread."""
    return workers or min(_MAX_THREADS, cores())


class RandomAccess(Protocol):
    """A sequence of batches by number; picklable, so that it can be sent to worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Batch: ...


class Batches(Iterator[Batch]):
    """An iterator over a sequence of batches, made by threads or worker processes.

    These end with `close`, when the object is garbage, or with the interpreter.

    Args:
      sequence: the batches.
      workers: number of worker processes; 0 makes batches in threads of this process.

    Raises:
      UserError: `workers` is negative; from the iterator: whatever the sequence raises, or a worker
        process was killed.
    """

    def __init__(self, sequence: RandomAccess, workers: int):
        if workers < 0:
            raise UserError(f"workers={workers} must be 0 or more")
        require("making batches", "grain")
        # Imported here, since it imports jax (4 s), which sources and transforms do not need.
        import grain
        from absl import flags

        # Grain reads its flags when it starts a worker, and raises in a program without flags.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        threads = 0 if workers else parallel(0)
        batches = grain.MapDataset.source(sequence).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if workers:
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers, per_worker_buffer_size=_READY_PER_WORKER
                ),
                worker_init_fn=_start_worker,
            )
        self._iterator = iter(batches)
        self._next = self._start if workers else functools.partial(next, self._iterator)
        self._finalizer = weakref.finalize(self, _close, self._iterator)

    def __next__(self) -> Batch:
        return self._next()

    def _start(self) -> Batch:
        """Starts the worker processes, and returns the first batch."""
        self._next = self._receive
        # Ctrl-C and a cluster's SIGTERM go to every process of the group, but only the parent can
        # act on them: it finishes its step, for which it still needs batches, and closes the
        # workers. They, and the threads that start them, inherit this mask. (The resource tracker
        # is started first, since its start resets the mask.)
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return self._receive()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _receive(self) -> Batch:
        """Returns the next batch from the worker processes."""
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                f"a data worker was killed ({_first_sentence(error)}), probably for lack of memory "
                "or of space in /dev/shm: use fewer workers or a smaller batch_size, in Docker a "
                "larger --shm-size"
            ) from error
        # Plain arrays; the memory shared with the worker is freed with the last of them.
        return {name: np.asarray(value) for name, value in batch.items()}

    def close(self) -> None:
        """Ends threads and worker processes; the iterator raises from then on."""
        self._finalizer()


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ", 1)[0]


def _close(iterator: Any) -> None:
    from grain.multiprocessing import SharedMemoryArray

    # Python warns about shared memory that is not unlinked when the program ends. Grain unlinks it
    # in a thread, which may not run any more by then: from here on it is unlinked at once.
    SharedMemoryArray._disable_async_del()
    iterator.close()
    # The exception with which a worker's stream ended is part of a cycle, and holds a batch.
    gc.collect()


def _start_worker(worker: int, workers: int) -> None:
    """Prepares a worker process; Grain calls it there with the worker's number and their count."""
    del worker, workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process if its parent ends without closing it, for example when it is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
