"""Sources: the splits of datasets as random-access sequences of encoded samples.

digits              scikit-learn's handwritten digits (data/digits.py), prepared on first use
cifar10, ...        any prepared TFDS builder with `image` and `label` (tfds.py)
folder:PATH         image files: PATH/SPLIT/CLASS/*.jpg, or PATH/CLASS/*.jpg, of which a fifth is
                    held out (folder.py)
pairs:PATH          pictures and masks: PATH/SPLIT/images/NAME.jpg, PATH/SPLIT/masks/NAME.png and
                    PATH/classes.txt (pairs.py)
digit_scenes        scenes of scikit-learn's digits with masks and boxes (digit_scenes.py)
voc:PATH            Pascal VOC's pictures in VOCdevkit's layout, with masks (voc.py) or boxes, and
                    pictures and boxes of one's own in its XML format (voc_boxes.py)
coco:PATH           pictures and boxes in COCO's JSON format, also as Roboflow writes it (coco.py)
yolo:PATH           pictures and boxes in Ultralytics' layout: PATH/images/SPLIT/NAME.jpg,
                    PATH/labels/SPLIT/NAME.txt and PATH/data.yaml (yolo.py)

To add a kind of source, add a file here and an entry to `_PREFIXES` or `_EMBEDDED`; to
`_WITH_BOXES`, too, if another class opens it for object detection.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mbv2_jax.data.sample import Boxes, Sample
from mbv2_jax.data.sources import parts
from mbv2_jax.data.sources.boxed_files import BoxedFiles
from mbv2_jax.data.sources.coco import CocoSource
from mbv2_jax.data.sources.digit_scenes import BoxedDigitScenes, DigitScenes
from mbv2_jax.data.sources.folder import FolderSource
from mbv2_jax.data.sources.pairs import PairsSource
from mbv2_jax.data.sources.parts import Part
from mbv2_jax.data.sources.voc import VocSource
from mbv2_jax.data.sources.voc_boxes import VocBoxes
from mbv2_jax.data.sources.yolo import YoloSource
from mbv2_jax.errors import UserError, listed
from mbv2_jax.installed import require


class Source(Protocol):
    """A split of a dataset; picklable, so that it can be sent to worker processes.

    Attributes:
      class_names: in the order of the labels; () where the targets have no classes.
      parts: the parts of splits that this source consists of; parts of different datasets differ in
        `split`.
    """

    class_names: tuple[str, ...]
    parts: list[Part]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Returns example `index`, 0 <= index < len, whose image is the bytes of an image file.

        Its `id` is `describe(index)`. A "label" below 0 is unknown.

        Raises:
          UnreadableImage: its file or record cannot be read.
        """

    def describe(self, index: int) -> str:
        """Returns the name of example `index`: its file, or its dataset and number."""


class BoxSource(Source, Protocol):
    """A split of a dataset for object detection.

    Attributes:
      category_ids: the number of each class in files of results; None for a class of which the
        data cannot have objects.
      benchmark: "coco" or "voc", whose figures such data is compared by.
    """

    @property
    def category_ids(self) -> Sequence[int | None]: ...

    @property
    def benchmark(self) -> str: ...

    def boxes(self, index: int) -> Boxes:
        """Returns all objects of example `index` of known classes, as its files have them.

        Those in the sample's targets are the ones that can be trained on. The image is not read.

        Returns:
          Corners and areas are float64, in pixels of the picture.
        """

    def image_id(self, index: int) -> int | str:
        """Returns the name of example `index` in files of results."""

    def fullest(self) -> tuple[int, int]:
        """Returns the example with the most objects to train on, and the number of these."""

    def without_empty(self, smallest: int) -> "BoxSource":
        """Returns the examples with an object to train on, and no side below `smallest` pixels."""


# The kinds of datasets that are named PREFIX:PATH; each takes the path and the split. Other names
# are TFDS builders'.
_PREFIXES: dict[str, Callable[[str, str], Source]] = {
    "folder": FolderSource,
    "pairs": PairsSource,
    "voc": VocSource,
    "coco": CocoSource,
    "yolo": YoloSource,
}
# Those that are drawn here, and need no file; each takes the split.
_EMBEDDED: dict[str, Callable[[str], Source]] = {"digit_scenes": DigitScenes}
# Those of both kinds that are opened by another class for the target "boxes".
_WITH_BOXES: dict[str, Callable[..., Source]] = {
    "voc": VocBoxes,
    "digit_scenes": BoxedDigitScenes,
}


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    target: str = "",
    with_faults: bool = False,
) -> Source:
    """Opens a split of a dataset.

    Args:
      name: "digits", "digit_scenes", the name of a TFDS builder, or a prefix and a path, such as
        "folder:PATH".
      split: the split's name, or parts of it in TFDS's notation: "train[10000:]", "train[:90%]",
        "train[:20%]+train[40%:]" (see parts.py). Parts of a folder are random ones.
      data_dir: the folder of TFDS's prepared datasets; None is TFDS's default (TFDS_DATA_DIR, or
        tensorflow_datasets in the home folder). Other kinds of datasets ignore it.
      target: the name of the target that is wanted (`Task.target`), by which a dataset with several
        kinds of targets chooses its lists and its classes; "" for its first kind.
      with_faults: whether to open a split of which files are missing, without these examples;
        `faults` returns a line for each.

    Raises:
      UserError: the dataset or split is unknown, not prepared, empty, or of another kind, or files
        of it are missing.
    """
    prefix, colon, path = name.partition(":")
    special = _WITH_BOXES if target == "boxes" else {}
    if colon and prefix in _PREFIXES:
        source = special.get(prefix, _PREFIXES[prefix])(os.path.expanduser(path), split)
        if isinstance(source, BoxedFiles) and target not in ("", "boxes"):
            raise UserError(
                f"{name} has boxes and no {target!r}: it is for object detection, such as "
                "--config=finetune_detection"
            )
        if (found := faults(source)) and not with_faults:
            files = "1 file" if len(found) == 1 else f"{len(found):,} files"
            raise UserError(
                f"{files} of {name} cannot be used: {listed(found)} (python -m mbv2_jax.data "
                "verify lists all)"
            )
        return source
    if name in _EMBEDDED:
        return special.get(name, _EMBEDDED[name])(split)
    if os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name):
        raise UserError(
            f"unknown dataset {name!r}; for a folder of images write {'folder:' + name!r}"
        )
    require(f"dataset {name!r}", "tensorflow_datasets", "array_record", "google_crc32c")
    from mbv2_jax.data.sources.tfds import TfdsSource

    others = [*_EMBEDDED, *(f"{prefix}:PATH" for prefix in _PREFIXES)]
    return TfdsSource(name, split, os.path.expanduser(data_dir) if data_dir else None, others)


def notes(*opened: Source) -> list[str]:
    """Returns the sentences for the user about these splits, lines of their `note`, each once."""
    lines = [line for each in opened for line in getattr(each, "note", "").split("\n")]
    return [line for line in dict.fromkeys(lines) if line]


def faults(source: Source) -> Sequence[str]:
    """Returns a line for each file that should be in a split and is missing or has no other."""
    return getattr(source, "faults", ())


def bad_objects(source: Source) -> Sequence[str]:
    """Returns a line for each object of a split that cannot be used, or not be trained on."""
    return getattr(source, "bad_objects", ())


def recorded_size(source: Source, index: int) -> tuple[int, int]:
    """Returns the (width, height) in pixels that a source's files give for a picture, or (0, 0)."""
    return source.recorded_size(index) if hasattr(source, "recorded_size") else (0, 0)


def overlap(source: Source, other: Source) -> bool:
    """Returns whether any example is in both: of the same folder, or of the same TFDS split."""
    return parts.overlap(source.parts, other.parts)


def identity(source: Source, name: str) -> dict[str, Any]:
    """Returns facts that distinguish a split from others, without reading its images.

    Args:
      source: the split.
      name: its role, which the facts' names contain, such as "training".
    """
    class_names = hashlib.sha256("\n".join(source.class_names).encode()).hexdigest()
    ends = [source.describe(index) for index in (0, len(source) - 1)]
    return {
        f"{name} examples": len(source),
        f"SHA-256 of {name} classes": class_names,
        f"first and last of {name}": [pathlib.Path(end).name for end in ends],
    }
