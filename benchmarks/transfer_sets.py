"""Small sets of photos for `benchmarks.transfer`, as PATH/{train,val}/CLASS/ folders.

Each seed draws other training photos; those of `val` are the same for all.
"""

import dataclasses
import random
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mbv2_jax.errors import UserError

ANIMALS = ("bird", "cat", "deer", "dog")


@dataclasses.dataclass(frozen=True)
class Set:
    """A set of photos to learn.

    Attributes:
      make: writes it below a folder, for a seed, from the folder of archives.
      epochs: passes over its training photos, the same for every way.
      about: a description for the table.
    """

    make: Callable[[Path, Path, int], None]
    epochs: int
    about: str


def _link(photos: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        (folder / photo.name).symlink_to(photo.resolve())


def _extracted(archive: Path, cache: Path) -> Path:
    """Returns the folder with an archive's files; extracts it on first use."""
    folder = cache / archive.name.split(".")[0]
    if not folder.is_dir():
        if not archive.is_file():
            raise UserError(f"{archive} is missing: see --data in --help")
        with tarfile.open(archive) as file:
            file.extractall(folder.with_suffix(".part"), filter="data")
        folder.with_suffix(".part").rename(folder)
    return folder


def _cifar(per_class: int) -> Callable[[Path, Path, int], None]:
    def make(target: Path, archives: Path, seed: int) -> None:
        root = _extracted(archives / "cifar10_jpeg.tar.gz", target.parent)
        for name in ANIMALS:
            train, val = (sorted((root / split / name).iterdir()) for split in ("train", "test"))
            _link(random.Random(f"{seed} {name}").sample(train, per_class), target / "train" / name)
            _link(random.Random(name).sample(val, 250), target / "val" / name)

    return make


def _cells(target: Path, archives: Path, seed: int) -> None:
    root = _extracted(archives / "bccd.tar", target.parent) / "BCCD" / "BCCD"
    found: dict[tuple[str, str], list[tuple[Path, tuple[int, int, int, int]]]] = {}
    for split, names in (("train", ["train"]), ("val", ["val", "test"])):
        for listing in names:
            for stem in (root / f"ImageSets/Main/{listing}.txt").read_text().split():
                for kind, box in _boxes(root / f"Annotations/{stem}.xml"):
                    photo = root / f"JPEGImages/{stem}.jpg"
                    found.setdefault((split, kind), []).append((photo, box))
    for (split, kind), crops in sorted(found.items()):
        count, draw = (100, f"{seed} {kind}") if split == "train" else (150, kind)
        folder = target / split / kind
        folder.mkdir(parents=True)
        for number, (photo, box) in enumerate(random.Random(draw).sample(crops, count)):
            with Image.open(photo) as image:
                image.convert("RGB").crop(box).save(folder / f"{number}.png")


def _boxes(file: Path) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Yields the class and the box (x0, y0, x1, y1) in pixels of each cell of 8 pixels or more."""
    for item in ElementTree.parse(file).getroot().iter("object"):
        bounds = item.find("bndbox")
        kind = item.findtext("name")
        assert bounds is not None and kind is not None
        sides = ("xmin", "ymin", "xmax", "ymax")
        left, upper, right, lower = (int(bounds.findtext(side) or 0) for side in sides)
        if min(right - left, lower - upper) >= 8:
            yield kind, (left, upper, right, lower)


def _digits(target: Path, archives: Path, seed: int) -> None:
    from sklearn.datasets import load_digits

    del archives
    digits = load_digits()
    for digit in range(10):
        numbers = np.flatnonzero(digits.target == digit).tolist()
        val = random.Random(digit).sample(numbers, 50)
        rest = [number for number in numbers if number not in set(val)]
        train = random.Random(f"{seed} {digit}").sample(rest, 100)
        for split, chosen in (("train", train), ("val", val)):
            folder = target / split / str(digit)
            folder.mkdir(parents=True)
            for number in chosen:
                pixels = (digits.images[number] * 255 / 16).astype(np.uint8)  # (8, 8)
                Image.fromarray(pixels).convert("RGB").save(folder / f"{number}.png")


SETS = {
    "animals-40": Set(_cifar(40), 30, "CIFAR-10's bird, cat, deer, dog; 40 photos each"),
    "animals-200": Set(_cifar(200), 8, "the same, 200 photos each"),
    "animals-1000": Set(_cifar(1000), 3, "the same, 1,000 photos each"),
    "cells-100": Set(_cells, 10, "BCCD's red and white cells and platelets; 100 crops each"),
    "digits-100": Set(_digits, 8, "scikit-learn's digits; 100 images each"),
}


def make(name: str, seed: int, archives: Path, cache: Path) -> Path:
    """Returns the folder of a set for a seed; makes it on first use."""
    target = cache / f"{name}-seed{seed}"
    if not target.is_dir():
        partial = target.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
        SETS[name].make(partial, archives, seed)
        partial.rename(target)
    return target
