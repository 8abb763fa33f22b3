"""Checks of a dataset: the number of its examples, and every record that cannot be used."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from ml_collections import ConfigDict

from mbv2_jax import tasks
from mbv2_jax.analysis.random_examples import random_examples
from mbv2_jax.data import classes, mask_files, sources
from mbv2_jax.data import workers as workers_lib
from mbv2_jax.data.decoding import decode
from mbv2_jax.data.sample import IGNORED
from mbv2_jax.data.sources import Source, parts
from mbv2_jax.data.transforms import geometry, pipeline
from mbv2_jax.errors import RunFailed, UserError, listed

# Examples of ILSVRC 2012 by the names of its splits in TFDS and folders, and examples per class of
# the splits in which all classes have equally many (in train they have 732 to 1,300).
_IMAGENET = {"train": 1_281_167, "val": 50_000, "validation": 50_000}
_PER_CLASS = {"val": 50, "validation": 50}

# A folder counts as a copy of ImageNet, complete or not, if this share of its classes is
# ImageNet's, and if either the config has 1000 classes or the folder has this many of them.
# Otherwise it is a selection of classes, such as ImageNet-100.
_IMAGENET_SHARE = 0.9
_MIN_IMAGENET_CLASSES = 900

_RECORDS_PER_REPORT = 16
_RECORDS_PER_PROCESS = 2000  # with fewer, a process is not worth its start


def verify(
    config: ConfigDict, which: str = "both", sample: int | None = None, workers: int | None = None
) -> None:
    """Prints all faults of a config's splits, and one line of JSON last.

    The line is {"ok": bool, "splits": [{"split", "examples", "expected", "classes", "decoded",
    "bad"}, ...]}: `expected` is the number of examples in ImageNet's split of that name (None for
    other data, and for a part of a split), `decoded` the number of images that were read and fully
    decoded, `bad` the number of all others, including those whose label is not a class, whose mask
    is missing, is of another size, or holds a number that is no class, masks without an image, and
    images of another size than the file of their boxes says. With masks, "pixels" is {class: number
    of pixels}, and "ignored" their number without a class. With boxes, "boxes" is {class: number of
    objects that can be trained on}, crowds and difficult ones among them, of the decoded images,
    and "bad_boxes" the number of all other objects in the split's files: those outside the picture,
    say, or of an unknown class. Training leaves them out; here they are faults.

    If the config has 1000 classes (model.num_classes), a folder of ImageNet's classes should be all
    of ImageNet: missing examples and classes are faults. If both splits are checked, examples in
    both and classes in only one are faults, since training refuses them.

    Args:
      config: of a recipe; its data section is read.
      which: "train", "eval" or "both" of its splits.
      sample: the number of images of each split to decode, drawn with the config's seed; None
        decodes all.
      workers: the number of processes that decode; 0 decodes in threads; None keeps all cores busy.

    Raises:
      UserError: an argument is impossible, a transform cannot be parsed, or the data cannot be
        opened.
      RunFailed: the data has faults.
    """
    if sample is not None and sample < 1:
        raise UserError(f"--sample={sample}: give 1 image or more, or leave it out to decode all")
    if workers is not None and workers < 0:
        raise UserError(f"--workers={workers}: give a number of processes, or 0 for threads")
    _check_transforms(config)
    data = config.data
    names = {"train": [data.train_split], "eval": [data.eval_split]}.get(
        which, [data.train_split, data.eval_split]
    )
    target = tasks.find(config.task).target
    opened = {
        name: sources.open_source(data.source, name, data.data_dir, target=target, with_faults=True)
        for name in names
    }
    for note in sources.notes(*opened.values()):
        _say(note)
    faults = _faults_between(config, names, [opened[name] for name in names])
    for fault in faults:  # before the decoding, which may take hours
        _say(fault)
    splits = []
    for name, source in opened.items():
        split = _Split(name, source, _imagenet_split(config, name, source))
        _say(split.summary())
        split.report_missing()
        indices = random_examples(len(source), sample, config.seed)
        split.decode(indices, _processes(len(indices)) if workers is None else workers)
        if shares := split.shares():
            _say(shares)
        splits.append(split)
    for split in splits:
        for fault in split.faults():
            faults.append(f"{split.name}: {fault}")
            _say(faults[-1])
    print(json.dumps({"ok": not faults, "splits": [split.line() for split in splits]}), flush=True)
    if faults:
        raise RunFailed(f"{data.source} has faults: {listed(faults)}")


def _check_transforms(config: ConfigDict) -> None:
    """Raises UserError for transforms that training refuses."""
    from mbv2_jax.training import config as config_lib  # here, because jax takes a second
    from mbv2_jax.training import evaluation

    settings = config_lib.read(config)
    spec, _ = config_lib.resolve(settings, None)
    pipeline.make_transform(settings.data.train_transforms, spec.preprocessing.image_size)
    evaluation.eval_transform(spec.preprocessing)


def _faults_between(
    config: ConfigDict, names: Sequence[str], opened: Sequence[Source]
) -> list[str]:
    """Returns the reasons why training refuses two splits together; [] for one split."""
    if len(opened) < 2:
        return []
    quoted = [repr(name) for name in names]
    fault = tasks.find(config.task).split_fault(*opened)
    faults = [fault.format(*quoted)] if fault else []
    if sources.overlap(*opened):
        faults.append(
            f"{' and '.join(quoted)} hold the same images, or some of them; name two splits, or "
            "parts of one that share none, such as 'train[10%:]' and 'train[:10%]'"
        )
    return faults


def _imagenet_split(config: ConfigDict, name: str, source: Source) -> str | None:
    """Returns the key of _IMAGENET that this split should be; None if it is not ImageNet's."""
    dataset = config.data.source
    if parts.is_expression(name):
        return None
    if dataset.startswith("folder:"):
        known = _imagenet_classes(source)
        if known < _IMAGENET_SHARE * len(source.class_names):
            return None
        wants_all = config.model.num_classes == len(classes.IMAGENET_WNIDS)
        if known < _MIN_IMAGENET_CLASSES and not wants_all:
            return None
        name = os.path.basename(os.path.normpath(getattr(source, "root", name))).lower()
    elif dataset.replace(":", "/").split("/")[0] != "imagenet2012":
        return None
    return name if name in _IMAGENET else None


def _imagenet_classes(source: Source) -> int:
    """Returns the number of a source's classes that are ImageNet's, by WordNet id."""
    return len(set(classes.IMAGENET_WNIDS).intersection(source.class_names))


def _processes(count: int) -> int:
    """Returns the number of processes for decoding `count` records; 0 if threads are as fast."""
    cores = workers_lib.cores()
    is_worth_it = cores > workers_lib.parallel(0) and count >= _RECORDS_PER_PROCESS * cores
    return cores if is_worth_it else 0


@dataclasses.dataclass
class _Split:
    """A split, and the findings about it so far.

    Attributes:
      name: of the split.
      source: the split.
      imagenet: the key of _IMAGENET that it should be, or None.
      decoded: the number of images that were decoded.
      bad_boxes: the number of objects that cannot be trained on.
      bad: the number of images that cannot be used, and of masks without an image.
    """

    name: str
    source: Source
    imagenet: str | None
    decoded: int = 0
    bad: int = 0
    bad_boxes: int = 0

    def __post_init__(self) -> None:
        self._per_class = np.zeros(len(self.source.class_names), np.int64)
        self._boxes = np.zeros(len(self.source.class_names), np.int64)
        self._pixels = np.zeros(256, np.int64)  # of each number in the masks

    def summary(self) -> str:
        """Returns a line about the numbers of examples and classes."""
        found = f"{len(self.source):,} examples of {len(self.source.class_names):,} classes"
        if self.imagenet is not None:
            found += f"; ImageNet has {_IMAGENET[self.imagenet]:,} of 1,000"
        elif known := _imagenet_classes(self.source):
            found += f"; {known:,} of ImageNet's 1,000 classes"
        return f"{self.name}: {found}"

    def report_missing(self) -> None:
        """Prints each file that is missing or has no counterpart, and each bad object."""
        for fault in sources.faults(self.source):
            self.bad += 1
            _say(f"bad: {fault}")
        for fault in sources.bad_objects(self.source):
            self.bad_boxes += 1
            _say(f"bad: {fault}")

    def shares(self) -> str:
        """Returns a line about the classes' shares of the pixels or boxes; "" without either."""
        if self._boxes.any():
            return f"{self.name}: {self._boxes.sum():,} boxes: {self._listed(self._boxes)}"
        if not self._pixels.any():
            return ""
        ignored = 100 * self._pixels[IGNORED] / self._pixels.sum()
        found = self._listed(self._pixels)
        return f"{self.name}: pixels by class: {found}; {ignored:.1f} % do not count"

    def _listed(self, counts: np.ndarray) -> str:
        """Returns the share of each class in counts that begin with those of the classes."""
        counted = zip(self.source.class_names, counts, strict=False)
        total = counts.sum()
        return listed([f"{name} {100 * count / total:.1f} %" for name, count in counted], 40, ", ")

    def decode(self, indices: np.ndarray, workers: int) -> None:
        """Reads and decodes examples, and prints the fault of each bad one."""
        reports = _Reports(self.source, indices)
        batches = workers_lib.Batches(reports, workers)
        bar = tqdm.tqdm(
            total=len(indices),
            unit=" images",
            desc=f"decoding {self.name}",
            disable=not sys.stderr.isatty(),
        )
        with contextlib.closing(batches), bar:
            for number, batch in enumerate(batches):
                for index, reason in zip(reports.part(number), batch["reason"], strict=True):
                    if reason:
                        self.bad += 1
                        _say(f"bad: {self.source.describe(int(index))}: {reason}")
                sound = batch["label"][batch["reason"] == ""]
                self.decoded += len(sound)
                self._pixels += batch["pixels"]
                self._boxes += batch["boxes"]
                labels = sound[sound >= 0]
                self._per_class += np.bincount(labels, minlength=len(self._per_class))
                bar.update(len(batch["label"]))

    def faults(self) -> list[str]:
        """Returns the faults of the split as a whole, a line each."""
        faults = []
        if self.bad:
            faults.append(f"{self.bad:,} of {self.decoded + self.bad:,} images are bad")
        if self.bad_boxes:
            total = self.bad_boxes + int(self._boxes.sum())
            faults.append(f"{self.bad_boxes:,} of {total:,} boxes are bad")
        if self.imagenet is not None:
            faults += self._differences_from_imagenet(_IMAGENET[self.imagenet])
        wanted = _PER_CLASS.get(self.imagenet or "")
        if wanted and self.decoded + self.bad == len(self.source):  # not a sample
            counted = zip(self.source.class_names, self._per_class, strict=True)
            odd = [f"{name} has {count}" for name, count in counted if count != wanted]
            if odd:
                faults.append(f"classes without {wanted} sound images: {listed(odd)}")
        return faults

    def _differences_from_imagenet(self, expected: int) -> list[str]:
        faults = []
        difference = len(self.source) - expected
        if difference:
            word = "too many" if difference > 0 else "missing"
            faults.append(
                f"{len(self.source):,} examples, not {expected:,}: {abs(difference):,} {word}"
            )
        names = self.source.class_names
        if len(names) != 1000:
            faults.append(f"{len(names):,} classes, not 1,000")
        if set(names) & set(classes.IMAGENET_WNIDS):
            missing = [
                f"{wnid} ({english})"
                for wnid, english in zip(
                    classes.IMAGENET_WNIDS, classes.IMAGENET_NAMES, strict=True
                )
                if wnid not in names
            ]
            unknown = [name for name in names if name not in classes.IMAGENET_WNIDS]
            if missing:
                faults.append(f"classes that are missing: {listed(missing)}")
            if unknown:
                faults.append(f"folders that are not a class of ImageNet: {listed(unknown)}")
        return faults

    def line(self) -> dict[str, Any]:
        """Returns the split's entry in the JSON line."""
        counts: dict[str, Any] = {}
        names = self.source.class_names
        if self._pixels.any():
            counts["pixels"] = dict(zip(names, self._pixels.tolist(), strict=False))
            counts["ignored"] = int(self._pixels[IGNORED])
        if hasattr(self.source, "boxes"):
            counts["boxes"] = dict(zip(names, self._boxes.tolist(), strict=True))
            counts["bad_boxes"] = self.bad_boxes
        return {
            "split": self.name,
            "examples": len(self.source),
            "expected": None if self.imagenet is None else _IMAGENET[self.imagenet],
            "classes": len(self.source.class_names),
            "decoded": self.decoded,
            "bad": self.bad,
            **counts,
        }


@dataclasses.dataclass
class _Reports:
    """A sequence of reports, each on several records, as `workers.Batches` takes it."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.indices) // _RECORDS_PER_REPORT)

    def part(self, number: int) -> np.ndarray:
        """Returns the indices of the examples of report `number`."""
        return self.indices[number * _RECORDS_PER_REPORT : (number + 1) * _RECORDS_PER_REPORT]

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Returns what was found in the records of a report.

        Returns:
          {"label": int32 or -1, "reason": str, "" for a sound record}, (records,) each; "pixels":
          int64 (256,), of each number in their masks; and "boxes": int64 (classes,), their objects.
        """
        found = [self._check(int(index)) for index in self.part(number)]
        return {
            "label": np.array([each.label for each in found], np.int32),
            "reason": np.array([each.reason for each in found], np.str_),
            "pixels": np.sum([each.pixels for each in found], axis=0),
            "boxes": np.sum([each.boxes for each in found], axis=0),
        }

    def _check(self, index: int) -> "_Found":
        count = len(self.source.class_names)
        pixels, boxes = np.zeros(256, np.int64), np.zeros(count, np.int64)
        try:
            sample = self.source[index]
            size = decode(sample.image).size
            _check_size(size, sources.recorded_size(self.source, index))
            geometry.check_masks(sample.targets, size)
            for name, mask in geometry.masks(sample.targets).items():
                mask_files.check_classes(mask, f"its {name}", count)
                pixels += np.array(mask.histogram())
        except UserError as error:
            return _Found(-1, str(error), np.zeros_like(pixels), boxes)
        if hasattr(self.source, "boxes"):
            boxes += np.bincount(sample.targets["boxes"].labels, minlength=count)
        if "label" not in sample.targets:
            return _Found(-1, "", pixels, boxes)
        label = sample.targets["label"]
        if not 0 <= label < count:
            why = f"its label is {label}, and there are classes 0 to {count - 1}"
            return _Found(-1, why, pixels, boxes)
        return _Found(label, "", pixels, boxes)


def _check_size(size: tuple[int, int], recorded: tuple[int, int]) -> None:
    """Raises UserError if a picture's (width, height) are not those that its boxes are made for.

    Args:
      size: of the upright image, in pixels.
      recorded: what the file of the boxes says; a side of 0 is not known.
    """
    if any(wanted and found != wanted for found, wanted in zip(size, recorded, strict=True)):
        raise UserError(
            f"the image is {size[0]} x {size[1]} pixels, upright, and the file of its boxes says "
            f"{recorded[0]} x {recorded[1]}: it was resized after labelling, or EXIF turns it"
        )


class _Found(NamedTuple):
    """An example's label or -1, its fault or "", and the counts of its pixels and boxes."""

    label: int
    reason: str
    pixels: np.ndarray
    boxes: np.ndarray


def _say(line: str) -> None:
    """Prints a line above the progress bar, if there is one."""
    tqdm.tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()  # otherwise a pipe would get the lines in blocks of some hundred
