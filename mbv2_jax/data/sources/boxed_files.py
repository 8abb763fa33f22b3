"""Image files whose objects are marked by boxes: the common part of `coco`, `voc` and `yolo`."""

import copy
import io
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from mbv2_jax.data.sample import Boxes, Sample
from mbv2_jax.data.sources.parts import Part
from mbv2_jax.errors import UnreadableImage, UserError, listed

# Numbers beyond this are damage: no picture has as many pixels.
_LARGEST = 1e12

Corners = tuple[float, float, float, float]  # x0, y0, x1, y1


class Object(NamedTuple):
    """An object of a known class, as its file has it.

    Attributes:
      corners: in pixels, or in the units that `BoxedFiles._in_pixels` takes.
      label: its class.
      area: of the object, in the same units.
      crowd, difficult: as `Boxes` has them.
      trained: whether it can be trained on.
    """

    corners: Corners
    label: int
    area: float
    crowd: bool = False
    difficult: bool = False
    trained: bool = True


class Picture(NamedTuple):
    """A picture and its objects.

    Attributes:
      path: of the image file.
      id: the picture's name in files of results.
      size: (width, height) in pixels, (0, 0) where no file but the picture says.
      objects: in the order of their file.
    """

    path: str
    id: int | str
    size: tuple[int, int]
    objects: Sequence[Object]


class BoxedFiles:
    """A split of image files with boxes, a `sources.BoxSource`; its samples have "boxes".

    Args:
      pictures: of the split, at least one.
      class_names, category_ids, benchmark: as `sources.BoxSource` describes them.
      split: the split's name, for messages.
      parts, note: as `sources.Source` and `sources.notes` describe them.
      faults: a line for each file that should be in the split and cannot be.
      bad_objects: a line for each object that cannot be used, or not be trained on.

    Attributes:
      class_names, category_ids, benchmark, parts, faults, bad_objects: as given.
      note: as given, and a line about the bad objects, if there are any.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        class_names: Sequence[str],
        category_ids: Sequence[int],
        benchmark: str,
        split: str,
        parts: list[Part],
        *,
        note: str = "",
        faults: Sequence[str] = (),
        bad_objects: Sequence[str] = (),
    ):
        self.class_names, self.category_ids = tuple(class_names), tuple(category_ids)
        self.benchmark, self.parts = benchmark, parts
        self.faults, self.bad_objects = tuple(faults), tuple(bad_objects)
        self._images = [picture.path for picture in pictures]
        self._ids = [picture.id for picture in pictures]
        self._sizes = np.array([picture.size for picture in pictures], np.int64).reshape(-1, 2)
        # The objects of all pictures, one after another: a data set has a million of them, and is
        # sent to worker processes. Those of picture i are _starts[i] to _starts[i + 1] - 1.
        counts = [len(picture.objects) for picture in pictures]
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        self._objects, self._trained = _stack([o for each in pictures for o in each.objects])
        left_out = _left_out(split, int(self._trained.sum()), self.bad_objects)
        self.note = "\n".join(filter(None, [note, left_out]))
        self._chosen = np.arange(len(pictures))  # the pictures that are examples, in order

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        """Returns an example with the boxes that can be trained on, as float32.

        Raises:
          UnreadableImage: the image cannot be read.
        """
        path = self.describe(index)
        try:
            with open(path, "rb", buffering=0) as file:
                encoded = file.read()
        except OSError as error:
            raise UnreadableImage(f"cannot read the image: {error.strerror}") from error
        objects = self._objects_of(index)
        chosen = self._objects.take(objects).take(self._trained[objects])
        found = self._in_pixels(chosen, io.BytesIO(encoded))
        corners, area = found.corners.astype(np.float32), found.area.astype(np.float32)
        boxes = Boxes(corners, found.labels, found.crowd, found.difficult, area)
        return Sample(encoded, path, {"boxes": boxes})

    def describe(self, index: int) -> str:
        return self._images[self._chosen[index]]

    def image_id(self, index: int) -> int | str:
        """Returns the name of example `index` in files of results."""
        return self._ids[self._chosen[index]]

    def recorded_size(self, index: int) -> tuple[int, int]:
        """Returns the (width, height) that the files of example `index` give for its picture.

        Boxes are in its pixels. Reading a picture does not compare the two, but `verify` does.

        Returns:
          Pixels; (0, 0) where no file but the picture says.
        """
        width, height = self._sizes[self._chosen[index]].tolist()
        return width, height

    def boxes(self, index: int) -> Boxes:
        """Returns all objects of example `index`; corners and areas are float64, in pixels."""
        return self._in_pixels(self._objects.take(self._objects_of(index)), self.describe(index))

    def fullest(self) -> tuple[int, int]:
        """Returns the example with the most objects to train on, and the number of these."""
        counts = self._counts()[self._chosen]
        index = int(counts.argmax())
        return index, int(counts[index])

    def without_empty(self, smallest: int) -> Self:
        """Returns the examples with an object to train on, and no side below `smallest` pixels.

        Crowds and difficult objects alone do not count. A size that is not known passes.

        Raises:
          UserError: none is left.
        """
        sides = self._sizes.min(1)
        kept = (self._counts() > 0) & ((sides >= smallest) | (sides == 0))
        found = copy.copy(self)
        found._chosen = self._chosen[kept[self._chosen]]
        if not len(found._chosen):
            why = f": {listed(self.bad_objects)}" if self.bad_objects else ""
            raise UserError(
                f"none of {len(self):,} pictures, such as {self.describe(0)}, has an object to "
                f"train on and sides of {smallest} pixels or more{why}"
            )
        return found

    def _counts(self) -> np.ndarray:
        """Returns the objects of each picture that are trained on: (pictures,) int64."""
        counted = self._trained & ~self._objects.crowd & ~self._objects.difficult
        return np.diff(np.concatenate([[0], np.cumsum(counted)])[self._starts])

    def _in_pixels(self, boxes: Boxes, file: str | io.BytesIO) -> Boxes:
        """Returns objects of a picture in its pixels, from the units in which they were given.

        Args:
          boxes: the objects.
          file: the picture's, by its path or opened.
        """
        return boxes

    def _objects_of(self, index: int) -> slice:
        number = self._chosen[index]
        return slice(self._starts[number], self._starts[number + 1])


def _left_out(split: str, trained: int, bad: Sequence[str]) -> str:
    """Returns a sentence about the objects of a split that training leaves out; "" if none are.

    Args:
      split: its name.
      trained: the number of objects that can be trained on.
      bad: a line for each other.
    """
    if not bad:
        return ""
    verb = "is" if len(bad) == 1 else "are"
    return (
        f"{len(bad):,} of {trained + len(bad):,} objects of {split} {verb} not trained on, such as "
        f"{listed(bad[:1])} (python -m mbv2_jax.data verify names all)"
    )


def _stack(objects: Sequence[Object]) -> tuple[Boxes, np.ndarray]:
    """Returns objects as arrays, and whether each can be trained on."""
    corners, labels, areas, crowd, difficult, trained = (
        zip(*objects, strict=True) if objects else ((),) * len(Object._fields)
    )
    boxes = Boxes(
        np.array(corners, np.float64).reshape(-1, 4),
        np.array(labels, np.int32),
        np.array(crowd, bool),
        np.array(difficult, bool),
        np.array(areas, np.float64),
    )
    return boxes, np.array(trained, bool)


def is_measure(value: Any) -> bool:
    """Returns whether a value from a file is a number that a coordinate or an area can be."""
    return type(value) in (int, float) and abs(value) <= _LARGEST  # which NaN is not


def fault(
    corners: Corners, size: tuple[float, float], width: float, height: float, least: float = 0.0
) -> str:
    """Returns why a box cannot be trained on; "" if it can.

    Args:
      corners: of the box.
      size: (width, height) of the picture in the same units; (0, 0) where it is not known.
      width, height: of the box.
      least: the shortest side that a box may have.
    """
    if width <= 0 or height <= 0:
        return f"its box is {width:.6g} x {height:.6g}"
    if width < least or height < least:
        return f"its box is {width:.6g} x {height:.6g}, with a side below {least:g}"
    x0, y0, x1, y1 = corners
    across, down = size
    if across and down and (x0 >= across or y0 >= down or x1 <= 0 or y1 <= 0):
        shown = ", ".join(f"{value:.6g}" for value in corners)
        return f"its box ({shown}) lies outside the picture of {across:g} x {down:g}"
    return ""
