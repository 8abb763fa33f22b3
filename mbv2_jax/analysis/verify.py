"""Counts a dataset, decodes it, and names every record that is no training example."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

from mbv2_jax.data import classes, loader, sources
from mbv2_jax.data.decoding import decode
from mbv2_jax.data.sources import parts
from mbv2_jax.data.sources.folder import FolderSource
from mbv2_jax.data.sources.tfds import TfdsSource
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import RunFailed, UserError, listed

# Examples of ILSVRC 2012, by the names that TFDS and folders give its splits; and of each class
# where all have as many (in train they have 732 to 1,300).
_IMAGENET = {"train": 1_281_167, "val": 50_000, "validation": 50_000}
_PER_CLASS = {"val": 50, "validation": 50}

# A folder is taken for a copy of ImageNet, whole or not, where this share of its classes are
# ImageNet's, and either the config is for all 1000 or the folder has so many of them. Otherwise it
# is a choice of classes, such as ImageNet-100.
_SHARE = 0.9
_A_COPY = 900

_AT_ONCE = 16  # records a report
_WORTH_A_PROCESS = 2000  # records that pay for the start of a process


def verify(
    config: ConfigDict, which: str = "both", sample: int | None = None, workers: int | None = None
) -> None:
    """Prints what is wrong with the splits of a config, and one line of JSON last.

    The line is {"ok": bool, "splits": [{"split", "examples", "expected", "classes", "decoded",
    "bad"}, ...]}: `expected` is the number of examples in ImageNet's split of that name (None for
    other data, and for a part of a split), `decoded` the number of images that were read and
    decoded whole, `bad` the number that could not be, or whose label is not a class.

    Args:
      config: a recipe's; its data section is read.
      which: "train", "eval" or "both" of its splits.
      sample: how many images of each split to decode, drawn with the config's seed; None: all.
      workers: processes that decode; 0: threads; None: what keeps all cores busy.

    A folder of ImageNet's classes under a config of 1000 classes (model.num_classes) should be all
    of ImageNet: examples and classes that it lacks are faults. With both splits, so is what they
    share, and a class that only one of them has: training refuses those.

    Raises:
      UserError: an argument is not possible, a transform cannot be read, or the data cannot be
        opened.
      RunFailed: something is wrong with the data.
    """
    if sample is not None and sample < 1:
        raise UserError(f"--sample={sample}: give 1 image or more, or leave it out to decode all")
    if workers is not None and workers < 0:
        raise UserError(f"--workers={workers}: give 0, for threads, or a number of processes")
    _check_transforms(config)
    data = config.data
    names = {"train": [data.train_split], "eval": [data.eval_split]}.get(
        which, [data.train_split, data.eval_split]
    )
    opened = {name: sources.open_source(data.source, name, data.data_dir) for name in names}
    between = _unfit(names, [opened[name] for name in names])
    for fault in between:  # at once: decoding may take hours
        _say(fault)
    splits = []
    for name, source in opened.items():
        split = _Split(name, source, _expected(config, name, source))
        _say(split.summary())
        indices = _drawn(len(source), sample, config.seed)
        split.decode(indices, _processes(len(indices)) if workers is None else workers)
        splits.append(split)
    faults = [f"{split.name}: {fault}" for split in splits for fault in split.faults()]
    for fault in faults:
        _say(fault)
    faults = between + faults
    print(json.dumps({"ok": not faults, "splits": [split.line() for split in splits]}), flush=True)
    if faults:
        raise RunFailed(f"{data.source} is not as it should be: {listed(faults)}")


def _check_transforms(config: ConfigDict) -> None:
    """Raises UserError for transforms with which training would not begin."""
    from mbv2_jax.training import config as config_lib  # here, because jax takes a second
    from mbv2_jax.training import evaluation

    data = config_lib.with_defaults(config).data
    pipeline.make_transform(data.train_transforms, data.image_size)
    evaluation.transform(data.eval_transforms, data.image_size)


def _unfit(names: Sequence[str], opened: Sequence[FolderSource | TfdsSource]) -> list[str]:
    """Returns why training refuses these splits together; of one split alone: nothing."""
    if len(opened) < 2:
        return []
    (train, evaluation), faults = opened, []
    both = "{!r} and {!r}".format(*names)
    if train.class_names != evaluation.class_names:
        odd = sorted(set(train.class_names) ^ set(evaluation.class_names))
        faults.append(f"the classes of {both} differ; in only one of them: {listed(odd)}")
    if sources.overlap(train, evaluation):
        faults.append(
            f"{both} hold the same images, or some of them; name two splits, or parts of one that "
            "share none, such as 'train[10%:]' and 'train[:10%]'"
        )
    return faults


def _expected(config: ConfigDict, name: str, source: sources.Source) -> str | None:
    """Returns which split of ImageNet this should be, if any: a key of _IMAGENET."""
    dataset = config.data.source
    if parts.is_expression(name):
        return None
    if dataset.startswith("folder:"):
        known = _known(source)
        if known < _SHARE * len(source.class_names):
            return None
        if known < _A_COPY and config.model.num_classes != len(classes.IMAGENET_WNIDS):
            return None
        name = os.path.basename(os.path.normpath(getattr(source, "root", name))).lower()
    elif dataset.replace(":", "/").split("/")[0] != "imagenet2012":
        return None
    return name if name in _IMAGENET else None


def _known(source: sources.Source) -> int:
    """Returns how many of its classes are ImageNet's, by WordNet id."""
    return len(set(classes.IMAGENET_WNIDS).intersection(source.class_names))


def _drawn(count: int, sample: int | None, seed: int) -> np.ndarray:
    """Returns the indices of `sample` of `count` examples, or of all, in rising order."""
    if sample is None or sample >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, sample, replace=False))


def _processes(count: int) -> int:
    """Returns how many processes pay off for so many records; 0: threads do."""
    cores = loader.cores()
    return cores if cores > loader.parallel(0) and count >= _WORTH_A_PROCESS * cores else 0


@dataclasses.dataclass
class _Split:
    """A split, and what was found of it so far."""

    name: str
    source: sources.Source
    imagenet: str | None  # which split of ImageNet it should be
    decoded: int = 0
    bad: int = 0

    def __post_init__(self) -> None:
        self._per_class = np.zeros(len(self.source.class_names), np.int64)

    def summary(self) -> str:
        found = f"{len(self.source):,} examples of {len(self.source.class_names):,} classes"
        if self.imagenet is not None:
            found += f"; ImageNet has {_IMAGENET[self.imagenet]:,} of 1,000"
        elif known := _known(self.source):
            found += f"; {known:,} of ImageNet's 1,000 classes"
        return f"{self.name}: {found}"

    def decode(self, indices: np.ndarray, workers: int) -> None:
        """Reads and decodes examples; says of each bad one what is wrong."""
        records = _Records(self.source, indices)
        batches = loader.Batches(records, workers)
        bar = tqdm.tqdm(
            total=len(indices),
            unit=" images",
            desc=f"decoding {self.name}",
            disable=not sys.stderr.isatty(),
        )
        with contextlib.closing(batches), bar:
            for number, batch in enumerate(batches):
                for index, reason in zip(records.part(number), batch["reason"], strict=True):
                    if reason:
                        self.bad += 1
                        _say(f"bad: {self.source.describe(int(index))}: {reason}")
                sound = batch["label"][batch["reason"] == ""]
                self.decoded += len(sound)
                self._per_class += np.bincount(sound, minlength=len(self._per_class))
                bar.update(len(batch["label"]))

    def faults(self) -> list[str]:
        """Returns what is wrong with the split as a whole, a line each."""
        faults = []
        if self.bad:
            faults.append(f"{self.bad:,} of {self.decoded + self.bad:,} images are bad")
        if self.imagenet is not None:
            faults += self._unlike_imagenet(_IMAGENET[self.imagenet])
        wanted = _PER_CLASS.get(self.imagenet or "")
        if wanted and self.decoded + self.bad == len(self.source):  # not a sample
            counted = zip(self.source.class_names, self._per_class, strict=True)
            odd = [f"{name} has {count}" for name, count in counted if count != wanted]
            if odd:
                faults.append(f"classes without {wanted} sound images: {listed(odd)}")
        return faults

    def _unlike_imagenet(self, expected: int) -> list[str]:
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
                faults.append(f"folders that are no class of ImageNet: {listed(unknown)}")
        return faults

    def line(self) -> dict[str, Any]:
        """Returns the split's part of the JSON."""
        return {
            "split": self.name,
            "examples": len(self.source),
            "expected": None if self.imagenet is None else _IMAGENET[self.imagenet],
            "classes": len(self.source.class_names),
            "decoded": self.decoded,
            "bad": self.bad,
        }


@dataclasses.dataclass
class _Records:
    """A sequence of reports, each of some records, as `loader.Batches` takes it."""

    source: sources.Source
    indices: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.indices) // _AT_ONCE)

    def part(self, number: int) -> np.ndarray:
        """Returns which examples report `number` is of."""
        return self.indices[number * _AT_ONCE : (number + 1) * _AT_ONCE]

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Returns {"label": int32, "reason": str, "" of a sound record}, (records,) each."""
        found = [self._check(int(index)) for index in self.part(number)]
        labels, reasons = zip(*found, strict=True)
        return {"label": np.array(labels, np.int32), "reason": np.array(reasons, np.str_)}

    def _check(self, index: int) -> tuple[int, str]:
        try:
            example = self.source[index]
            label, count = example["label"], len(self.source.class_names)
            decode(example["image"])
        except UserError as error:
            return -1, str(error)
        if not 0 <= label < count:
            return -1, f"its label is {label}, and there are classes 0 to {count - 1}"
        return label, ""


def _say(line: str) -> None:
    """Prints a line above a bar that is there."""
    tqdm.tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()  # whoever follows it should not wait for the next few hundred
