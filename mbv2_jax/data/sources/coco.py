"""COCO's pictures and objects, and data of one's own in COCO's JSON format.

    PATH/annotations/instances_SPLIT.json    the objects
    PATH/SPLIT/NAME.jpg                      the pictures, or PATH/images/SPLIT/, or PATH/images/

in which `train` and `val` also find COCO's train2017 and val2017; or, as Roboflow writes it,

    PATH/SPLIT/_annotations.coco.json        with the pictures beside it

The format is that of https://cocodataset.org/#format-data. Pictures come in the order of the file,
and the objects that are trained on are those of mmdetection's CocoDataset
(mmdet/datasets/coco.py).
"""

import gc
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mbv2_jax.data.sources import file_splits
from mbv2_jax.data.sources.boxed_files import (
    BoxedFiles,
    Corners,
    Object,
    Picture,
    fault,
    is_measure,
)
from mbv2_jax.errors import UserError, listed, nearest

_YEAR = "2017"
_FOLDER, _BEGINNING, _ENDING = "annotations", "instances_", ".json"
_BESIDE = "_annotations.coco.json"
_LEAST_SIDE = 1.0  # pixels, of a box that is trained on

# The members that are read, and the types that they have; numbers of pixels are float.
_IMAGE = {"id": int | str, "file_name": str, "width": float, "height": float}
_CATEGORY = {"id": int, "name": str}
_ANNOTATION = {"image_id": int | str, "category_id": int}


class CocoSource(BoxedFiles):
    """A split in COCO's format.

    The classes are the file's categories in the order of their ids. A part such as "train[:10%]" is
    a random one (file_splits.py).

    Args:
      path: the folder that holds the pictures and the annotations.
      split: a name, or an expression as `parts.read` takes it.

    Attributes:
      root: the folder of the pictures.
      class_names, category_ids, benchmark, parts, note, faults, bad_objects: as `BoxedFiles` has
        them; the faults are pictures that are missing, and annotations of unknown pictures.

    Raises:
      UserError: there is no such folder or split, the JSON is damaged or of another kind, or no
        picture of it is there.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise UserError("coco: needs a path, such as 'coco:/data/coco'")
        if not os.path.isdir(path):
            raise UserError(f"no folder {path!r}; coco: takes the folder that holds {_FOLDER}/")
        name = file_splits.split_name(path, split)
        file, self.root = _locate(path, name)
        images, annotations, categories = _read(file)
        labels, names = _classes(file, categories, annotations)
        chosen = file_splits.choose(file, split, name, len(images))
        if chosen.numbers is not None:
            images_chosen = [images[number] for number in chosen.numbers.tolist()]
        else:
            images_chosen = images
        by_image, faults = _by_image(file, images, annotations)
        there = _present(self.root, [image["file_name"] for image in images_chosen])
        pictures, bad = [], []
        for image in images_chosen:
            if image["file_name"] not in there:
                faults.append(f"{os.path.join(self.root, image['file_name'])} is missing")
                continue
            objects = []
            for number in by_image.get(image["id"], ()):
                found, why = _object(annotations[number], image, labels)
                if why:
                    bad.append(_line(file, annotations[number], number, image, why))
                if found is not None:
                    objects.append(found)
            pictures.append(_picture(self.root, image, objects))
        if not pictures:
            raise UserError(f"no picture of {file} is in {self.root}: {listed(faults)}")
        super().__init__(
            pictures,
            names,
            list(labels),
            "coco",
            split,
            chosen.parts,
            faults=faults,
            bad_objects=bad,
        )


def _locate(path: str, split: str) -> tuple[str, str]:
    """Returns the annotation file of a split and the folder of its pictures."""
    names = file_splits.spellings(split)
    for name in (*names, *(each + _YEAR for each in names)):
        folders = [
            os.path.join(path, name),
            os.path.join(path, "images", name),
            os.path.join(path, "images"),
        ]
        file = os.path.join(path, _FOLDER, f"{_BEGINNING}{name}{_ENDING}")
        if os.path.isfile(file):
            found = next(filter(os.path.isdir, folders), None)
            if found is None:
                raise UserError(f"no folder {folders[0]}: it holds the pictures of {file}")
            return file, found
        file = os.path.join(folders[0], _BESIDE)
        if os.path.isfile(file):
            return file, folders[0]
    wanted = f"{_FOLDER}/{_BEGINNING}{split}{_ENDING}"
    if known := _splits(path):
        raise UserError(f"no split {split!r} in {path}; {nearest(split, known)}")
    raise UserError(f"no {wanted} and no {split}/{_BESIDE} in {path}")


def _splits(path: str) -> list[str]:
    """Returns the names of the splits below a folder, sorted."""
    names = {name for name in os.listdir(path) if os.path.isfile(os.path.join(path, name, _BESIDE))}
    folder = os.path.join(path, _FOLDER)
    if os.path.isdir(folder):
        names |= {
            name[len(_BEGINNING) : -len(_ENDING)]
            for name in os.listdir(folder)
            if name.startswith(_BEGINNING) and name.endswith(_ENDING)
        }
    return sorted(names)


def _read(file: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns the images, annotations and categories of a file, whose members have been checked.

    Raises:
      UserError: it is not JSON, or not of this format.
    """
    # The collector would look through millions of new lists again and again: a third of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        with open(file, encoding="utf-8") as opened:
            content = json.load(opened)
    # The decoder raises RecursionError for values that are nested very deeply.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file} as JSON: {error}") from None
    finally:
        if collects:
            gc.enable()
    found = []
    for key, members in (
        ("images", _IMAGE),
        ("annotations", _ANNOTATION),
        ("categories", _CATEGORY),
    ):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{file} has no list {key!r}: coco: takes annotations in COCO's format")
        _check(file, key, entries, members)
        found.append(entries)
    images, annotations, categories = found
    for key, entries in (("images", images), ("categories", categories)):
        if not entries:
            raise UserError(f"{file} lists no {key}")
        seen = set()
        for entry in entries:
            if entry["id"] in seen:
                raise UserError(f"{file}: {key} has the id {entry['id']!r} more than once")
            seen.add(entry["id"])
    return images, annotations, categories


def _check(file: str, key: str, entries: Sequence[Any], members: Mapping[str, Any]) -> None:
    """Raises UserError unless every entry of a list has these members, of these types."""
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{file}: entry {number} of {key!r} is no object of JSON")
        for name, kind in members.items():
            found: Any = entry.get(name)
            if kind is float:
                is_sound = is_measure(found) and found >= 0
            else:
                is_sound = isinstance(found, kind) and not isinstance(found, bool)
            if not is_sound:
                value = f"is {entry[name]!r:.80}" if name in entry else "is missing"
                raise UserError(f"{file}: {name!r} of entry {number} of {key!r} {value}")


def _classes(
    file: str, categories: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]
) -> tuple[dict[int, int], list[str]]:
    """Returns the label of each category's id, in the order of the ids, and the classes' names.

    Roboflow adds a category for the group of all classes, of which there are no objects. Where it
    has the name of a class, it is left out.
    """
    by_name: dict[str, list[int]] = {}
    for category in sorted(categories, key=lambda category: category["id"]):
        by_name.setdefault(category["name"], []).append(category["id"])
    if len(by_name) < len(categories):
        used = {annotation["category_id"] for annotation in annotations}
        for name, ids in by_name.items():
            if len(ids) > 1:
                ids[:] = [each for each in ids if each in used] or ids[-1:]
            if len(ids) > 1:
                raise UserError(
                    f"{file}: the categories {listed(map(str, ids))} are named {name!r}"
                )
    named = sorted((ids[0], name) for name, ids in by_name.items())
    return {each: label for label, (each, _) in enumerate(named)}, [name for _, name in named]


def _by_image(
    file: str, images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]
) -> tuple[dict[int | str, list[int]], list[str]]:
    """Returns the numbers of each picture's annotations, and a line for those of no picture."""
    found: dict[int | str, list[int]] = {image["id"]: [] for image in images}
    faults = []
    for number, annotation in enumerate(annotations):
        if annotation["image_id"] in found:
            found[annotation["image_id"]].append(number)
        else:
            name = annotation.get("id", f"number {number}")
            faults.append(
                f"{file}: annotation {name} is of image {annotation['image_id']!r}, which it does "
                "not list"
            )
    return found, faults


def _present(root: str, names: Sequence[str]) -> set[str]:
    """Returns the names of the files that exist; a folder is listed once."""
    listings: dict[str, set[str]] = {}
    found = set()
    for name in names:
        folder, base = os.path.split(name)
        if folder not in listings:
            place = os.path.join(root, folder)
            listings[folder] = set(os.listdir(place)) if os.path.isdir(place) else set()
        if base in listings[folder]:
            found.add(name)
    return found


def _object(
    annotation: Mapping[str, Any], image: Mapping[str, Any], labels: Mapping[int, int]
) -> tuple[Object | None, str]:
    """Returns an annotation's object, None if it has no box or class; and why it is not trained on.

    The conditions are those of mmdetection.
    """
    label = labels.get(annotation["category_id"])
    if label is None:
        return None, f"there is no category {annotation['category_id']}"
    box = _numbers(annotation.get("bbox"))
    if box is None:
        return None, f"its bbox is {annotation.get('bbox')!r:.80}, and not four numbers"
    left, top, width, height = box
    area = annotation.get("area", width * height)
    if not is_measure(area):
        return None, f"its area is {area!r:.80}"
    corners = (left, top, left + width, top + height)
    why = fault(corners, _size(image), width, height, _LEAST_SIDE)
    if not why and area <= 0:
        why = f"its area is {area:g}"
    found = Object(
        corners,
        label,
        float(area),
        crowd=bool(annotation.get("iscrowd", False)),
        # mmdetection leaves objects with "ignore" out of training, and pycocotools' figures count
        # them as any others: there, only crowds are ignored.
        trained=not why and not annotation.get("ignore", False),
    )
    return found, why


def _numbers(value: Any) -> Corners | None:
    """Returns four numbers; None if the value is anything else."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_measure, value)):
        return None
    left, top, width, height = map(float, value)
    return left, top, width, height


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    return int(image["width"]), int(image["height"])


def _picture(root: str, image: Mapping[str, Any], objects: Sequence[Object]) -> Picture:
    return Picture(os.path.join(root, image["file_name"]), image["id"], _size(image), objects)


def _line(
    file: str, annotation: Mapping[str, Any], number: int, image: Mapping[str, Any], why: str
) -> str:
    name = annotation.get("id", f"number {number}")
    return f"{file}: annotation {name} of {image['file_name']}: {why}"
