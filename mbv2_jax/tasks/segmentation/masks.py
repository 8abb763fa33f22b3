"""Masks of classes on the host: from samples, to the picture's size, and as a person sees them."""

from typing import Any

import numpy as np
from PIL import Image

from mbv2_jax.data import labels
from mbv2_jax.data.sample import IGNORED, Frame, Sample
from mbv2_jax.data.sources import Source
from mbv2_jax.errors import UnreadableImage, UserError
from mbv2_jax.tasks.segmentation.palette import colours

MASK = "mask"  # the name of the target


def of(sample: Sample) -> np.ndarray:
    """Returns a sample's mask, (H, W) uint8.

    Raises:
      UserError: it has none; the message begins with its id.
    """
    mask = sample.targets.get(MASK)
    if mask is None:
        raise UserError(
            f"{sample.id}: has no mask: for segmentation, give pairs:PATH, voc:PATH or digit_scenes"
        )
    return np.asarray(mask)


def check(source: Source) -> None:
    """Raises UserError if the first example of a split has no mask; the message names it."""
    try:
        sample = source[0]
    except UnreadableImage:  # reported, or passed over, when it is read
        return
    of(sample)


def fault(mask: np.ndarray, classes: int) -> str:
    """Returns why a mask cannot be used with so many classes; "" if it can."""
    odd = np.unique(mask[(mask >= classes) & (mask != IGNORED)])
    if not len(odd):
        return ""
    names = ", ".join(map(str, odd[:5]))
    return (
        f"its mask holds {names}, and there are classes 0 to {classes - 1}; {IGNORED} marks pixels "
        "that do not count"
    )


def in_picture(mask: np.ndarray, frame: Frame) -> np.ndarray:
    """Returns a mask of the network's image as a mask of the original picture.

    Each pixel of the picture takes the class of the nearest pixel of the image; those that the
    image does not show take that of its edge.

    Args:
      mask: (h, w) uint8.
      frame: of the image.

    Returns:
      (H, W) uint8.
    """
    width, height = frame.size
    left, top, right, bottom = frame.extent
    rows = _nearest(height, top, bottom, mask.shape[0])
    columns = _nearest(width, left, right, mask.shape[1])
    return mask[rows[:, None], columns]


def _nearest(count: int, start: float, stop: float, pixels: int) -> np.ndarray:
    """Returns the pixel of the image's axis that shows each of the picture's, (count,) int64."""
    position = (np.arange(count) + 0.5 - start) / (stop - start) * pixels
    return np.floor(position).clip(0, pixels - 1).astype(np.int64)


def shares(mask: np.ndarray) -> list[tuple[int, float]]:
    """Returns each class in a mask with its share of the pixels, 0 to 1, the largest first."""
    # Not np.bincount, which takes eight bytes for each pixel.
    pixels = np.array(Image.fromarray(mask).histogram())
    order = (-pixels).argsort(kind="stable")[: np.count_nonzero(pixels)]
    return [(int(label), float(pixels[label] / mask.size)) for label in order]


def to_image(mask: np.ndarray) -> Image.Image:
    """Returns a mask as an image of mode "P" with VOC's palette."""
    image = Image.fromarray(mask)
    image.putpalette(colours().tobytes())
    return image


class Relabelled(labels.Relabelled):
    """A source whose masks have a model's classes."""

    def targets(self, sample: Sample) -> dict[str, Any]:
        if odd := fault(of(sample), len(self.matches)):
            raise UserError(f"{sample.id}: {odd}")
        table = list(self.matches) + [IGNORED] * (256 - len(self.matches))
        return {MASK: sample.targets[MASK].point(table)}
