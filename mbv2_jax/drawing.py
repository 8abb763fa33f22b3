"""Pictures of photos with their predictions, and the text in other pictures."""

import io
import itertools
import pathlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from mbv2_jax.errors import UserError

# All in pixels.
PHOTO_SIDE = 640  # the photo's longer side, at most
TINY = 160  # a photo below that is enlarged, in whole steps that keep its pixels visible
PANEL_WIDTH = 420  # of the predictions below the photo, at least
MARGIN = 16
ROW = 38
BAR = 6
FONT_SIZE = 15

BACKGROUND = (255, 255, 255)
TRACK = (232, 234, 237)  # the background of a bar
FIRST, OTHER = (26, 115, 232), (154, 190, 240)  # the bars of the first class and of the others
INK, FAINT = (32, 33, 36), (95, 99, 104)

# Endings of the formats that Pillow writes; any other name gets .png appended.
WRITABLE = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def annotate(photo: Image.Image, predictions: Sequence[tuple[str, float]]) -> Image.Image:
    """Draws a photo with the predictions below it, as bars and percentages.

    Args:
      photo: upright, RGB, any size; scaled to a longer side of 160..640.
      predictions: (class name, score in 0..1), the best first. Names that are too long are cut.

    Returns:
      RGB; a new picture.
    """
    photo = _scaled(photo)
    width = max(photo.width, PANEL_WIDTH)
    height = photo.height + MARGIN + ROW * len(predictions) + BAR
    picture = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width, photo.height), TRACK)  # beside a narrow photo, and a line below it
    picture.paste(photo, ((width - photo.width) // 2, 0))
    lettering = font()
    left, right = MARGIN, width - MARGIN
    for rank, (name, score) in enumerate(predictions):
        bar, ink = (FIRST, INK) if rank == 0 else (OTHER, FAINT)
        percent = f"{score:.1%}"
        available = right - left - lettering.getlength(percent) - MARGIN
        baseline = photo.height + MARGIN + ROW * rank + FONT_SIZE
        draw.text((left, baseline), cut(name, available, lettering), ink, lettering, anchor="ls")
        draw.text((right, baseline), percent, ink, lettering, anchor="rs")
        top = baseline + BAR
        draw.rounded_rectangle((left, top, right, top + BAR), BAR // 2, TRACK)
        end = left + score * (right - left)
        if end - left >= BAR:  # a shorter bar would be a dot
            draw.rounded_rectangle((left, top, end, top + BAR), BAR // 2, bar)
    return picture


def save(picture: Image.Image, folder: pathlib.Path, name: str) -> pathlib.Path:
    """Writes a picture without overwriting a file.

    Args:
      folder: an existing one.
      name: the file's name; where it is taken, -2, -3, ... is inserted before its ending.

    Returns:
      The file.

    Raises:
      UserError: it cannot be written.
    """
    wanted = pathlib.Path(name)
    if wanted.suffix.lower() not in WRITABLE:
        wanted = pathlib.Path(f"{name}.png")
    encoded = io.BytesIO()
    kind = Image.registered_extensions()[wanted.suffix.lower()]
    picture.save(encoded, kind, quality=92)  # only JPEG and WebP use the quality
    try:
        for number in itertools.count(1):
            file = folder / (f"{wanted.stem}-{number}{wanted.suffix}" if number > 1 else wanted)
            try:
                with open(file, "xb") as stream:
                    stream.write(encoded.getvalue())
                return file
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"cannot write {folder / wanted}: {error.strerror or error}") from None
    raise AssertionError  # itertools.count does not end


def _scaled(photo: Image.Image) -> Image.Image:
    longer = max(photo.size)
    if longer < TINY:
        return photo.resize(_scaled_size(photo.size, -(-TINY // longer)), Image.Resampling.NEAREST)
    if longer > PHOTO_SIDE:
        return photo.resize(_scaled_size(photo.size, PHOTO_SIDE / longer), Image.Resampling.LANCZOS)
    return photo


def _scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont:
    """Returns the font for text in pictures; `size` is in pixels."""
    # Pillow's own font has no letters beyond ASCII, but users' class names may have some.
    return ImageFont.truetype(pathlib.Path(__file__).with_name("fonts") / "DejaVuSans.ttf", size)


def cut(text: str, width: float, lettering: ImageFont.FreeTypeFont) -> str:
    """Shortens text to a width in pixels."""
    if lettering.getlength(text) <= width:
        return text
    while text and lettering.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip(" ,") + "…"
