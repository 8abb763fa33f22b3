"""Batches from a source: order, shard, workers, padding; Grain underneath.

Grain sees a random-access dataset whose elements are whole batches, and is started at the wanted
one. So batch N depends on (seed, N) only, whatever the number of workers, and the position of a
training run is its step: no iterator state is saved (DESIGN.md says why).
"""

import dataclasses
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

from mbv2_jax.data import fast_decoding
from mbv2_jax.data.sources import Source
from mbv2_jax.data.transforms.pipeline import Transform
from mbv2_jax.errors import UnreadableImage, UserError, nearest

Batch = dict[str, np.ndarray]

_LAST_BATCH = ("fill", "drop")
_CORRUPT = ("raise", "skip")
_DECODE = ("exact", "fast")

# So many unreadable examples in a row are no accident any more.
_MAX_SKIPPED = 100

# Batches that each worker process keeps ready beside the one it is making.
_READY_PER_WORKER = 2

# Batches that pay for the start of a worker process in an evaluation.
_WORTH_A_WORKER = 4

# Threads that make batches where there are no worker processes, a batch each; Pillow gives up the
# interpreter's lock while it decodes and resizes.
_MAX_THREADS = 8


def steps_per_epoch(num_examples: int, batch_size: int, last_batch: str = "fill") -> int:
    """Returns the number of batches in an epoch.

    Args:
      num_examples: of the training split.
      batch_size: global.
      last_batch: "fill" rounds up: the last batch is filled with the epoch's first examples, as
        mmengine's DefaultSampler evens out its replicas (5,005 steps of 256 for ImageNet);
        "drop" rounds down: what is left over is not seen in this epoch.

    Raises:
      UserError: `last_batch` is unknown, a number is not positive, or "drop" leaves no batch.
    """
    if last_batch not in _LAST_BATCH:
        raise UserError(f"unknown last_batch {last_batch!r}; {nearest(last_batch, _LAST_BATCH)}")
    if num_examples < 1 or batch_size < 1:
        raise UserError(
            f"an epoch of {num_examples} examples in batches of {batch_size}: both"
            " must be 1 or more"
        )
    if last_batch == "fill":
        return -(-num_examples // batch_size)
    if num_examples < batch_size:
        raise UserError(
            f"a batch of {batch_size} is larger than the split ({num_examples}"
            " examples); use a smaller batch_size, or last_batch='fill'"
        )
    return num_examples // batch_size


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """Turns a duration in epochs, which may be a fraction, into whole steps."""
    return round(epochs * steps_per_epoch)


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel(workers: int) -> int:
    """Returns how many batches are made at a time: one a worker process, or (0) one a thread."""
    return workers or min(_MAX_THREADS, cores())


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    workers: int,
    last_batch: str = "fill",
    repeats: int = 1,
    corrupt: str = "raise",
    decode_as: str = "exact",
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Yields the training batches `start` to `stop - 1`, counted from the beginning of training.

    Batch N is a pure function of (seed, N): not of `start`, `workers` or what was read before. The
    order of an epoch is a permutation drawn from (seed, epoch); the random numbers of an example's
    transform come from (seed, epoch, example, repeat). With several processes, process p gets rows
    p * batch_size / process_count onwards of the batch that one process alone would get.

    Args:
      source: the training split.
      transform: makes (S, S, 3) uint8 of a decoded image.
      batch_size: global, a multiple of `process_count`.
      seed: 0 or more.
      start: the first batch.
      stop: one after the last batch.
      workers: number of worker processes; 0 = decode in threads of this process.
      last_batch: as in `steps_per_epoch`.
      repeats: how often an example comes in a batch, each time with other random numbers
        (repeated augmentation, Hoffer et al. 2020). An epoch stays as long as the split, so it
        holds only the first 1 / `repeats` of its permutation, as torchvision's RASampler does.
      corrupt: what is done with an example that cannot be read or decoded: "raise"; or "skip", in
        which the next one of the epoch's order that can be read takes its place.
      decode_as: "exact" or "fast": see Transform.from_encoded.
      process_index: which JAX process this is.
      process_count: of how many.

    Returns:
      An iterator of {"image": uint8 (batch_size / process_count, S, S, 3) RGB, "label": int32
      (batch_size / process_count,)}, with `close()`. If `corrupt` is "skip", also of "skipped":
      int32, the example whose place the row's example took, or -1.

    Raises:
      UserError: an argument is not possible; from the iterator: an image cannot be read or decoded,
        or 100 in a row cannot.
    """
    if seed < 0:
        raise UserError(f"seed={seed} must be 0 or more")
    if repeats < 1:
        raise UserError(f"repeats={repeats} must be 1 or more")
    for name, value, known in (("corrupt", corrupt, _CORRUPT), ("decode_as", decode_as, _DECODE)):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}; {nearest(value, known)}")
    if decode_as == "fast":
        fast_decoding.require()
    reader = _TrainReader(
        source,
        transform,
        _rows(batch_size, process_index, process_count),
        batch_size,
        start,
        max(0, stop - start),
        seed,
        steps_per_epoch(len(source), batch_size, last_batch),
        repeats,
        corrupt,
        decode_as,
    )
    return Batches(reader, workers)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    workers: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Yields every example exactly once, in the source's order, the last batch padded.

    Args:
      source: the split to evaluate.
      transform: makes (S, S, 3) uint8 of a decoded image; not a random one.
      batch_size: global, a multiple of `process_count`.
      workers: number of worker processes, at most one a core; 0 = decode in threads of this
        process, as is done too where they would have little to do.
      process_index: which JAX process this is.
      process_count: of how many. Each gets the same number of batches, whose unmasked examples
        are the split together.

    Returns:
      An iterator of {"image": uint8 (batch_size / process_count, S, S, 3) RGB, "label": int32,
      "index": int32, which example of the source it is, "mask": bool}, with `close()`. Where mask
      is False, the others are zero.

    Raises:
      UserError: an argument is not possible; from the iterator: an image cannot be read or decoded.
    """
    if transform.random:
        raise UserError(
            "an evaluation transform must not be random; use"
            " resize_edge(...)|center_crop(size), or resize(size)"
        )
    reader = _EvalReader(
        source,
        transform,
        _rows(batch_size, process_index, process_count),
        batch_size,
        0,
        steps_per_epoch(len(source), batch_size),
    )
    workers = min(workers, cores())
    # Each takes seconds to start, and that for every evaluation.
    return Batches(reader, workers if len(reader) >= _WORTH_A_WORKER * workers else 0)


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns which rows of a global batch belong to a process."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} processes"
        )
    per_process = batch_size // process_count
    return slice(process_index * per_process, (process_index + 1) * per_process)


@dataclasses.dataclass
class _Reader:
    """A random-access sequence of whole batches, of which one process reads its rows."""

    source: Source
    transform: Transform
    rows: slice
    batch_size: int
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def empty(self) -> Batch:
        size, count = self.transform.output_size, self.rows.stop - self.rows.start
        return {
            "image": np.zeros((count, size, size, 3), np.uint8),
            "label": np.zeros(count, np.int32),
        }

    def read_into(
        self, batch: Batch, row: int, index: int, rng: np.random.Generator, decode_as: str = "exact"
    ) -> None:
        """Puts example `index` of the source into a row of the batch.

        Raises:
          UnreadableImage: its record cannot be read, or its image not be decoded.
          UserError: it has no label, or its image is too small for the transform.
        """
        try:
            example = self.source[index]
            if example["label"] < 0:  # as in the test splits that keep their labels to themselves
                raise UserError("has no label")
            batch["image"][row] = self.transform.from_encoded(example["image"], rng, decode_as)
        except UserError as error:
            raise type(error)(f"{self.source.describe(index)}: {error}") from error
        batch["label"][row] = example["label"]


@dataclasses.dataclass
class _TrainReader(_Reader):
    seed: int
    steps_per_epoch: int
    repeats: int
    corrupt: str
    decode_as: str

    def __getitem__(self, offset: int) -> Batch:
        epoch, step = divmod(self.start + offset, self.steps_per_epoch)
        positions = step * self.batch_size + np.arange(self.batch_size)
        if self.repeats > 1:
            # An example's repeats lie far apart in the batch: mixup and cutmix mix neighbours, and
            # groups of batch statistics are of neighbours.
            positions = positions[np.lexsort((positions, positions % self.repeats))]
        batch = self.empty()
        if self.corrupt == "skip":
            batch["skipped"] = np.full_like(batch["label"], -1)
        for row, position in enumerate(positions[self.rows].tolist()):
            self._read_position(batch, row, epoch, position)
        return batch

    def _read_position(self, batch: Batch, row: int, epoch: int, position: int) -> None:
        """Puts the example at a position of the epoch, or the next readable one, into a row."""
        order = _epoch_order(len(self.source), self.seed, epoch)
        # Positions past the end come from the epoch's beginning: last_batch="fill".
        place, repeat = divmod(position % len(order), self.repeats)
        wanted = int(order[place])
        for ahead in range(_MAX_SKIPPED):
            # Of the wanted example also for another one, which may be in this batch by itself.
            rng = _generator(self.seed, epoch, wanted, *([repeat] if repeat else []))
            index = int(order[(place + ahead) % len(order)])
            try:
                self.read_into(batch, row, index, rng, self.decode_as)
                return
            except UnreadableImage as error:
                if self.corrupt == "raise":
                    raise
                batch["skipped"][row] = wanted
                last = error
        raise UserError(f"{_MAX_SKIPPED} examples in a row cannot be read, the last: {last}")


@dataclasses.dataclass
class _EvalReader(_Reader):
    def __getitem__(self, offset: int) -> Batch:
        first = (self.start + offset) * self.batch_size
        indices = range(first + self.rows.start, min(first + self.rows.stop, len(self.source)))
        batch = self.empty()
        batch["mask"] = np.arange(len(batch["label"])) < len(indices)
        batch["index"] = np.zeros_like(batch["label"])
        rng = np.random.default_rng(0)  # asked for by the interface; nothing draws from it
        for row, index in enumerate(indices):
            self.read_into(batch, row, index, rng)
            batch["index"][row] = index
        return batch


def _generator(seed: int, *key: int) -> np.random.Generator:
    """Returns a generator of its own for every (seed, key); keys of any length do not collide."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


# Two: batches of the old and the new epoch are made at the same time around an epoch's end.
@functools.lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation of an epoch.

    A true permutation by numpy instead of Grain's `index_shuffle`: that one saves the memory
    (10 MB for ImageNet) with a block cipher of a 32-bit seed, and this one is drawn once an epoch
    in 20 ms.
    """
    return _generator(seed, epoch).permutation(num_examples)


class _RandomAccess(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, offset: int) -> Batch: ...


class Batches(Iterator[Batch]):
    """An iterator over batches, with `close()`, which ends its threads and worker processes."""

    def __init__(self, reader: _RandomAccess, workers: int):
        if workers < 0:
            raise UserError(f"workers={workers} must be 0 or more")
        # Imported here, since it imports jax (4 s), which sources and transforms don't need.
        import grain
        from absl import flags

        # Grain reads its flags when it starts a worker, which raises in a program without flags.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        threads = 0 if workers else parallel(0)
        batches = grain.MapDataset.source(reader).to_iter_dataset(
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
        # Also when the object is dropped, and when the interpreter ends.
        self._finalizer = weakref.finalize(self, _close, self._iterator)

    def __next__(self) -> Batch:
        return self._next()

    def _start(self) -> Batch:
        """Starts the worker processes, and returns the first batch."""
        self._next = self._receive
        # Ctrl-C and a cluster's SIGTERM go to every process of the group, but only the parent
        # knows what they mean: it finishes its step, for which it still needs batches, and closes
        # the workers. They, and the threads that start them, inherit this mask. (The tracker comes
        # first, since its start takes the mask off again.)
        resource_tracker.ensure_running()
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return self._receive()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def _receive(self) -> Batch:
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                f"a data worker was killed ({_first_sentence(error)}); often memory is"
                " short, or /dev/shm is: use fewer workers or a smaller batch_size, in"
                " Docker a larger --shm-size"
            ) from error
        # Plain arrays; the memory, shared with the worker, goes with the last of them.
        return {name: np.asarray(value) for name, value in batch.items()}

    def close(self) -> None:
        """Ends threads and worker processes; no batch can be taken any more."""
        self._finalizer()


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ", 1)[0]


def _close(iterator: Any) -> None:
    from grain.multiprocessing import SharedMemoryArray

    # Shared memory that is not unlinked when the program ends is warned about. Grain unlinks it in
    # a thread of its own, which may not get its turn any more: from here on it is done at once.
    SharedMemoryArray._disable_async_del()
    iterator.close()
    # The exception with which a worker's stream ended is part of a cycle, and holds a batch.
    gc.collect()


def _start_worker(worker: int, workers: int) -> None:
    """Prepares a worker process; Grain calls it there with the worker's number and their count."""
    del worker, workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, killed perhaps, and cannot tell it to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
