"""Pascal VOC's pictures and objects, and data of one's own in VOC's XML format.

    VOC2012/ImageSets/Main/SPLIT.txt     the names of a split, a line each
    VOC2012/JPEGImages/NAME.jpg          or .png, .webp, .bmp, .tif, ...
    VOC2012/Annotations/NAME.xml         the objects
    VOC2012/classes.txt                  the names of the classes, a line each, if there is one

Coordinates are those of mmdetection's XMLDataset (mmdet/datasets/xml_style.py): whole numbers, all
four of them less by 1. So a box of VOC's 20 x 20 pixels, whose last row and column belong to it, is
one of 19 x 19.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from mbv2_jax.data.classes import VOC_NAMES
from mbv2_jax.data.sources import class_list, file_splits, voc
from mbv2_jax.data.sources.boxed_files import (
    BoxedFiles,
    Corners,
    Object,
    Picture,
    fault,
    is_measure,
)
from mbv2_jax.data.sources.folder import EXTENSIONS
from mbv2_jax.data.sources.parts import Part
from mbv2_jax.errors import UserError, listed

_LISTS = os.path.join("ImageSets", "Main")
_ANNOTATIONS = "Annotations"
_OBJECTS = VOC_NAMES[1:]  # without the background


class VocBoxes(BoxedFiles):
    """A split of VOC's pictures and objects.

    The classes are the lines of classes.txt; without it, VOC's 20 if all objects are of these, or
    else the sorted names of all objects in Annotations, so that all splits have the same classes.

    The split "validation" is val.txt if there is no validation.txt, and the other way round. A part
    such as "train[:90%]" is a random one (file_splits.py).

    Args:
      path: VOC2012, VOCdevkit, the folder that holds either, or another folder with ImageSets.
      split: the name of a list, or an expression as `parts.read` takes it.

    Attributes:
      root: the folder of the year.
      class_names, category_ids, benchmark, parts, note, faults, bad_objects: as `BoxedFiles` has
        them; the faults are files that are missing, XML that cannot be read, and objects of classes
        that classes.txt does not name.

    Raises:
      UserError: there is no such folder or split, or nothing in it can be used.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise UserError("voc: needs a path, such as 'voc:/data/VOCdevkit'")
        self.root = voc.find_root(path, _LISTS)
        name = file_splits.split_name(os.path.join(self.root, _LISTS), split)
        names = voc.read_list(self.root, _LISTS, name)
        chosen = file_splits.choose(self.root, split, name, len(names))
        if chosen.numbers is not None:
            names = [names[number] for number in chosen.numbers.tolist()]
        class_names, read = _read(self.root, names)
        images = _images(self.root)
        pictures: list[Picture] = []
        faults: list[str] = []
        bad: list[str] = []
        for each in names:
            annotation = read[each]
            file = images.get(each, os.path.join(self.root, voc.IMAGES, f"{each}.jpg"))
            found = [f"{file} is missing"] if each not in images else []
            if isinstance(annotation, str):
                found.append(annotation)
            if isinstance(annotation, str) or each not in images:
                faults += found
                continue
            xml = _xml(self.root, each)
            objects, odd, unknown = _objects(annotation, class_names)
            bad += [f"{xml}: {line}" for line in odd]
            faults += [f"{xml}: {line}" for line in unknown]
            pictures.append(Picture(file, each, annotation.size, objects))
        if not pictures:
            raise UserError(f"no picture of split {split!r} has its files; {faults[0]}")
        location = os.path.realpath(self.root)
        super().__init__(
            pictures,
            class_names,
            range(1, len(class_names) + 1),
            "voc",
            split,
            [Part(os.path.join(location, each), 0, 1) for each in names],
            faults=faults,
            bad_objects=bad,
        )


class _Marked(NamedTuple):
    """An object in an XML file.

    Attributes:
      name: of its class.
      corners: as written; None if they cannot be read.
      difficult: whether it is marked so.
    """

    name: str
    corners: Corners | None
    difficult: bool


class _Annotation(NamedTuple):
    """An XML file: (width, height) of its picture, (0, 0) where it has none; and its objects."""

    size: tuple[int, int]
    objects: list[_Marked]


def _xml(root: str, name: str) -> str:
    return os.path.join(root, _ANNOTATIONS, f"{name}.xml")


def _read(
    root: str, names: Sequence[str]
) -> tuple[tuple[str, ...], Mapping[str, _Annotation | str]]:
    """Returns the classes, and the annotation of each of these pictures, or its fault."""
    folder = pathlib.Path(root, _ANNOTATIONS)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: it holds the boxes, an XML file for each picture")
    listing = os.path.join(root, class_list.NAME)
    if os.path.isfile(listing):
        class_names = tuple(class_list.read(listing))
        return class_names, {name: _parse(_xml(root, name)) for name in names}
    every = {*names, *(file.stem for file in folder.glob("*.xml"))}
    read = {name: _parse(_xml(root, name)) for name in every}
    found = {
        marked.name
        for annotation in read.values()
        if not isinstance(annotation, str)
        for marked in annotation.objects
    }
    if not found:
        faults = sorted(annotation for annotation in read.values() if isinstance(annotation, str))
        raise UserError(f"no object in {folder}: {listed(faults) or 'all of its files have none'}")
    return _OBJECTS if found <= set(_OBJECTS) else tuple(sorted(found)), read


def _parse(path: str) -> _Annotation | str:
    """Returns the annotation in a file, or the reason why there is none."""
    try:
        with open(path, "rb", buffering=0) as file:
            tree = ElementTree.fromstring(file.read())
    except FileNotFoundError:
        return f"{path} is missing"
    # Of the decoder: ValueError and LookupError for encodings that it does not know.
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        return f"cannot read {path} as XML: {error}"
    sides = [_number(tree.findtext(f"size/{side}")) for side in ("width", "height")]
    size = (0, 0) if None in sides else (int(sides[0] or 0), int(sides[1] or 0))
    return _Annotation(size, [_marked(found) for found in tree.iterfind("object")])


def _marked(found: ElementTree.Element) -> _Marked:
    values = [_number(found.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = values
    corners = None
    if x0 is not None and y0 is not None and x1 is not None and y1 is not None:
        corners = (x0, y0, x1, y1)
    difficult = bool(_number(found.findtext("difficult")))
    return _Marked((found.findtext("name") or "").strip(), corners, difficult)


def _number(text: str | None) -> float | None:
    """Returns the number in a text; None if there is none, or it is no measure."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if is_measure(value) else None


def _images(root: str) -> dict[str, str]:
    """Returns the paths of the pictures by their names; a .jpg comes before others of its name."""
    folder = os.path.join(root, voc.IMAGES)
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder}: it holds the pictures")
    found: dict[str, str] = {}
    for file in sorted(os.listdir(folder), key=lambda file: not file.endswith(".jpg")):
        name, ending = os.path.splitext(file)
        if ending.lower() in EXTENSIONS:
            found.setdefault(name, os.path.join(folder, file))
    return found


def _objects(
    annotation: _Annotation, class_names: Sequence[str]
) -> tuple[list[Object], list[str], list[str]]:
    """Returns the objects of known classes; and lines for those that are bad, and of no class."""
    objects, lines, unknown = [], [], []
    for number, marked in enumerate(annotation.objects, start=1):
        name = f"object {number} ({marked.name})"
        if marked.name not in class_names:
            unknown.append(f"{name}: {marked.name!r} is no class of {class_list.NAME}")
        elif marked.corners is None:
            lines.append(f"{name}: its bndbox does not hold four numbers")
        else:
            x0, y0, x1, y1 = (float(int(value) - 1) for value in marked.corners)
            if why := fault((x0, y0, x1, y1), annotation.size, x1 - x0, y1 - y0):
                lines.append(f"{name}: {why}")
            area = (x1 - x0) * (y1 - y0)
            label = class_names.index(marked.name)
            objects.append(
                Object((x0, y0, x1, y1), label, area, difficult=marked.difficult, trained=not why)
            )
    return objects, lines, unknown
