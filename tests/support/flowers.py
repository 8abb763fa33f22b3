"""Folders of images, one folder per class."""

import numpy as np
from PIL import Image


def write(path, *names) -> None:
    """Writes an image file at each path, each of a different grey level."""
    for level, name in enumerate(names):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(
            file, {".webp": "WEBP", ".png": "PNG", ".bmp": "BMP"}.get(file.suffix, "JPEG")
        )


def write_flowers(tmp_path):
    write(
        tmp_path / "train",
        "tulip/b.jpg",
        "tulip/a.JPEG",
        "rose/x.png",
        "rose/y.webp",
        "Iris/more/deep.bmp",
        "Iris/z.jpg",
        "Iris/10.jpg",
        "Iris/9.jpg",
        "Iris/more-2/a.jpg",
    )
    (tmp_path / "train" / "tulip" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "index.html").write_text("no class")
    write(tmp_path / "val", "Iris/1.jpg", "rose/1.jpg", "tulip/1.jpg")
    return tmp_path
