"""python -m mbv2_jax.predict: predict classes of image files, or of their pixels, or find objects.

Examples:
  python -m mbv2_jax.predict cat.jpg dog.png --checkpoint=mmpretrain
  python -m mbv2_jax.predict photos/ --checkpoint=runs/mine --show-dir=predicted
  python -m mbv2_jax.predict photos/ --checkpoint=runs/mine --topk=3 --json > predictions.jsonl
  python -m mbv2_jax.predict street/ --checkpoint=runs/segmentation --out-dir=masks
  python -m mbv2_jax.predict street/ --checkpoint=runs/detection --score=0.5 --show-dir=found
"""

import argparse
import json
import os
import pathlib
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tqdm

from mbv2_jax import command_line
from mbv2_jax.convert.published import PUBLISHED
from mbv2_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from mbv2_jax import inference
    from mbv2_jax.tasks.task import Task

SCORE = 0.3  # the least that is shown where a user gives none
_PIXELS = ("x0", "y0", "x1", "y1")  # columns of coordinates

_NAMES = textwrap.fill(", ".join(PUBLISHED), 92, initial_indent="    ", subsequent_indent="    ")

_EPILOG = f"""PATH is one of
  a model directory, a training run's workdir, or one of its checkpoints: WORKDIR:best,
    WORKDIR:last or WORKDIR:STEP
  weights of another framework: a .pth, .safetensors, .keras, .h5, .pb or .tflite file, ..., or
    its address
  the name of published weights, which are downloaded once:
{_NAMES}
  the name of a variant, such as mobilenet_v2_1.0_224, for random weights

A file that is not an image is reported on standard error; the others are predicted all the same,
and the exit status is 2.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mbv2_jax.predict",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="an image file, or a folder: the images in it and below, sorted",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="the model; see the end of this help"
    )
    parser.add_argument(
        "--topk",
        type=int,
        metavar="K",
        help="how many classes to name, at most (default: 5); detection: how many objects of an "
        "image, the best first (default: all of --score)",
    )
    parser.add_argument(
        "--score",
        type=float,
        metavar="S",
        help=f"detection: the least score of an object that is printed and drawn, from 0 for all "
        f"that the model finds to 1 (default: {SCORE})",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON per image")
    parser.add_argument(
        "--show-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="write each photo with its predictions below it to DIR (segmentation: the photo under "
        "its mask, with a legend; detection: the photo with boxes); no file there is overwritten",
    )
    parser.add_argument(
        "--out-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="segmentation: write the mask of each photo to DIR, as a PNG of its name and size, "
        "with VOC's palette, whose pixels are the numbers of classes; no file there is "
        "overwritten",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="images that go through the network at once (default: 32)",
    )
    arguments = parser.parse_args()
    if arguments.topk is not None and arguments.topk < 1:
        parser.error(f"--topk={arguments.topk}: give 1 or more")
    if arguments.score is not None and not 0 <= arguments.score <= 1:
        parser.error(f"--score={arguments.score}: give a number from 0 to 1")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size={arguments.batch_size}: give 1 or more")
    return arguments


def main() -> None:
    """Predicts all images; a bad one does not stop the others."""
    arguments = _arguments()
    folders = {"--show-dir": arguments.show_dir, "--out-dir": arguments.out_dir}
    for flag, folder in folders.items():
        if folder:
            from mbv2_jax import drawing

            drawing.make_folder(folder, flag, apart_from=arguments.images)

    from mbv2_jax import inference  # here, because jax takes seconds and --help does not need it
    from mbv2_jax.runtime import compilation_cache

    compilation_cache.enable()
    predictor = inference.init_model(arguments.checkpoint)
    if arguments.out_dir and not predictor.task.image_of:
        raise UserError(
            f"--out-dir={arguments.out_dir} is for masks, and the predictions of "
            f"{arguments.checkpoint} are none: --show-dir draws them, --json prints them"
        )
    if arguments.score is not None and not predictor.task.finds_objects:
        raise UserError(
            f"--score={arguments.score} is for objects, and {arguments.checkpoint} finds none: "
            "--topk limits the classes that are named"
        )
    report(
        predictor,
        arguments.images,
        topk=arguments.topk,
        score=SCORE if arguments.score is None else arguments.score,
        as_json=arguments.json,
        show_dir=arguments.show_dir,
        out_dir=arguments.out_dir,
        batch_size=arguments.batch_size,
    )


def report(
    predictor: "inference.Predictor",
    arguments: Sequence[str],
    *,
    topk: int | None = None,
    score: float = SCORE,
    as_json: bool = False,
    show_dir: pathlib.Path | None = None,
    out_dir: pathlib.Path | None = None,
    batch_size: int = 32,
) -> None:
    """Prints the predictions of images.

    Args:
      predictor: from inference.init_model.
      arguments: image files, and folders of them.
      topk: the most entries to print for each image, such as classes; None: `Task.most_entries`.
      score: the least score of an object, where the task finds objects.
      as_json: whether to print a JSON object for each image instead of the table.
      show_dir: a folder for annotated pictures.
      out_dir: a folder for predictions that are images, see `Task.to_image`.
      batch_size: images that go through the network at once.

    Raises:
      UserError: some of the images could not be predicted; the others were.
    """
    from mbv2_jax import drawing, inference
    from mbv2_jax.data import decoding

    images: list[Any] = []
    bad = 0
    for argument in arguments:
        try:
            images += inference.list_images(argument)
        except UserError as error:
            bad += 1
            _say(f"error: {error}")
    total, task = len(images) + bad, predictor.task
    limit = task.most_entries if topk is None else topk
    table = Table(images, task)
    outcomes = predictor.stream(images, batch_size)
    if len(images) > batch_size:
        outcomes = _with_bar(outcomes, len(images))
    for image, outcome in zip(images, outcomes, strict=True):
        if isinstance(outcome, UserError):
            bad += 1
            _say(f"error: {outcome}")
            continue
        prediction = task.confident(outcome, score) if task.finds_objects else outcome
        entries = task.entries(prediction, limit)
        line = {"image": image, "predictions": entries}
        print(json.dumps(line) if as_json else table.rows(image, entries))
        if show_dir:
            picture = task.draw(decoding.open_image(image), prediction, limit)
            drawing.save(picture, show_dir, os.path.basename(image))
        if out_dir:
            _write_image(task.to_image(prediction), out_dir, image, task.image_of)
    if bad:
        raise UserError(f"{bad} of {total} images could not be predicted")


def _write_image(picture: "Image.Image", folder: pathlib.Path, image: str, kind: str) -> None:
    """Writes a prediction that is an image under its photo's name; says so where it is taken."""
    from mbv2_jax import drawing

    name = f"{pathlib.Path(image).stem}.png"
    written = drawing.save(picture, folder, name)
    if written.name != name:
        _say(f"{image}: its {kind} is {written}, since {folder / name} exists")


def _with_bar(outcomes: Iterator[Any], count: int) -> Iterator[Any]:
    """Shows a progress bar on a terminal that does not show the results."""
    hidden = sys.stdout.isatty() or not sys.stderr.isatty()
    return iter(tqdm.tqdm(outcomes, total=count, unit=" images", disable=hidden))


def _say(line: str) -> None:
    """Prints a line to standard error, above the progress bar if there is one."""
    tqdm.tqdm.write(line, file=sys.stderr)


class Table:
    """Predictions as text, in columns wide enough for all of them.

    Args:
      images: the names of all images.
      task: the task whose entries fill the table.
    """

    def __init__(self, images: Sequence[str], task: "Task"):
        self._columns = task.columns
        self._image = max(map(len, ["image", *images]))
        self._number = len(str(len(task.classes) - 1))
        names = [self._cell(name, name) for name in self._columns]
        self._header = f"{'image':{self._image}}  rank  {'  '.join(names)}\n"

    def rows(self, image: str, entries: Sequence[Mapping[str, Any]]) -> str:
        """Returns a line for each entry of an image; the first call puts a header above them.

        An image without entries has a line that says so.
        """
        names = [image] + [""] * len(entries)
        lines = [
            f"{name:{self._image}}  {rank:4}  "
            + "  ".join(self._cell(column, entry[column]) for column in self._columns)
            for rank, (name, entry) in enumerate(zip(names, entries, strict=False), start=1)
        ]
        lines = lines or [f"{image:{self._image}}     -  nothing"]
        header, self._header = self._header, ""
        return header + "\n".join(lines)

    def _cell(self, column: str, value: Any) -> str:
        """Returns a value as text: shares as percentages, pixels with a decimal, right-aligned."""
        if column in ("score", "share"):
            return f"{value:>7}" if isinstance(value, str) else f"{value:7.2%}"
        if column in _PIXELS:
            return f"{value:>7}" if isinstance(value, str) else f"{value:7.1f}"
        if column == "label":
            return f"{value:>{max(len(column), self._number)}}"
        return str(value)


if __name__ == "__main__":
    command_line.run(main)
