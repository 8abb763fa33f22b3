"""Folders of pictures with masks, for the sources `pairs` and `voc`."""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image


def write_classes(root: pathlib.Path, *lines: str) -> pathlib.Path:
    """Writes a classes.txt, and returns its folder."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


def write_image(path: pathlib.Path, size: tuple[int, int] = (6, 4), seed: int = 0) -> None:
    """Writes a picture of noise; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: pathlib.Path, rows: Sequence[Sequence[int]] | np.ndarray) -> None:
    """Writes a grey PNG that holds these numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(rows, np.uint8)).save(path)


def write_pair(split: pathlib.Path, name: str, rows: Sequence[Sequence[int]]) -> None:
    """Writes images/NAME.png, as large as the mask, and masks/NAME.png."""
    write_image(split / "images" / f"{name}.png", (len(rows[0]), len(rows)))
    write_mask(split / "masks" / f"{name}.png", rows)
