"""A source whose images say which example they are; in a module, since workers import it."""

import io
from typing import Any

import numpy as np
from PIL import Image


class CodedSource:
    """Example i is an 8 x 8 image of the colour (i % 256, i // 256, 200) and has label i % 10."""

    class_names = tuple("0123456789")

    def __init__(self, length: int, broken: int | None = None):
        self._length = length
        self._broken = broken

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self._broken:
            return {"image": b"no image", "label": 0}
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (index % 256, index // 256, 200)).save(file, "PNG")
        return {"image": file.getvalue(), "label": index % 10}

    def describe(self, index: int) -> str:
        return f"coded/{index}.png"


def indices(batch: dict[str, np.ndarray]) -> list[int]:
    """Returns which examples a batch of an untouched `CodedSource` holds."""
    pixels = batch["image"][:, 0, 0].astype(int)
    return [int(i) for i in pixels[:, 0] + 256 * pixels[:, 1]]


class PhotoSource:
    """Example i is a JPEG file of noise in large patches, with label i % 10; some are broken."""

    class_names = tuple("0123456789")

    def __init__(self, length: int, broken: tuple[int, ...] = ()):
        self._length, self._broken = length, broken

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        patches = np.random.default_rng(index).integers(0, 256, (5, 6, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(patches).resize((90, 70)).save(file, "JPEG")
        encoded = file.getvalue()
        if index in self._broken:
            encoded = encoded[: len(encoded) // 2]
        return {"image": encoded, "label": index % 10}

    def describe(self, index: int) -> str:
        return f"photo {index}"
