"""Sources and a collator for tests of the loader, in a module that worker processes can import."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mbv2_jax.data.sample import ArraySpec, Sample
from mbv2_jax.data.sources.parts import Part
from mbv2_jax.errors import UserError


class LabelCollator:
    """Collates images and labels, as a classification task does."""

    def batch_spec(self, size: tuple[int, int]) -> dict[str, ArraySpec]:
        return {"image": ArraySpec((*size, 3), np.uint8), "label": ArraySpec((), np.int32)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        for sample in samples:
            if sample.targets["label"] < 0:
                raise UserError(f"{sample.id}: has no label")
        labels = [sample.targets["label"] for sample in samples]
        return {
            "image": np.stack([sample.image for sample in samples]),
            "label": np.array(labels, np.int32),
        }


class CodedSource:
    """A source whose example i is an 8 x 8 image of (i % 256, i // 256, 200), with label i % 10."""

    class_names = tuple("0123456789")

    def __init__(self, length: int, broken: int | None = None):
        self.parts = [Part("coded", 0, length)]
        self._length = length
        self._broken = broken

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if index == self._broken:
            return Sample(b"no image", self.describe(index), {"label": 0})
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (index % 256, index // 256, 200)).save(file, "PNG")
        return Sample(file.getvalue(), self.describe(index), {"label": index % 10})

    def describe(self, index: int) -> str:
        return f"coded/{index}.png"


def indices(batch: dict[str, np.ndarray]) -> list[int]:
    """Returns the numbers of the examples in a batch of `CodedSource`, from their colours."""
    pixels = batch["image"][:, 0, 0].astype(int)
    return [int(i) for i in pixels[:, 0] + 256 * pixels[:, 1]]


class PhotoSource:
    """A source whose example i is a JPEG file of coarse noise, label i % 10; some are broken."""

    class_names = tuple("0123456789")

    def __init__(self, length: int, broken: tuple[int, ...] = ()):
        self.parts = [Part("photos", 0, length)]
        self._length, self._broken = length, broken

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        patches = np.random.default_rng(index).integers(0, 256, (5, 6, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(patches).resize((90, 70)).save(file, "JPEG")
        encoded = file.getvalue()
        if index in self._broken:
            encoded = encoded[: len(encoded) // 2]
        return Sample(encoded, self.describe(index), {"label": index % 10})

    def describe(self, index: int) -> str:
        return f"photo {index}"
