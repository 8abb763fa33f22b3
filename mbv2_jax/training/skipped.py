"""The unreadable training images that a run skips (data.corrupt=skip)."""

from collections.abc import Callable

from mbv2_jax.data.decoding import decode
from mbv2_jax.data.sources import Source
from mbv2_jax.data.workers import Batch
from mbv2_jax.errors import UserError


class Skipped:
    """Reports each unreadable image once, with the reason, and counts them.

    Each process counts the images in its own rows of the batches, from the time of its start.

    Args:
      source: the training split.
      say: prints a line.
    """

    def __init__(self, source: Source, say: Callable[[str], None]):
        self._source, self._say = source, say
        self._found: dict[int, str] = {}  # index of an image -> its name, in the order of discovery
        self._looking = False

    def take_out(self, batch: Batch) -> Batch:
        """Returns the batch without its array "skipped", which data.corrupt=skip adds."""
        skipped = batch.pop("skipped", None)
        self._looking = skipped is not None
        for index in () if skipped is None else skipped.tolist():
            if index >= 0 and index not in self._found:
                self._found[index] = self._source.describe(index)
                self._say(f"skipping {self._found[index]}: {self._reason(index)}")
        return batch

    def metrics(self) -> dict[str, int]:
        """Returns {"skipped": number of images so far} for the log; {} with data.corrupt=raise."""
        return {"skipped": len(self._found)} if self._looking else {}

    def summary(self) -> None:
        """Reports the number of skipped images, if any."""
        if self._found:
            first = next(iter(self._found.values()))
            self._say(f"unreadable images skipped: {len(self._found):,}; the first: {first}")

    def _reason(self, index: int) -> str:
        # Workers send arrays, and no error messages: read the image again.
        try:
            decode(self._source[index].image)
        except UserError as error:
            return str(error)
        return "it could not be read, and now it can: is the disk or the network all right?"
