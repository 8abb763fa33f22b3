"""A picture of what training will see, and how fast that comes beside how fast it is needed."""

import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from mbv2_jax import drawing
from mbv2_jax.data import classes, loader, sources
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import UserError

# All in pixels.
SMALLEST, LARGEST = 112, 256  # side of an image as it is shown
GAP = 12
LABEL = 26  # height of the line below an image
CAPTION = 24  # height of a line above the images

MAX_COUNT = 1000  # more make no picture that one can look at
_ENDLESS = 1_000_000  # batches; more than anyone waits for


def browse(
    config: ConfigDict,
    out: str = "browse.png",
    *,
    count: int = 32,
    epoch: int = 0,
    seconds: float = 10.0,
    needs: float | None = None,
) -> None:
    """Draws the first images of an epoch, measures the input's rate, and prints what it found.

    The images are those of a run of this config on one process, bit for bit, before mixup and
    cutmix, which the device does.

    Args:
      config: a recipe's.
      out: the picture's file; one that is there is replaced.
      count: how many images, 1 to 1000.
      epoch: 0 or more.
      seconds: how long the rate is measured, after a warm-up; 0: not at all.
      needs: images per second that the accelerator takes; None: measured, where there is one.

    Raises:
      UserError: an argument, the config or the data is wrong; data.corrupt is "raise", and an image
        cannot be read.
    """
    _check(out, count, epoch, seconds, needs)
    from mbv2_jax.training import config as config_lib  # here, because jax takes a second
    from mbv2_jax.training import skipped

    as_given = config
    config = config_lib.with_defaults(config)
    config.model.bn_group_size = 0  # the network's: a batch of any size has pictures
    config_lib.check(config)
    data = config.data
    source = sources.open_source(data.source, data.train_split, data.data_dir)
    batches = _batches(config, source, epoch)
    if data.workers:
        _say(f"starting {_makers(data.workers)} on {loader.cores()} cores")
    with contextlib.closing(batches):
        take_out = skipped.Skipped(source, _say).take_out
        images, labels = _first(batches, count, take_out)
        at_a_time = loader.parallel(data.workers)
        rate = _rate(batches, at_a_time, config.batch_size, seconds) if seconds else None
    names = [_english(source.class_names[label]) for label in labels]
    _save(grid(images, names, _caption(config, epoch, images.shape[1])), out)
    print(f"{out}: what training sees first of epoch {epoch}")
    if rate is not None:
        _compare(as_given, source, rate, needs)


def _check(out: str, count: int, epoch: int, seconds: float, needs: float | None) -> None:
    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"--count={count}: give 1 to {MAX_COUNT} images")
    if epoch < 0:
        raise UserError(f"--epoch={epoch}: the first epoch is 0")
    if not 0 <= seconds < math.inf:
        raise UserError(f"--seconds={seconds:g}: give 0, for no measurement, or more")
    if needs is not None and not 0 < needs < math.inf:
        raise UserError(f"--needs={needs:g}: give a number of images per second")
    path = pathlib.Path(out)
    if path.suffix.lower() not in drawing.WRITABLE:
        raise UserError(f"--out={out}: its ending names no kind of picture; give {path.stem}.png")
    if not path.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {path.parent}")


def _batches(config: ConfigDict, source: sources.Source, epoch: int) -> loader.Batches:
    """Returns the run's batches from the beginning of an epoch on."""
    data = config.data
    steps = loader.steps_per_epoch(len(source), config.batch_size, data.last_batch)
    return loader.train_batches(
        source,
        pipeline.make_transform(data.train_transforms, data.image_size),
        batch_size=config.batch_size,
        seed=config.seed,
        start=epoch * steps,
        stop=epoch * steps + _ENDLESS,
        workers=data.workers,
        last_batch=data.last_batch,
        repeats=data.repeats,
        corrupt=data.corrupt,
        decode_as=data.train_decode,
    )


def _first(
    batches: Iterator[loader.Batch], count: int, take_out: Callable[[loader.Batch], loader.Batch]
) -> tuple[np.ndarray, list[int]]:
    """Returns the first `count` images, (count, S, S, 3) uint8, and their labels.

    `take_out` gets the batches, of the last one only the rows that are wanted.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    while len(labels) < count:
        wanted = slice(count - len(labels))
        batch = take_out({name: array[wanted] for name, array in next(batches).items()})
        images.append(np.array(batch["image"]))  # a copy: workers' memory
        labels += batch["label"].tolist()
    return np.concatenate(images), labels


def _rate(
    batches: Iterator[loader.Batch],
    at_a_time: int,
    batch_size: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Returns images per second of batches that are taken as they come.

    Batches that are made at the same time come at about the same time. So they are counted from
    the end of one such round to the end of another; the first round, in which workers start, is
    the warm-up. As nobody lets batches pile up before, none is there that took no time.
    """
    for _ in range(at_a_time):
        next(batches)
    start, taken = clock(), 0
    while taken == 0 or clock() - start < seconds:
        for _ in range(at_a_time):
            next(batches)
        taken += at_a_time
    return taken * batch_size / (clock() - start)


def grid(images: np.ndarray, names: Sequence[str], caption: Sequence[str]) -> Image.Image:
    """Draws images in rows, each with its name below.

    Args:
      images: (N, S, S, 3) uint8 RGB, N at least 1; small ones are enlarged in whole steps.
      names: of the images; those that are too long are cut.
      caption: lines above.

    Returns:
      RGB.
    """
    side = images.shape[1]
    shown = side * -(-SMALLEST // side) if side < SMALLEST else min(side, LARGEST)
    filter_ = Image.Resampling.NEAREST if shown > side else Image.Resampling.LANCZOS
    columns = math.ceil(math.sqrt(2 * len(images)))  # about twice as wide as high
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    top = GAP + CAPTION * len(caption)
    size = (GAP + columns * (shown + GAP), top + GAP + rows * (shown + LABEL + GAP))
    picture = Image.new("RGB", size, drawing.BACKGROUND)
    draw, lettering = ImageDraw.Draw(picture), drawing.font()
    for number, line in enumerate(caption):
        text = drawing.cut(line, size[0] - 2 * GAP, lettering)
        ink = drawing.FAINT if number else drawing.INK
        draw.text((GAP, GAP + CAPTION * number), text, ink, lettering)
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        row, column = divmod(number, columns)
        left, upper = GAP + column * (shown + GAP), top + GAP + row * (shown + LABEL + GAP)
        picture.paste(Image.fromarray(image).resize((shown, shown), filter_), (left, upper))
        text = drawing.cut(name, shown, lettering)
        draw.text((left, upper + shown + 4), text, drawing.INK, lettering)
    return picture


def _english(name: str) -> str:
    """'tench' of 'n01440764'; another name as it is."""
    try:
        number = classes.IMAGENET_WNIDS.index(name)
    except ValueError:
        return name
    return classes.IMAGENET_NAMES[number].partition(",")[0]


def _caption(config: ConfigDict, epoch: int, side: int) -> list[str]:
    data = config.data
    lines = [
        f"{data.source}, {data.train_split}: first images of epoch {epoch}, seed {config.seed}, "
        f"{side} x {side}",
        data.train_transforms,
    ]
    mixed = [name for name in ("mixup", "cutmix") if config[f"{name}_alpha"]]
    if mixed:
        lines.append(f"before {' and '.join(mixed)}, which the device does")
    return lines


def _save(picture: Image.Image, out: str) -> None:
    try:
        picture.save(out)
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error.strerror or error}") from None


def _compare(config: ConfigDict, source: sources.Source, rate: float, needs: float | None) -> None:
    """Prints the input's rate beside the accelerator's, and what to do about the difference."""
    from mbv2_jax.training import input_wait

    workers, cores = config.data.workers, loader.cores()
    busy = min(cores, loader.parallel(workers))
    how = _makers(workers)
    print(f"input: {rate:,.0f} images/s with {how}: {rate / busy:,.0f} a core, {cores} cores here")
    what = "as given"
    if needs is None:
        found = _accelerator(config, source)
        if found is None:
            print(
                "accelerator: none here to compare with; --needs=IMAGES_PER_SECOND gives its rate, "
                "which browse prints on a machine that has one"
            )
            return
        needs, what = found
    print(f"accelerator: {needs:,.0f} images/s, {what}")
    if rate >= needs:
        print(f"the input keeps up: {rate / needs:.1f} times what is needed")
        return
    wait = 100 * (1 - rate / needs)
    print(f"the input does not keep up: the accelerator would wait {wait:.0f} % of the time")
    print(
        f"to change that: {input_wait.remedy(config.data)}; "
        f"at this rate a core, {math.ceil(needs * busy / rate)} would do"
    )


def _makers(workers: int) -> str:
    """Returns what makes batches, such as "16 worker processes"."""
    count = loader.parallel(workers)
    one, many = ("worker process", "worker processes") if workers else ("thread", "threads")
    return f"{count} {one if count == 1 else many}"


def _accelerator(config: ConfigDict, source: sources.Source) -> tuple[float, str] | None:
    """Returns the images per second that the accelerator takes, and what it is; None: no such."""
    from mbv2_jax.runtime import mesh as mesh_lib
    from mbv2_jax.training import step_rate

    mesh = mesh_lib.create()
    kind = mesh_lib.accelerator(mesh)
    if kind is None:
        return None
    _say("measuring the training step on the accelerator; it is compiled first")
    return step_rate.measure(config, source, mesh), f"this config's training step on {kind}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
