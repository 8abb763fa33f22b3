"""Batches of a split: which examples are in them, in which order, and with which random numbers.

Batch N depends on (seed, N) only. So the position of a training run is its step.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mbv2_jax.data import fast_decoding
from mbv2_jax.data.sample import ArraySpec, Sample
from mbv2_jax.data.sources import Source
from mbv2_jax.data.transforms.pipeline import Transform
from mbv2_jax.data.workers import Batch, Batches, cores
from mbv2_jax.errors import UnreadableImage, UserError, nearest

_LAST_BATCH = ("fill", "drop")
_CORRUPT = ("raise", "skip")
_DECODE = ("exact", "fast")

# This many unreadable examples in a row are not an accident.
_MAX_SKIPPED = 100

# With fewer batches of an evaluation for each, worker processes are not worth their start.
_BATCHES_PER_WORKER = 4


class Collator(Protocol):
    """Makes arrays of samples, as a task does; picklable, so that it can be sent to workers."""

    def batch_spec(self, size: tuple[int, int]) -> Mapping[str, ArraySpec]:
        """Returns the specs of an example's arrays, without batch axis, for (height, width)."""

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
        """Returns the arrays of transformed samples, (len(samples), ...) each.

        A row must depend on its sample only, since a process sees just its part of a batch.

        Raises:
          UserError: a sample has no target of the right kind; the message begins with its id.
        """


def steps_per_epoch(num_examples: int, batch_size: int, last_batch: str = "fill") -> int:
    """Returns the number of batches in an epoch.

    Args:
      num_examples: of the training split.
      batch_size: global.
      last_batch: "fill" rounds up: the last batch is filled with the epoch's first examples, as
        mmengine's DefaultSampler evens out its replicas (5,005 steps of 256 for ImageNet);
        "drop" rounds down: the epoch's last examples are left out.

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


def train_batches(
    source: Source,
    transform: Transform,
    collator: Collator,
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
) -> Batches:
    """Returns the training batches `start` to `stop - 1`, counted from the beginning of training.

    Batch N is a pure function of (seed, N): it does not depend on `start`, on `workers` or on
    earlier batches. The order of an epoch is a permutation drawn from (seed, epoch); the random
    numbers of an example's transform come from (seed, epoch, example, repeat). With several
    processes, process p gets rows p * batch_size / process_count onwards of the batch that a single
    process would get.

    Args:
      source: the training split.
      transform: of an example, from encoded bytes to pixels of a fixed size.
      collator: of transformed examples, to arrays.
      batch_size: global, a multiple of `process_count`.
      seed: 0 or more.
      start: the first batch.
      stop: one after the last batch.
      workers: number of worker processes; 0 makes batches in threads of this process.
      last_batch: see `steps_per_epoch`.
      repeats: how often an example comes in a batch, each time with other random numbers
        (repeated augmentation, Hoffer et al. 2020). An epoch stays as long as the split, so it
        holds only the first 1 / `repeats` of its permutation, as with torchvision's RASampler.
      corrupt: "raise" stops at an example that cannot be read or decoded; "skip" puts the epoch's
        next readable example in its place.
      decode_as: "exact" or "fast": see Transform.from_encoded.
      process_index: the number of this JAX process.
      process_count: the number of JAX processes.

    Returns:
      An iterator, with `close()`, over dicts of the collator's arrays, of batch_size /
      process_count rows. If `corrupt` is "skip", they also hold "skipped", int32 (rows,): the
      example that the row's example replaces, or -1.

    Raises:
      UserError: an argument is impossible; from the iterator: an image cannot be read or decoded,
        100 in a row cannot, or the collator refuses an example.
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
        collator,
        rows=_rows(batch_size, process_index, process_count),
        batch_size=batch_size,
        start=start,
        length=max(0, stop - start),
        seed=seed,
        steps_per_epoch=steps_per_epoch(len(source), batch_size, last_batch),
        repeats=repeats,
        corrupt=corrupt,
        decode_as=decode_as,
    )
    return Batches(reader, workers)


def eval_batches(
    source: Source,
    transform: Transform,
    collator: Collator,
    *,
    batch_size: int,
    workers: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Returns batches of every example exactly once, in the source's order, the last one padded.

    Args:
      source: the split to evaluate.
      transform: of an example, from encoded bytes to pixels of a fixed size; not random.
      collator: of transformed examples, to arrays.
      batch_size: global, a multiple of `process_count`.
      workers: number of worker processes, of which at most one per core is started; 0 makes batches
        in threads of this process, and so does a split with little to do for each worker.
      process_index: the number of this JAX process.
      process_count: the number of JAX processes. Each gets the same number of batches; their
        unmasked examples together are the split.

    Returns:
      An iterator, with `close()`, over dicts of the collator's arrays, of batch_size /
      process_count rows, and of "index", int32 (rows,): the example's number in the source, and
      "mask", bool (rows,). Where mask is False, all others are zero.

    Raises:
      UserError: an argument is impossible; from the iterator: an image cannot be read or decoded,
        or the collator refuses an example.
    """
    if transform.random:
        raise UserError(
            "an evaluation transform must not be random; use"
            " resize_edge(...)|center_crop(size), or resize(size)"
        )
    reader = _EvalReader(
        source,
        transform,
        collator,
        rows=_rows(batch_size, process_index, process_count),
        batch_size=batch_size,
        start=0,
        length=steps_per_epoch(len(source), batch_size),
    )
    workers = min(workers, cores())
    # Each worker takes seconds to start, in every evaluation.
    return Batches(reader, workers if len(reader) >= _BATCHES_PER_WORKER * workers else 0)


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns the rows of a global batch that belong to a process."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} processes"
        )
    per_process = batch_size // process_count
    return slice(process_index * per_process, (process_index + 1) * per_process)


@dataclasses.dataclass
class _Reader:
    """A random-access sequence of the rows of batches that a process reads."""

    source: Source
    transform: Transform
    collator: Collator
    rows: slice
    batch_size: int
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def empty(self) -> Batch:
        """Returns the arrays of a batch, filled with zeros."""
        count = self.rows.stop - self.rows.start
        spec = self.collator.batch_spec(self.transform.output_size)
        return {name: np.zeros((count, *array.shape), array.dtype) for name, array in spec.items()}

    def integers(self, value: int) -> np.ndarray:
        """Returns an int32 array of the batch's rows, filled with `value`."""
        return np.full(self.rows.stop - self.rows.start, value, np.int32)

    def read_into(
        self, batch: Batch, row: int, index: int, rng: np.random.Generator, decode_as: str = "exact"
    ) -> None:
        """Puts example `index` of the source into a row of the batch.

        Raises:
          UnreadableImage: its record cannot be read, or its image cannot be decoded.
          UserError: its image is too small for the transform, or the collator refuses it.
        """
        try:
            sample = self.transform.from_encoded(self.source[index], rng, decode_as)
        except UserError as error:
            raise type(error)(f"{self.source.describe(index)}: {error}") from error
        # Collated one by one, so that only one example exists besides the batch.
        for name, array in self.collator.collate([sample]).items():
            batch[name][row] = array[0]


@dataclasses.dataclass
class _TrainReader(_Reader):
    seed: int
    steps_per_epoch: int
    repeats: int
    corrupt: str
    decode_as: str

    def __getitem__(self, number: int) -> Batch:
        epoch, step = divmod(self.start + number, self.steps_per_epoch)
        positions = step * self.batch_size + np.arange(self.batch_size)
        if self.repeats > 1:
            # An example's repeats lie far apart in the batch: mixup and cutmix mix neighbours, and
            # groups of batch statistics are neighbours.
            positions = positions[np.lexsort((positions, positions % self.repeats))]
        batch = self.empty()
        if self.corrupt == "skip":
            batch["skipped"] = self.integers(-1)
        for row, position in enumerate(positions[self.rows].tolist()):
            self._read_position(batch, row, epoch, position)
        return batch

    def _read_position(self, batch: Batch, row: int, epoch: int, position: int) -> None:
        """Puts the example at a position of the epoch, or the next readable one, into a row."""
        order = _epoch_order(len(self.source), self.seed, epoch)
        # Positions past the end continue at the epoch's beginning: last_batch="fill".
        rank, repeat = divmod(position % len(order), self.repeats)
        wanted = int(order[rank])
        for ahead in range(_MAX_SKIPPED):
            # A replacement is augmented with the wanted example's random numbers, since its own may
            # be in use in the same batch.
            rng = _generator(self.seed, epoch, wanted, *([repeat] if repeat else []))
            index = int(order[(rank + ahead) % len(order)])
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
    def __getitem__(self, number: int) -> Batch:
        first = (self.start + number) * self.batch_size
        indices = range(first + self.rows.start, min(first + self.rows.stop, len(self.source)))
        batch = self.empty()
        batch["index"] = self.integers(0)
        batch["mask"] = np.arange(len(batch["index"])) < len(indices)
        rng = np.random.default_rng(0)  # part of the interface; evaluation draws nothing
        for row, index in enumerate(indices):
            self.read_into(batch, row, index, rng)
            batch["index"][row] = index
        return batch


def _generator(seed: int, *key: int) -> np.random.Generator:
    """Returns a separate generator for every (seed, key); keys of any length do not collide."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


# Two orders, since around an epoch's end batches of both epochs are made at the same time.
@functools.lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation of an epoch.

    NumPy draws a true permutation, which takes 20 ms and 10 MB per epoch of ImageNet. Grain's
    `index_shuffle`, a block cipher with a 32-bit seed, would need no memory.
    """
    return _generator(seed, epoch).permutation(num_examples)
