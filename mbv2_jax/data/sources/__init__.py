"""A dataset's name -> a random-access sequence of encoded images and labels.

digits              handwritten digits of scikit-learn (data/digits.py), prepared on first use
cifar10, ...        any prepared TFDS builder with `image` and `label` (data/sources/tfds.py)
folder:PATH         image files: PATH/SPLIT/CLASS/*.jpg, or PATH/CLASS/*.jpg for one split
                    (data/folder.py)
"""

import os
from typing import Any, Protocol

from mbv2_jax.data.sources import parts
from mbv2_jax.data.sources.folder import FolderSource
from mbv2_jax.data.sources.tfds import TfdsSource
from mbv2_jax.errors import UserError


class Source(Protocol):
    """A split of a dataset; picklable, so that it goes to worker processes."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": encoded bytes, "label": int} of example `index`, 0 <= index < len.

        Raises:
          UnreadableImage: its file or record cannot be read.
        """

    def describe(self, index: int) -> str:
        """Returns the name of example `index` for a message: its file, or dataset and number."""


def open_source(name: str, split: str, data_dir: str | None = None) -> FolderSource | TfdsSource:
    """Opens a split of a dataset.

    Args:
      name: "digits", the name of a TFDS builder, or "folder:PATH".
      split: the split's name, or parts of it in TFDS's words: "train[10000:]", "train[:90%]",
        "train[:20%]+train[40%:]" (data/parts.py). Parts of a folder are random ones.
      data_dir: where TFDS keeps prepared datasets; None = TFDS's default (TFDS_DATA_DIR, or
        tensorflow_datasets in the home folder). Of no use to a folder.

    Returns:
      The split.

    Raises:
      UserError: the dataset or split is unknown, not prepared, empty, or of another kind.
    """
    if name.startswith("folder:"):
        return FolderSource(os.path.expanduser(name.removeprefix("folder:")), split)
    if os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name):
        raise UserError(
            f"unknown dataset {name!r}; for a folder of images write {'folder:' + name!r}"
        )
    return TfdsSource(name, split, os.path.expanduser(data_dir) if data_dir else None)


def overlap(source: FolderSource | TfdsSource, other: FolderSource | TfdsSource) -> bool:
    """Whether some example is in both: the same folder's, or the same dataset's."""
    return parts.overlap(source.parts, other.parts)
