"""Geometry of samples: crops, padding, resizes and flips of image, boxes and masks together.

The rules:

- Pixels are interpolated, and antialiased where they shrink (Pillow's filters). A mask takes the
  nearest pixel's class, so that no class appears that was not there.
- A crop may reach beyond the image. There the image is filled with a colour (by default black), and
  a mask with the class IGNORED.
- A crop clips boxes to its edges, and drops those that lie outside it. A resize clips them to the
  image, beyond which those of a file may reach.
- A box's `area` is that of its object: a resize multiplies it by both factors, a crop by the share
  of the box that is left.
- Other targets stay as they are.
- A sample's `frame` follows the pixels, so that predictions find their way back.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from mbv2_jax.data.sample import IGNORED, Boxes, Sample
from mbv2_jax.errors import UserError

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels
Size = tuple[int, int]  # height, width, in pixels
Colour = tuple[int, int, int]  # R, G, B, 0 to 255
Targets = dict[str, Any]

BLACK: Colour = (0, 0, 0)

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


# ---- Samples ----


def crop(sample: Sample, box: Box, fill: Colour = BLACK) -> Sample:
    """Returns the part of a decoded sample inside `box`, which may reach beyond the image.

    Args:
      sample: its image is a Pillow image.
      box: left, top, width, height in pixels; left and top may be negative.
      fill: the colour of pixels outside the image.
    """
    left, top, width, height = box
    across, down = sample.image.size
    frame = sample.frame and sample.frame.part(
        left / across, top / down, (left + width) / across, (top + height) / down
    )
    image = _crop_image(sample.image, box, fill)
    targets = crop_targets(sample.targets, box)
    return dataclasses.replace(sample, image=image, targets=targets, frame=frame)


def pad(
    sample: Sample, left: int, top: int, right: int, bottom: int, fill: Colour = BLACK
) -> Sample:
    """Returns a decoded sample padded with this number of pixels on each side."""
    width, height = sample.image.size
    return crop(sample, (-left, -top, left + width + right, top + height + bottom), fill)


def resize(sample: Sample, size: Size, interpolation: str = "bilinear") -> Sample:
    """Returns a decoded sample of another size, whatever its aspect ratio was.

    Args:
      sample: its image is a Pillow image.
      size: (height, width) in pixels.
      interpolation: a key of INTERPOLATIONS, for the image.
    """
    width, height = sample.image.size
    targets = _resize_targets(sample.targets, (height, width), size)
    image = _resize_image(sample.image, size, INTERPOLATIONS[interpolation])
    return dataclasses.replace(sample, image=image, targets=targets)


def flip(sample: Sample) -> Sample:
    """Returns a decoded sample flipped horizontally."""
    width = sample.image.width

    def flip_boxes(boxes: Boxes) -> Boxes:
        x0, y0, x1, y1 = boxes.corners.T
        return dataclasses.replace(boxes, corners=np.stack([width - x1, y0, width - x0, y1], 1))

    return dataclasses.replace(
        sample,
        image=_flip_image(sample.image),
        targets=_map_targets(sample.targets, flip_boxes, _flip_image),
        frame=sample.frame and sample.frame.part(1, 0, 0, 1),
    )


# ---- Images and targets separately, for a decoder that crops while it decodes ----


def crop_and_resize_image(
    image: Image.Image, box: Box, size: Size, interpolation: str
) -> Image.Image:
    """Returns a box of an image, resized to (height, width) and antialiased."""
    # Not `resize(box=...)`, whose filter would also see the pixels around the box.
    return _resize_image(_crop_image(image, box, BLACK), size, INTERPOLATIONS[interpolation])


def crop_targets(targets: Mapping[str, Any], box: Box) -> Targets:
    """Returns the targets of an image's crop."""
    return _map_targets(
        targets,
        lambda boxes: _crop_boxes(boxes, box),
        lambda mask: _crop_image(mask, box, IGNORED),
    )


def crop_and_resize_targets(targets: Mapping[str, Any], box: Box, size: Size) -> Targets:
    """Returns the targets of an image's crop that is resized to (height, width)."""
    return _resize_targets(crop_targets(targets, box), (box[3], box[2]), size)


def spatial_targets(targets: Mapping[str, Any]) -> list[str]:
    """Returns the names of the targets with positions in the image: boxes and masks."""
    return [name for name, value in targets.items() if isinstance(value, (Boxes, Image.Image))]


def masks(targets: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Returns the targets that are masks."""
    return {name: value for name, value in targets.items() if isinstance(value, Image.Image)}


def check_masks(targets: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Raises UserError unless all masks are as large as their image, (width, height) in pixels."""
    for name, value in masks(targets).items():
        if value.size != size:
            raise UserError(
                f"the image is {size[0]} x {size[1]} pixels, upright, and its {name} "
                f"{value.width} x {value.height}: both must have the same size"
            )


def _map_targets(
    targets: Mapping[str, Any],
    move_boxes: Callable[[Boxes], Boxes],
    move_mask: Callable[[Image.Image], Image.Image],
) -> Targets:
    """Returns the targets with moved boxes and masks."""
    moved = dict(targets)
    for name, value in targets.items():
        if isinstance(value, Boxes):
            moved[name] = move_boxes(value)
        elif isinstance(value, Image.Image):
            moved[name] = move_mask(value)
    return moved


def _resize_targets(targets: Mapping[str, Any], old: Size, new: Size) -> Targets:
    return _map_targets(
        targets,
        lambda boxes: _scale_boxes(boxes, old, new),
        lambda mask: _resize_image(mask, new, Image.Resampling.NEAREST),
    )


def _crop_image(image: Image.Image, box: Box, fill: Colour | int) -> Image.Image:
    left, top, width, height = box
    right, bottom = left + width, top + height
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop((left, top, right, bottom))
    canvas = Image.new(image.mode, (width, height), fill)
    canvas.paste(image, (-left, -top))
    return canvas


def _resize_image(image: Image.Image, size: Size, resampling: Image.Resampling) -> Image.Image:
    height, width = size
    return image.resize((width, height), resampling)


def _flip_image(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _crop_boxes(boxes: Boxes, box: Box) -> Boxes:
    left, top, width, height = box
    moved = boxes.corners - np.array([left, top, left, top], np.float32)
    clipped = moved.clip(0, np.array([width, height, width, height], np.float32))
    kept = np.all(_sides(clipped) > 0, axis=1)
    share = _sides(clipped[kept]).prod(axis=1) / _sides(moved[kept]).prod(axis=1)
    boxes = boxes.take(kept)
    return dataclasses.replace(boxes, corners=clipped[kept], area=boxes.area * share)


def _scale_boxes(boxes: Boxes, old: Size, new: Size) -> Boxes:
    y, x = new[0] / old[0], new[1] / old[1]
    scaled = boxes.corners * np.array([x, y, x, y], np.float32)
    corners = scaled.clip(0, np.array([new[1], new[0]] * 2, np.float32))
    moved = dataclasses.replace(boxes, corners=corners, area=boxes.area * np.float32(x * y))
    return moved.take(np.all(_sides(corners) > 0, axis=1))


def _sides(corners: np.ndarray) -> np.ndarray:
    """Returns the widths and heights of boxes, (N, 2)."""
    return corners[:, 2:] - corners[:, :2]
