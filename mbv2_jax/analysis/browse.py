"""The first images of a training run as a picture, and the rate of the input."""

import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mbv2_jax import drawing
from mbv2_jax.analysis import output
from mbv2_jax.data import classes, loader, sources
from mbv2_jax.data import workers as workers_lib
from mbv2_jax.data.sample import IGNORED, ArraySpec, Boxes, Sample
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.data.workers import Batch, Batches
from mbv2_jax.errors import UnreadableImage, UserError
from mbv2_jax.tasks.segmentation import palette

if TYPE_CHECKING:
    from mbv2_jax.tasks.task import Task
    from mbv2_jax.training.config import Settings

MAX_COUNT = 1000  # a picture of more images is too large to look at
_NAME_LENGTH = 80  # characters; the picture has room for fewer
_ENDLESS = 1_000_000  # batches, more than anyone waits for
_LEGEND = 4  # classes that are named below an image with a mask
_MOST_BOXES = 100  # of an image, that are drawn
# The arrays of a batch that are drawn; "mask" is the loader's, and "boxes" the task's.
MASK, BOXES, LABELS, TEXTS = "drawn_mask", "drawn_boxes", "drawn_labels", "drawn_texts"


def browse(
    config: ConfigDict,
    out: str = "browse.png",
    *,
    count: int = 32,
    epoch: int = 0,
    seconds: float = 10.0,
    needs: float | None = None,
) -> None:
    """Draws the first images of an epoch, and measures and prints the rate of the input.

    The images are those of a run of this config on one process, bit for bit, before mixup and
    cutmix, which run on the device. Masks are drawn over them in VOC's colours, and boxes with the
    names of their classes.

    Args:
      config: of a recipe.
      out: the picture's file, replaced if it exists.
      count: the number of images, 1 to 1000.
      epoch: 0 or more.
      seconds: the time to measure the rate after a warm-up; 0 does not measure it.
      needs: images per second that the accelerator takes; None measures it, if there is one.

    Raises:
      UserError: an argument, the config or the data is wrong; data.corrupt is "raise", and an image
        cannot be read.
    """
    _check(out, count, epoch, seconds, needs)
    from mbv2_jax.training import config as config_lib  # here, because jax takes a second
    from mbv2_jax.training import skipped, splits

    as_given = config
    config = config_lib.without_groups(config)
    if "num_classes" in config.model:
        config.model.num_classes = None  # the data's own classes are shown
    settings = config_lib.read(config)
    data, batch_size = settings.data, settings.run.batch_size
    source = splits.open_training(settings)
    for note in sources.notes(source):
        _say(note)
    spec, task = config_lib.resolve(settings, source)
    transform = pipeline.make_transform(data.train_transforms, spec.preprocessing.image_size)
    batches = _batches(settings, source, transform, task, epoch)
    if data.workers:
        _say(f"starting {_worker_count(data.workers)} on {workers_lib.cores()} cores")
    with contextlib.closing(batches):
        take_out = skipped.Skipped(source, _say).take_out
        first = _first(batches, count, take_out)
        at_a_time = workers_lib.parallel(data.workers)
        rate = _rate(batches, at_a_time, batch_size, seconds) if seconds else None
    images = first["image"]
    labels = [[(str(name), drawing.INK)] for name in first["name"]]
    caption = _caption(settings, task, epoch, *images.shape[1:3])
    if MASK in first:
        images = _under(images, first[MASK])
        labels = [
            label + _legend(mask, source.class_names)
            for label, mask in zip(labels, first[MASK], strict=True)
        ]
    largest = drawing.LARGEST
    if BOXES in first:
        images = _boxed(first)
        largest = drawing.PHOTO_SIDE  # a shrunk text cannot be read
    output.write_picture(drawing.grid(images, labels, caption, largest=largest), out)
    print(f"{out}: the first images of epoch {epoch}")
    if rate is not None:
        _compare(as_given, source, rate, needs)


def _check(out: str, count: int, epoch: int, seconds: float, needs: float | None) -> None:
    """Raises UserError unless all arguments are possible."""
    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"--count={count}: give 1 to {MAX_COUNT} images")
    if epoch < 0:
        raise UserError(f"--epoch={epoch}: the first epoch is 0")
    if not 0 <= seconds < math.inf:
        raise UserError(f"--seconds={seconds:g}: give a number above 0, or 0 for no measurement")
    if needs is not None and not 0 < needs < math.inf:
        raise UserError(f"--needs={needs:g}: give a number of images per second")
    output.check_picture(out)


class _WithNames:
    """A collator that adds the arrays that are drawn with an image to another collator's.

    "name" is the text below it. If `drawn` is "mask", MASK is its mask; if it is "boxes", BOXES,
    LABELS and TEXTS are its boxes, up to _MOST_BOXES, with labels below 0 where there is none.
    """

    def __init__(self, collator: loader.Collator, class_names: Sequence[str], drawn: str):
        self._collator, self._class_names, self._drawn = collator, class_names, drawn

    def batch_spec(self, size: tuple[int, int]) -> dict[str, ArraySpec]:
        text = np.dtype(("U", _NAME_LENGTH))
        added = {"name": ArraySpec((), text)}
        if self._drawn == "mask":
            added[MASK] = ArraySpec(size, np.uint8)
        if self._drawn == "boxes":
            added[BOXES] = ArraySpec((_MOST_BOXES, 4), np.float32)
            added[LABELS] = ArraySpec((_MOST_BOXES,), np.int32)
            added[TEXTS] = ArraySpec((_MOST_BOXES,), text)
        return {**self._collator.batch_spec(size), **added}

    def collate(self, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
        added = {"name": np.array([self._name(sample) for sample in samples])}
        if self._drawn == "mask":
            added[MASK] = np.stack([np.asarray(sample.targets["mask"]) for sample in samples])
        if self._drawn == "boxes":
            added |= self._boxes(samples)
        return {**self._collator.collate(samples), **added}

    def _boxes(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        shape = (len(samples), _MOST_BOXES)
        corners, labels = np.zeros((*shape, 4), np.float32), np.full(shape, -1, np.int32)
        texts = np.full(shape, "", ("U", _NAME_LENGTH))
        for number, sample in enumerate(samples):
            boxes = sample.targets["boxes"].take(slice(_MOST_BOXES))
            corners[number, : len(boxes)] = boxes.corners
            labels[number, : len(boxes)] = boxes.labels
            texts[number, : len(boxes)] = _texts(boxes, self._class_names)
        return {BOXES: corners, LABELS: labels, TEXTS: texts}

    def _name(self, sample: Sample) -> str:
        label = sample.targets.get("label")
        if label is None:
            return pathlib.PurePath(sample.id).name  # there is no room for folders
        return classes.english(self._class_names[label])


def _batches(
    settings: "Settings",
    source: sources.Source,
    transform: pipeline.Transform,
    task: "Task",
    epoch: int,
) -> Batches:
    """Returns the run's batches from the beginning of an epoch on: see `_WithNames`."""
    data, batch_size = settings.data, settings.run.batch_size
    steps = loader.steps_per_epoch(len(source), batch_size, data.last_batch)
    return loader.train_batches(
        source,
        transform,
        _WithNames(task, source.class_names, _drawn(source)),
        batch_size=batch_size,
        seed=settings.run.seed,
        start=epoch * steps,
        stop=epoch * steps + _ENDLESS,
        workers=data.workers,
        last_batch=data.last_batch,
        repeats=data.repeats,
        corrupt=data.corrupt,
        decode_as=data.train_decode,
    )


def _drawn(source: sources.Source) -> str:
    """Returns the target of the first readable example that is drawn: "mask", "boxes" or ""."""
    for index in range(len(source)):
        try:
            targets = source[index].targets
        except UnreadableImage:  # data.corrupt decides later
            continue
        return next((name for name in ("mask", "boxes") if name in targets), "")
    return ""


def _texts(boxes: Boxes, class_names: Sequence[str]) -> list[str]:
    """Returns the text of each box: its class, and why it is not trained on."""
    found = []
    for label, crowd, difficult in zip(boxes.labels, boxes.crowd, boxes.difficult, strict=True):
        why = " (crowd)" if crowd else " (difficult)" if difficult else ""
        found.append(f"{class_names[label]}{why}")
    return found


def _first(
    batches: Iterator[Batch], count: int, take_out: Callable[[Batch], Batch]
) -> dict[str, np.ndarray]:
    """Returns the first `count` rows of "image" (count, H, W, 3), "name" and whatever is drawn.

    `take_out` is called with each batch, of which the last is cut to the wanted rows.
    """
    found: list[Batch] = []
    taken = 0
    while taken < count:
        wanted = slice(count - taken)
        batch = take_out({name: array[wanted] for name, array in next(batches).items()})
        # Copies, since the memory is the workers'.
        names = [name for name in ("image", "name", MASK, BOXES, LABELS, TEXTS) if name in batch]
        kept = {name: np.array(batch[name]) for name in names}
        found.append(kept)
        taken += len(kept["image"])
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def _under(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Returns images, each mixed half and half with its mask in VOC's colours."""
    return (images // 2) + (palette.colours()[masks] // 2)


def _boxed(first: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns images with their boxes, and the names of the classes; see `_WithNames`."""
    drawn = []
    for image, corners, labels, texts in zip(
        *(first[name] for name in ("image", BOXES, LABELS, TEXTS)), strict=True
    ):
        count = np.count_nonzero(labels >= 0)
        colours = [drawing.class_colour(label) for label in labels[:count].tolist()]
        picture = Image.fromarray(image)
        drawn.append(drawing.boxes(picture, corners[:count], texts[:count].tolist(), colours))
    return np.stack([np.asarray(picture) for picture in drawn])


def _legend(mask: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """Returns lines for the largest classes of a mask, each in the class's colour."""
    pixels = np.bincount(mask.ravel(), minlength=256)
    colours = palette.colours().tolist()
    lines = []
    for label in np.argsort(-pixels, kind="stable")[:_LEGEND].tolist():
        red, green, blue = colours[label]
        name, ink = "".join(class_names[label : label + 1]), (red, green, blue)
        if label == IGNORED:
            name, ink = "does not count", drawing.FAINT  # its own colour is too light to read
        # The share comes first, since long lines are shortened.
        text = f"■ {100 * pixels[label] / mask.size:.0f} % {name}"
        lines.append((text if pixels[label] else "", ink))
    return lines


def _rate(
    batches: Iterator[Batch],
    at_a_time: int,
    batch_size: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Returns images per second of batches that are taken as soon as they are made.

    Batches that are made in parallel are finished at about the same time, so time is counted from
    the end of one such round to the end of another. The first round, in which workers start, is the
    warm-up. No batches pile up before it, so none is ready ahead of time.
    """
    for _ in range(at_a_time):
        next(batches)
    start, taken = clock(), 0
    while taken == 0 or clock() - start < seconds:
        for _ in range(at_a_time):
            next(batches)
        taken += at_a_time
    return taken * batch_size / (clock() - start)


def _caption(settings: "Settings", task: "Task", epoch: int, height: int, width: int) -> list[str]:
    """Returns the lines above the images."""
    data = settings.data
    lines = [
        f"{data.source}, {data.train_split}: first images of epoch {epoch}, seed "
        f"{settings.run.seed}, {width} x {height}",
        data.train_transforms,
    ]
    if task.augmentations:
        lines.append(f"before {' and '.join(task.augmentations)}, on the device")
    return lines


def _compare(config: ConfigDict, source: sources.Source, rate: float, needs: float | None) -> None:
    """Prints the rates of input and accelerator, and how to speed up an input that is too slow."""
    from mbv2_jax.training import input_wait

    workers, cores = config.data.workers, workers_lib.cores()
    busy = min(cores, workers_lib.parallel(workers))
    how = _worker_count(workers)
    per_core = f"{rate / busy:,.0f} per core, {cores} cores here"
    print(f"input: {rate:,.0f} images/s with {how}: {per_core}")
    origin = "as given"
    if needs is None:
        found = _accelerator(config, source)
        if found is None:
            print(
                "accelerator: none here to compare with; give its rate as "
                "--needs=IMAGES_PER_SECOND, which browse prints on a machine that has one"
            )
            return
        needs, origin = found
    print(f"accelerator: {needs:,.0f} images/s, {origin}")
    if rate >= needs:
        print(f"the input keeps up: {rate / needs:.1f} times what is needed")
        return
    wait = 100 * (1 - rate / needs)
    print(f"the input does not keep up: the accelerator would wait {wait:.0f} % of the time")
    print(
        f"to change that: {input_wait.remedy(config.data)}; "
        f"at this rate per core, {math.ceil(needs * busy / rate)} cores are enough"
    )


def _worker_count(workers: int) -> str:
    """Returns the number of processes or threads that make batches: "16 worker processes"."""
    count = workers_lib.parallel(workers)
    one, many = ("worker process", "worker processes") if workers else ("thread", "threads")
    return f"{count} {one if count == 1 else many}"


def _accelerator(config: ConfigDict, source: sources.Source) -> tuple[float, str] | None:
    """Returns the accelerator's images per second, and its description; None if there is none."""
    from mbv2_jax.runtime import mesh as mesh_lib
    from mbv2_jax.training import config as config_lib
    from mbv2_jax.training import step_rate

    mesh = mesh_lib.create()
    kind = mesh_lib.accelerator(mesh)
    if kind is None:
        return None
    _say("compiling the training step, to measure it on the accelerator")
    settings = config_lib.read(config)
    return step_rate.measure(settings, source, mesh), f"this config's training step on {kind}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
