"""Small folders of pictures with boxes, in each of the formats."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbv2_jax.data.sources import Source, faults, open_source
from tests.support.masked import write_image


def opened(name: str, split: str = "train", **options: Any) -> Any:
    """Returns a split for object detection."""
    return open_source(name, split, target="boxes", **options)


def corners(source: Any, index: int = 0) -> list[list[float]]:
    """Returns the corners of an example's boxes that can be trained on."""
    return np.asarray(source[index].targets["boxes"].corners).tolist()


def all_faults(name: str, split: str = "train") -> list[str]:
    """Returns the faults of a split."""
    source: Source = opened(name, split, with_faults=True)
    return list(faults(source))


def annotation(number: int, image: int, category: int, *box: float, **others: Any) -> dict:
    """Returns an annotation of COCO's format; the box is x, y, width, height."""
    found = {"id": number, "image_id": image, "category_id": category, "bbox": list(box)}
    return found | {"area": box[2] * box[3], "iscrowd": 0} | others


def write_coco(
    file: pathlib.Path,
    folder: pathlib.Path,
    images: Mapping[int, str],
    annotations: Sequence[dict],
    categories: Mapping[int, str],
    size: tuple[int, int] = (40, 30),
) -> None:
    """Writes an annotation file, and its pictures, of (width, height) pixels."""
    width, height = size
    for name in images.values():
        write_image(folder / name, size)
    content = {
        "images": [
            {"id": number, "file_name": name, "width": width, "height": height}
            for number, name in images.items()
        ],
        "annotations": list(annotations),
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def voc_object(name: str, *box: Any, **others: Any) -> str:
    """Returns an <object> of VOC's format; the box is xmin, ymin, xmax, ymax."""
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    bndbox = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    more = "".join(f"<{key}>{value}</{key}>" for key, value in others.items())
    return f"<object><name>{name}</name><bndbox>{bndbox}</bndbox>{more}</object>"


def write_voc(
    root: pathlib.Path,
    split: str,
    objects: Mapping[str, Sequence[str]],
    size: tuple[int, int] = (40, 30),
) -> None:
    """Writes a split in VOC's format: the objects of each picture, as `voc_object` gives them."""
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(objects) + "\n")
    described = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for name, found in objects.items():
        write_image(root / "JPEGImages" / f"{name}.jpg", size)
        text = f"<annotation>{described}{''.join(found)}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)


def write_yolo(
    images: pathlib.Path,
    labels: pathlib.Path,
    lines: Mapping[str, str | None],
    size: tuple[int, int] = (40, 30),
) -> None:
    """Writes pictures, and a file of labels for each whose text is not None."""
    labels.mkdir(parents=True, exist_ok=True)
    for name, text in lines.items():
        write_image(images / f"{name}.jpg", size)
        if text is not None:
            (labels / f"{name}.txt").write_text(text)
