"""The files that the commands of this folder write: pictures, tables, and the folders for them."""

import csv
import pathlib
import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mbv2_jax import drawing
from mbv2_jax.errors import UserError, first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110


def check_picture(out: str) -> None:
    """Raises UserError unless --out is an image file in a folder that exists."""
    path = pathlib.Path(out)
    if path.suffix.lower() not in drawing.WRITABLE:
        raise UserError(f"--out={out} does not end as an image file does; give {path.stem}.png")
    if not path.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {path.parent}")


def make_empty_folder(out: str) -> pathlib.Path:
    """Creates the folder of --out, and returns it.

    Raises:
      UserError: it cannot be created, or files are in it already.
    """
    folder = pathlib.Path(out).expanduser()
    drawing.make_folder(folder, "--out")
    if any(folder.iterdir()):
        raise UserError(f"--out={out} has files in it already: give a new folder")
    return folder


def write_picture(picture: Image.Image, path: str | pathlib.Path) -> None:
    """Writes a picture, replacing one that is there; raises UserError if it cannot be written."""
    try:
        picture.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from None


def new_figure(width: float, height: float, title: str) -> "Figure":
    """Returns an empty matplotlib figure, which no window shows.

    Args:
      width, height: in inches.
      title: lines above, which are wrapped.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    lines = [textwrap.fill(line, int(13 * width)) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", font=drawing.font_file(title), size=10)
    return figure


def write_figure(figure: "Figure", path: str | pathlib.Path) -> None:
    """Writes a figure as `write_picture` does, in any of its formats."""
    canvas: Any = figure.canvas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawing.font_file says so
        canvas.draw()
    write_picture(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def write_csv(path: pathlib.Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a table in UTF-8; raises UserError if it cannot be written."""
    try:
        # A file's name goes out as it came in.
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from None
