"""Training images that cannot be read, where the config says to go on without them."""

from collections.abc import Callable

from mbv2_jax.data.decoding import decode
from mbv2_jax.data.sources import Source
from mbv2_jax.data.workers import Batch
from mbv2_jax.errors import UserError


class Skipped:
    """Says of each unreadable image once which it is and why, and counts them.

    Each process knows those of its own share of the batches, since it was started.

    Args:
      source: the training split.
      say: prints a line.
    """

    def __init__(self, source: Source, say: Callable[[str], None]):
        self._source, self._say = source, say
        self._found: dict[int, str] = {}  # index of an image -> its name, in the order of finding
        self._looking = False

    def take_out(self, batch: Batch) -> Batch:
        """Returns the batch without "skipped", which it has where data.corrupt is "skip"."""
        skipped = batch.pop("skipped", None)
        self._looking = skipped is not None
        for index in () if skipped is None else skipped.tolist():
            if index >= 0 and index not in self._found:
                self._found[index] = self._source.describe(index)
                self._say(f"skipping {self._found[index]}: {self._reason(index)}")
        return batch

    def metrics(self) -> dict[str, int]:
        """Returns {"skipped": how many different images so far}, for the log; {} with "raise"."""
        return {"skipped": len(self._found)} if self._looking else {}

    def summary(self) -> None:
        """Says how many there were, if any."""
        if self._found:
            first = next(iter(self._found.values()))
            self._say(f"unreadable images skipped: {len(self._found):,}; the first: {first}")

    def _reason(self, index: int) -> str:
        # The worker that met it sends pixels, not words.
        try:
            decode(self._source[index].image)
        except UserError as error:
            return str(error)
        return "it could not be read, and now it can: is the disk or the network all right?"
