"""Pictures and objects in the layout of Ultralytics' YOLO.

    PATH/data.yaml                  the classes: `names: [cat, dog]` or `names: {0: cat, 1: dog}`;
                                    or another file *.yaml; or classes.txt, a name a line
    PATH/images/SPLIT/NAME.jpg      or .png, .webp, .bmp, .tif, ...
    PATH/labels/SPLIT/NAME.txt      the objects of a picture; without the file there are none

or PATH/SPLIT/images/ and PATH/SPLIT/labels/, as Roboflow writes it; or PATH/images/ and
PATH/labels/ without splits, of which a fifth of the pictures is held out. Both may hold folders,
the same on both sides.

A line of a .txt is `class cx cy width height`, in shares of the picture, 0 to 1; or a class and the
corners of a polygon, x and y each, whose box is taken; or, where data.yaml has `kpt_shape`, a box
and the keypoints of a pose, which are not read. Only the layout of the folders counts: the paths in
data.yaml are not read.
"""

import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from mbv2_jax.data import decoding
from mbv2_jax.data.sample import Boxes
from mbv2_jax.data.sources import class_list, file_splits, two_folders
from mbv2_jax.data.sources.boxed_files import (
    BoxedFiles,
    Corners,
    Object,
    Picture,
    fault,
    is_measure,
)
from mbv2_jax.data.sources.folder import EXTENSIONS
from mbv2_jax.errors import UnreadableImage, UserError, first_line, listed

_LABELS = "labels"
_YAML = "data.yaml"
_LEAST_POLYGON = 3  # corners
_LARGEST_SHARE = 1.001  # of the picture; programs that write three digits round up to this


class YoloSource(BoxedFiles):
    """A split of pictures and objects in the layout that this module describes.

    The splits "validation", "val" and "valid" find one another. A part such as "train[:90%]" is a
    random one, and a folder without splits is split, as for pairs of pictures and masks.

    Args:
      path: the folder that holds data.yaml.
      split: a name, or an expression as `parts.read` takes it.

    Attributes:
      root: the folder of the pictures.
      class_names, category_ids, benchmark, parts, note, faults, bad_objects: as `BoxedFiles` has
        them; the faults are .txt files without a picture, pictures of the same name, and lines that
        cannot be read or are of an unknown class.

    Raises:
      UserError: there is no such folder or split, no picture, or no list of classes.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise UserError("yolo: needs a path, such as 'yolo:/data/animals'")
        if not os.path.isdir(path):
            raise UserError(f"no folder {path!r}; yolo: takes the folder that holds {_YAML}")
        class_names, keypoints = _classes(path)
        name = file_splits.split_name(path, split)
        self.root, labels, is_split = two_folders.locate(path, name, _LABELS)
        files, faults = two_folders.by_name(self.root, EXTENSIONS)
        texts, more = two_folders.by_name(labels, (".txt",))
        texts.pop("classes", None)  # which labelling programs write beside the labels
        alone = [os.path.join(labels, texts[each]) for each in texts if each not in files]
        faults += [*more, *(f"{file}: there is no picture of this name" for file in alone)]
        names = list(files)
        if not names:
            raise UserError(f"no picture in {self.root}; looked for {', '.join(EXTENSIONS)}")
        if is_split:
            chosen = file_splits.choose(self.root, split, name, len(names))
        else:
            numbered = [(each, 0) for each in names]
            chosen = file_splits.choose_held_out(path, split, name, numbered, "pictures")
        if chosen.numbers is not None:
            names = [names[number] for number in chosen.numbers.tolist()]
        pictures, bad = [], []
        for each in names:
            objects: list[Object] = []
            if each in texts:
                file = os.path.join(labels, texts[each])
                objects, odd, unread = _read(file, len(class_names), keypoints)
                bad += odd
                faults += unread
            pictures.append(Picture(os.path.join(self.root, files[each]), each, (0, 0), objects))
        super().__init__(
            pictures,
            class_names,
            range(1, len(class_names) + 1),
            "coco",
            split,
            chosen.parts,
            note=chosen.note,
            faults=faults,
            bad_objects=bad,
        )

    def _in_pixels(self, boxes: Boxes, file: str | io.BytesIO) -> Boxes:
        """Returns objects in pixels, given in shares of the picture; its header tells the size.

        Raises:
          UnreadableImage: the image is missing or none.
        """
        if not len(boxes):
            return boxes
        width, height = _size(file)
        scale = np.array([width, height, width, height], np.float64)
        return dataclasses.replace(
            boxes, corners=boxes.corners * scale, area=boxes.area * (width * height)
        )


def _size(file: str | io.BytesIO) -> tuple[int, int]:
    """Returns (width, height) of an image file, upright, in pixels."""
    try:
        with Image.open(file) as image:
            return decoding.upright_size(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("cannot read the image: not an image file") from error
    # Pillow raises OSError for most damaged files, and many other types from its file plugins.
    except Exception as error:
        raise UnreadableImage(f"cannot read the image: {first_line(error)}") from error


def _classes(path: str) -> tuple[list[str], int]:
    """Returns the classes of a folder, and how many numbers of keypoints follow each box."""
    folder = pathlib.Path(path)
    found = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    first = folder / _YAML
    for file in [first] if first in found else found:
        content = _read_yaml(file)
        if content.get("names") is not None:
            return _names(file, content["names"]), _keypoints(file, content.get("kpt_shape"))
    if (folder / class_list.NAME).is_file():
        return class_list.read(str(folder / class_list.NAME)), 0
    raise UserError(
        f"no list of classes in {path}: give {_YAML} with `names: [cat, dog]`, or "
        f"{class_list.NAME} with a name a line"
    )


def _read_yaml(file: pathlib.Path) -> dict[Any, Any]:
    """Returns the entries of a YAML file; {} if it has none."""
    try:
        content = yaml.safe_load(file.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"cannot read {file} as YAML: {first_line(error)}") from None
    return content if isinstance(content, dict) else {}


def _names(file: pathlib.Path, names: Any) -> list[str]:
    """Returns the classes that a YAML file names."""
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise UserError(f"{file}: the keys of `names` must be 0, 1, 2, ..., one for each class")
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: `names` must be a list of the classes, or {{0: cat, 1: dog}}")
    for label, name in enumerate(names):
        # YAML reads ~ as nothing, yes and no as truth values, and some names as numbers.
        if name == "" or type(name) not in (str, int, float):
            raise UserError(
                f"{file}: class {label} of `names` is {name!r:.80}, which is no name: write it in "
                "quotes"
            )
    names = [str(name) for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{file} names {listed(map(repr, twice), separator=', ')} more than once")
    return names


def _keypoints(file: pathlib.Path, shape: Any) -> int:
    """Returns how many numbers follow each box, by the `kpt_shape` of a YAML file."""
    if shape is None:
        return 0
    if (
        not isinstance(shape, list)
        or [type(each) for each in shape] != [int, int]
        or shape[0] < 1
        or shape[1] not in (2, 3)
    ):
        raise UserError(
            f"{file}: `kpt_shape` is {shape!r:.80}: it must be [number of keypoints, 2 or 3]"
        )
    return shape[0] * shape[1]


def _read(file: str, classes: int, keypoints: int) -> tuple[list[Object], list[str], list[str]]:
    """Returns the objects of a file, in shares of the picture.

    Args:
      file: its path.
      classes: their number.
      keypoints: how many numbers of keypoints follow each box; with 0 there may be polygons.

    Returns:
      The objects, without those whose numbers are no shares; a line for each that cannot be trained
      on; and a line for each line of the file that cannot be read or is of an unknown class.
    """
    try:
        text = pathlib.Path(file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return [], [], [f"cannot read {file} as text: {error}"]
    objects, bad, faults = [], [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        values = _numbers(line)
        if fault_of_line := _fault(line, values, classes, keypoints):
            faults.append(f"{file}: line {number} {fault_of_line}")
            continue
        if keypoints:
            values = values[:5]
        if (largest := max(values[1:])) > _LARGEST_SHARE:
            bad.append(
                f"{file}: line {number}: it has {largest:g}; its numbers must be shares of the "
                "picture, 0 to 1, and not pixels"
            )
            continue
        corners = _box(values[1:]) if len(values) == 5 else _around(values[1:])
        x0, y0, x1, y1 = corners
        why = fault(corners, (1.0, 1.0), x1 - x0, y1 - y0)
        bad += [f"{file}: line {number}: {why}"] if why else []
        objects.append(Object(corners, int(values[0]), (x1 - x0) * (y1 - y0), trained=not why))
    return objects, bad, faults


def _fault(line: str, values: Sequence[float], classes: int, keypoints: int) -> str:
    """Returns why a line with these numbers cannot be used; "" if it can."""
    if keypoints:
        other, is_other = (
            f"these and {keypoints} numbers of keypoints",
            len(values) == 5 + keypoints,
        )
    else:
        other = "a class and the corners of a polygon"
        is_other = len(values) > 2 * _LEAST_POLYGON and len(values) % 2 == 1
    if len(values) != 5 and not is_other:
        return f"is {line.strip()!r:.80}, and not `class cx cy width height`, nor {other}"
    if values[0] not in range(classes):
        return f"is of class {values[0]:g}, and there are classes 0 to {classes - 1}"
    return ""


def _numbers(line: str) -> list[float]:
    """Returns the numbers in a line; [] if one is none, or is no measure."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        return []
    return values if all(map(is_measure, values)) else []


def _box(values: Sequence[float]) -> Corners:
    x, y, width, height = values
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _around(values: Sequence[float]) -> Corners:
    """Returns the box around the corners of a polygon: x and y of each."""
    x, y = values[::2], values[1::2]
    return min(x), min(y), max(x), max(y)
