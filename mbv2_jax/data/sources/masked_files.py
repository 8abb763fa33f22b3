"""Image files with a mask file each: the common part of the sources `pairs` and `voc`."""

from collections.abc import Sequence

import numpy as np

from mbv2_jax.data import mask_files
from mbv2_jax.data.sample import IGNORED, Sample
from mbv2_jax.data.sources.parts import Part
from mbv2_jax.errors import UnreadableImage


class MaskedFiles:
    """A split of image files, each with a mask file; its samples have the target "mask".

    Args:
      images: the paths of the image files.
      masks: of their masks.
      names: of the classes in the masks, in the order of their numbers; those called `IGNORED_NAME`
        become IGNORED, and later classes move up.
      parts, note: as `sources.Source` and `sources.notes` describe them.
      faults: a line for each file that should be in the split and cannot be.

    Attributes:
      class_names: without the ignored ones.
      parts, note, faults: as given.
    """

    IGNORED_NAME = "ignored"

    def __init__(
        self,
        images: Sequence[str],
        masks: Sequence[str],
        names: Sequence[str],
        parts: list[Part],
        *,
        note: str = "",
        faults: Sequence[str] = (),
    ):
        self.class_names = tuple(name for name in names if name != self.IGNORED_NAME)
        self.parts, self.note, self.faults = parts, note, tuple(faults)
        self._images, self._masks = list(images), list(masks)
        self._count = len(names)
        self._table = None if self.IGNORED_NAME not in names else _table(names, self.class_names)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """Returns an example with its mask, a Pillow image of mode "L".

        Raises:
          UnreadableImage: the image or the mask cannot be read.
          UserError: the mask holds colours, or a number that is no class.
        """
        path = self._images[index]
        try:
            with open(path, "rb", buffering=0) as file:
                encoded = file.read()
        except OSError as error:
            raise UnreadableImage(f"cannot read the image: {error.strerror}") from error
        mask = mask_files.read(self._masks[index])
        mask_files.check_classes(mask, f"the mask {self._masks[index]}", self._count)
        if self._table is not None:
            mask = mask.point(self._table)
        return Sample(encoded, path, {"mask": mask})

    def describe(self, index: int) -> str:
        return self._images[index]


def _table(names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Returns the class of each number of a file's masks, 256 of them."""
    table = np.full(256, IGNORED)
    kept = [number for number, name in enumerate(names) if name != MaskedFiles.IGNORED_NAME]
    table[kept] = np.arange(len(class_names))
    return table.tolist()
