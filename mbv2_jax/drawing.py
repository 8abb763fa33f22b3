"""Pictures of photos with their predictions, grids of images, and the text in other pictures."""

import colorsys
import functools
import importlib.util
import io
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mbv2_jax.errors import UserError

Colour = tuple[int, int, int]  # R, G, B
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

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
RIGHT, WRONG = (19, 115, 51), (197, 34, 31)  # the text of right and of wrong predictions

# Of masks over pictures.
COVER = 0.55  # share of a class's colour in the colour of its pixels
LEGEND_ROW = 28
SWATCH = 16  # side of a class's colour beside its name, in pixels

# Of boxes over pictures, in pixels.
LETTERS = (10, FONT_SIZE)  # heights of the font on the smallest and the largest pictures
PAD = 2  # around the text of a plate

# Of grids, in pixels.
SMALLEST, LARGEST = 112, 256  # side of an image
GAP = 12
LABEL = 26  # height of the line below an image
LINE = 20  # height of each further line
CAPTION = 24  # height of a line above the images

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
    picture, draw = _above_panel(photo, MARGIN + ROW * len(predictions) + BAR)
    lettering = font()
    left, right = MARGIN, picture.width - MARGIN
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


def _above_panel(photo: Image.Image, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Returns a picture of a photo above an empty panel of this height, and its pen."""
    width = max(photo.width, PANEL_WIDTH)
    picture = Image.new("RGB", (width, photo.height + height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width, photo.height), TRACK)  # beside a narrow photo, and a line below it
    picture.paste(photo, ((width - photo.width) // 2, 0))
    return picture, draw


def overlay(
    photo: Image.Image,
    mask: np.ndarray,
    palette: np.ndarray,
    classes: Sequence[tuple[str, int, float]],
) -> Image.Image:
    """Draws a photo under the colours of its classes, with a legend below.

    White lines separate the classes. A class whose colour is black, as VOC's background, leaves the
    photo as it is, and has an empty square in the legend.

    Args:
      photo: upright, RGB, any size; scaled to a longer side of 160..640.
      mask: (height, width) uint8, the class of each of its pixels.
      palette: (256, 3) uint8 RGB, the colour of each class.
      classes: (name, class, share in 0..1) of each line of the legend. Names that are too long are
        cut.

    Returns:
      RGB; a new picture.
    """
    shown = _scaled(photo)
    mask = np.asarray(Image.fromarray(mask).resize(shown.size, Image.Resampling.NEAREST))
    colours, pixels = palette[mask], np.asarray(shown)
    blended = ((1 - COVER) * pixels + COVER * colours).round().astype(np.uint8)
    covered = np.where(colours.any(-1, keepdims=True), blended, pixels)
    covered[_outlines(mask)] = BACKGROUND
    picture, draw = _above_panel(Image.fromarray(covered), MARGIN + LEGEND_ROW * len(classes))
    lettering = font()
    left, right = MARGIN, picture.width - MARGIN
    for rank, (name, number, share) in enumerate(classes):
        baseline = shown.height + MARGIN + LEGEND_ROW * rank + FONT_SIZE
        red, green, blue = palette[number] if palette[number].any() else BACKGROUND
        upper = baseline - SWATCH + 2
        square = (left, upper, left + SWATCH, upper + SWATCH)
        draw.rounded_rectangle(square, 3, (int(red), int(green), int(blue)), outline=FAINT)
        percent = f"{share:.1%}"
        start = left + SWATCH + MARGIN // 2
        available = right - start - lettering.getlength(percent) - MARGIN
        draw.text((start, baseline), cut(name, available, lettering), INK, lettering, anchor="ls")
        draw.text((right, baseline), percent, FAINT, lettering, anchor="rs")
    return picture


def boxes(
    photo: Image.Image,
    corners: np.ndarray | Sequence[Sequence[float]],
    texts: Sequence[str],
    colours: Sequence[Colour],
) -> Image.Image:
    """Draws a photo with boxes, and a text on a plate at each.

    Plates stay inside the picture. Each is at the first place around its box where it covers no
    other, or where it covers the least. Texts that are wider than the picture are cut.

    Args:
      photo: upright, RGB, any size; scaled to a longer side of 160..640.
      corners: (N, 4): x0, y0, x1, y1 in pixels of the photo; clipped to it.
      texts: of the N boxes, the most important first, which is drawn above the others; a box
        whose text is "" has no plate.
      colours: of the N boxes and plates, such as `class_colour` returns.

    Returns:
      RGB; a new picture.
    """
    shown = _scaled(photo)
    picture = shown.copy() if shown is photo else shown
    draw = ImageDraw.Draw(picture)
    scale = np.array([picture.width / photo.width, picture.height / photo.height] * 2)
    last = np.array([picture.width - 1, picture.height - 1] * 2)
    # The last pixel inside a box is left of and above its second corner.
    placed = (np.asarray(corners).reshape(-1, 4) * scale - [0, 0, 1, 1]).round().clip(0, last)
    found = [(x0, y0, max(x0, x1), max(y0, y1)) for x0, y0, x1, y1 in placed.astype(int).tolist()]
    line = 2 if max(picture.size) < PHOTO_SIDE // 2 else 3
    for box, colour in reversed(list(zip(found, colours, strict=True))):
        draw.rectangle(box, outline=_ink_on(colour), width=line + 1)
        draw.rectangle(box, outline=colour, width=line)
    height = min(max(LETTERS[0], max(picture.size) // 25), LETTERS[1])
    plates: list[_Plate] = []
    for box, text, colour in zip(found, texts, colours, strict=True):
        if text:
            plates.append(_plate(picture.size, box, text, colour, height, plates))
    for plate in reversed(plates):
        left, top, right, bottom = plate.place
        draw.rectangle((left, top, right - 1, bottom - 1), plate.colour)
        ink = _ink_on(plate.colour)
        draw.text((left + PAD, top), plate.text, ink, font(height, plate.text))
    return picture


class _Plate(NamedTuple):
    """A rectangle, whose right and bottom are outside, with the text of a box in its colour."""

    place: Rectangle
    text: str
    colour: Colour


def _plate(
    size: tuple[int, int],
    box: Rectangle,
    text: str,
    colour: Colour,
    letters: int,
    others: Sequence[_Plate],
) -> _Plate:
    """Returns the plate of a box's text.

    Args:
      size: (width, height) of the picture.
      box: whose text it is.
      text: cut to the picture's width.
      colour: of the box.
      letters: the height of the font.
      others: the plates that are there.
    """
    lettering = font(letters, text)
    text = cut(text, size[0] - 2 * PAD, lettering)
    width = min(size[0], math.ceil(lettering.getlength(text)) + 2 * PAD)
    height = sum(lettering.getmetrics())
    x0, y0, x1, y1 = box
    left, right = x0, x1 + 1 - width
    above, below, top, bottom = y0 - height, y1 + 1, y0, y1 + 1 - height
    places = [(left, above), (left, top), (right, above), (right, top)]
    places += [(left, below), (left, bottom), (right, below), (right, bottom)]
    found = []
    for x, y in places:
        x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        found.append((x, y, x + width, y + height))
    best = min(found, key=lambda place: sum(_shared(place, other.place) for other in others))
    return _Plate(best, text, colour)


def _shared(one: Rectangle, other: Rectangle) -> int:
    """Returns the number of pixels that are in both rectangles."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def class_colour(label: int) -> Colour:
    """Returns the colour of a class's boxes: bright, and unlike those of the next labels."""
    # Turned by the golden section, which keeps any number of hues apart.
    red, green, blue = colorsys.hsv_to_rgb((0.35 + 0.618034 * label) % 1, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _ink_on(colour: Colour) -> Colour:
    """Returns black or white, whichever is easier to read on a colour."""
    red, green, blue = colour
    return INK if 299 * red + 587 * green + 114 * blue > 128_000 else BACKGROUND


def _outlines(mask: np.ndarray) -> np.ndarray:
    """Returns which pixels of a mask have another class to their right or below: (H, W) bool."""
    found = np.zeros(mask.shape, bool)
    found[:, :-1] |= mask[:, 1:] != mask[:, :-1]
    found[:-1] |= mask[1:] != mask[:-1]
    return found


def make_folder(folder: pathlib.Path, flag: str, apart_from: Sequence[str] = ()) -> None:
    """Creates a folder for pictures, with its parent folders, unless it exists.

    Args:
      folder: the folder.
      flag: that named it, such as "--out", for messages.
      apart_from: the paths of the images to read, in whose folders the pictures must not lie:
        the next run would read them, too.

    Raises:
      UserError: it cannot be created, or lies in one of `apart_from`.
    """
    for path in apart_from:
        if os.path.isdir(path) and folder.resolve().is_relative_to(os.path.realpath(path)):
            raise UserError(f"{flag}={folder} lies in {path}: give a folder elsewhere")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {flag}={folder}: {error.strerror}") from None


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


def grid(
    images: np.ndarray,
    labels: Sequence[Sequence[tuple[str, tuple[int, int, int]]]],
    caption: Sequence[str],
    *,
    smallest: int = SMALLEST,
    largest: int = LARGEST,
) -> Image.Image:
    """Returns a picture of images in rows, each with lines of text below.

    Args:
      images: (N, H, W, 3) uint8 RGB, N at least 1; small ones are enlarged by a whole factor.
      labels: of the images: (text, colour) of each line, as many for each image; long lines are
        shortened.
      caption: lines above the images.
      smallest: the least side of an enlarged image, in pixels.
      largest: the longer side of a shrunk image.

    Returns:
      The picture, mode "RGB".
    """
    width, height = _shown_size(images.shape[1], images.shape[2], smallest, largest)
    filter_ = Image.Resampling.LANCZOS if width < images.shape[2] else Image.Resampling.NEAREST
    # About twice as wide as high.
    columns = min(math.ceil(math.sqrt(2 * len(images))), len(images))
    rows = -(-len(images) // columns)
    top, lines = GAP + CAPTION * len(caption), LABEL + LINE * (len(labels[0]) - 1)
    size = (GAP + columns * (width + GAP), top + GAP + rows * (height + lines + GAP))
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(caption):
        ink = FAINT if number else INK
        write(draw, (GAP, GAP + CAPTION * number), line, size[0] - 2 * GAP, ink)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(number, columns)
        left, upper = GAP + column * (width + GAP), top + GAP + row * (height + lines + GAP)
        picture.paste(Image.fromarray(image).resize((width, height), filter_), (left, upper))
        for position, (text, ink) in enumerate(label):
            write(draw, (left, upper + height + 4 + LINE * position), text, width, ink)
    return picture


def write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    width: float,
    ink: tuple[int, int, int] = INK,
) -> None:
    """Writes a line with its upper left corner at `corner`, shortened to a width in pixels."""
    lettering = font(text=text)
    draw.text(corner, cut(text, width, lettering), ink, lettering)


def _shown_size(height: int, width: int, smallest: int, largest: int) -> tuple[int, int]:
    """Returns the (width, height) at which a grid shows an image."""
    longer = max(height, width)
    if longer < smallest:
        factor = -(-smallest // longer)
        return width * factor, height * factor
    scale = min(1, largest / longer)
    return max(1, round(width * scale)), max(1, round(height * scale))


def font(size: int = FONT_SIZE, text: str = "") -> ImageFont.FreeTypeFont:
    """Returns the font for text in pictures: see `font_file`; `size` is in pixels."""
    return ImageFont.truetype(font_file(text), size)


def font_file(text: str = "") -> pathlib.Path:
    """Returns a font that has the letters of `text`: DejaVu Sans, or one of this machine's.

    Users' class names may be in any script. DejaVu Sans, which is in this package, has Latin,
    Greek, Cyrillic and Arabic letters, but no Chinese, Japanese or Korean ones. Where no font has
    the letters, or matplotlib is not there to look for one, it is DejaVu Sans, which shows boxes.
    """
    # Pillow's own font has no letters beyond ASCII.
    usual = pathlib.Path(__file__).with_name("fonts") / "DejaVuSans.ttf"
    # matplotlib takes time to import, and most names are ASCII.
    if text.isascii() or importlib.util.find_spec("matplotlib") is None:
        return usual
    missing = frozenset(ord(letter) for letter in text if letter.isprintable()) - _letters(usual)
    return (_font_with(missing) if missing else None) or usual


@functools.lru_cache(maxsize=1024)
def _font_with(letters: frozenset[int]) -> pathlib.Path | None:
    """Returns a font of this machine that has all of some letters (Unicode numbers), or None."""
    from matplotlib import font_manager

    ascii_letters = frozenset(range(32, 127))
    for file in sorted(font_manager.findSystemFonts()):
        path = pathlib.Path(file)
        if letters | ascii_letters <= _letters(path):
            return path
    _say_missing()
    return None


@functools.cache
def _say_missing() -> None:
    """Prints, once, why boxes stand for letters."""
    print(
        "no font of this machine has all the letters of the class names, and boxes stand for some; "
        "Noto Sans CJK, for example, has Chinese, Japanese and Korean ones",
        file=sys.stderr,
    )


@functools.cache
def _letters(file: pathlib.Path) -> frozenset[int]:
    """Returns the Unicode numbers of the letters of a font; none of one that cannot be read."""
    from matplotlib import ft2font

    try:
        return frozenset(ft2font.FT2Font(str(file)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def cut(text: str, width: float, lettering: ImageFont.FreeTypeFont) -> str:
    """Shortens text to a width in pixels."""
    if lettering.getlength(text) <= width:
        return text
    while text and lettering.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip(" ,") + "…"
