"""Prepared TFDS datasets, as ArrayRecord or as TFRecord, read without TensorFlow.

They may be on a local disk or in a bucket (data_dir="gs://..."). etils.epath opens the dataset's
description and TFRecord files, for which gs:// needs the package gcsfs; array_record opens its own
files, and its Linux builds support gs:// from 0.8 on.
"""

import contextlib
import difflib
import fcntl
import io
import logging
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbv2_jax.data.sample import Sample
from mbv2_jax.data.sources import parts, tfrecord
from mbv2_jax.errors import UnreadableImage, UserError, first_line, nearest

COMMON = ("digits", "cifar10", "imagenet2012")  # suggested for an unknown name

_WITH_TENSORFLOW = (
    "in an environment with TensorFlow (docs/imagenet.md; `make venv-tensorflow` in the clone) run"
)

_OPEN_FILES = 65_536  # enough for any dataset's shards, each of which is a file


class TfdsSource:
    """Parts of the splits of a prepared TFDS dataset; images stay encoded.

    TFDS's own data source reads ArrayRecord (15,000 records of ImageNet's size per second and
    core), tfrecord.py reads TFRecord. Both give the same examples in the same order; if both are
    prepared, ArrayRecord is read, which needs no index.

    Args:
      name: of the builder.
      split: a name, or an expression as `parts.read` takes it.
      data_dir: the folder of prepared datasets; None is TFDS's default.
      others: names of other kinds of datasets, suggested if `name` is unknown.

    Raises:
      UserError: the dataset or split is unknown, not prepared, empty, or not one of images with a
        class each.
    """

    def __init__(
        self, name: str, split: str, data_dir: str | None = None, others: Sequence[str] = ()
    ):
        suggested = (*COMMON, *others)
        builder = _digits(data_dir) if name == "digits" else _prepared(name, data_dir, suggested)
        self.class_names = _class_names(name, builder.info.features)
        self._name = f"{name}[{split}]"
        sizes = {key: info.shard_lengths for key, info in builder.info.splits.items()}
        self._chosen = parts.read(split, sizes, f"dataset {name!r}")
        self._stops = np.cumsum([len(part) for part in self._chosen]).tolist()
        self.parts = [
            parts.Part(f"{builder.data_dir}/{part.split}", part.start, part.stop)
            for part in self._chosen
        ]
        is_array_record = _choose_format(name, builder)
        used = {part.split: builder.info.splits[part.split] for part in self._chosen}
        self._files = {key: list(map(os.fspath, info.filepaths)) for key, info in used.items()}
        self._file_stops = {key: np.cumsum(sizes[key]).tolist() for key in used}
        _allow_open_files()
        self._records: Any
        if is_array_record:
            import tensorflow_datasets as tfds

            self._records = builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record"
            )
        else:
            records = {
                key: tfrecord.Records(self._files[key], sizes[key], f"{name}[{key}]")
                for key in used
            }
            self._records = tfrecord.Examples(self._chosen, records)

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> Sample:
        try:
            record = self._records[index]
        # A missing or damaged file is only noticed here, with errors of several types.
        except Exception as error:
            raise UnreadableImage(f"cannot read the record: {first_line(error)}") from error
        return Sample(record["image"], self.describe(index), {"label": int(record["label"])})

    def describe(self, index: int) -> str:
        part, number = parts.locate(self._stops, index)
        split, start = self._chosen[part].split, self._chosen[part].start
        file, position = parts.locate(self._file_stops[split], start + number)
        return (
            f"record {index} of {self._name}"
            f" (number {position} in {os.path.basename(self._files[split][file])})"
        )


def _class_names(name: str, features: Any) -> tuple[str, ...]:
    """Returns the dataset's classes; raises UserError unless it is images with a class each."""
    import tensorflow_datasets as tfds

    by_name = dict(features.items())
    label = by_name.get("label")
    if not isinstance(by_name.get("image"), tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise UserError(
            f"dataset {name!r} is not for image classification: it has"
            f" {', '.join(map(repr, by_name))}, and no 'image' with a 'label'"
        )
    return tuple(label.names or map(str, range(label.num_classes)))


def _choose_format(name: str, builder: Any) -> bool:
    """Sets the format of the files to read; returns whether it is ArrayRecord.

    Raises:
      UserError: there are neither ArrayRecord nor TFRecord files.
    """
    from tensorflow_datasets.core import FileFormat

    info = builder.info
    # Datasets that were prepared before there was a choice do not state it.
    prepared = info.available_file_formats() or {FileFormat.TFRECORD}
    for choice in (FileFormat.ARRAY_RECORD, FileFormat.TFRECORD):
        if choice in prepared:
            if info.file_format != choice:
                info.set_file_format(choice, override=True, override_if_initialized=True)
            return choice == FileFormat.ARRAY_RECORD
    raise UserError(
        f"dataset {name!r} in {builder.data_dir} is prepared as {info.file_format.value}, which"
        f" cannot be read by index; {_WITH_TENSORFLOW}: tfds convert_format"
        f" --dataset_version_dir={builder.data_dir}"
        " --out_file_format=array_record --num_workers=1"
    )


def _allow_open_files() -> None:
    """Raises the limit of open files, for this process and its children, as far as allowed.

    Every shard stays open; the usual limit is 1,024, and imagenet2012's training split has as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _digits(data_dir: str | None) -> Any:
    """Returns the builder of the digits, which it prepares on first use."""
    from mbv2_jax.data import digits
    from mbv2_jax.data.sources.digits_builder import Digits

    with _silenced():
        builder = Digits(data_dir=data_dir, file_format="array_record")
        if builder.is_prepared():
            return builder
    digits.load()  # fails, if it does, before any folder is created
    path = Path(os.fspath(builder.data_dir))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / "preparing.lock", "w") as lock:
            # Two runs that start at the same time would share a temporary folder.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (path / "dataset_info.json").exists():
                print(f"preparing the digits dataset in {path} (once)", file=sys.stderr)
                with _silenced():
                    builder.download_and_prepare()
    except (OSError, RuntimeError) as error:  # ArrayRecord's are RuntimeErrors
        raise UserError(
            f"cannot write the digits dataset to {path}: {first_line(error)}; set"
            " data.data_dir to a folder that can be written, on a disk that is not full"
        ) from error
    return Digits(data_dir=data_dir, file_format="array_record")


def _prepared(name: str, data_dir: str | None, suggested: Sequence[str]) -> Any:
    """Returns the builder of a prepared dataset.

    It is read from the dataset's files alone: the code that prepared them may be the user's own,
    and often imports TensorFlow.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    known = tfds.list_builders(with_community_datasets=False)
    base = name.split("/")[0].split(":")[0]
    try:
        with _silenced():
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        if base not in known:
            hint = _nearest_dataset(name, known, suggested)
            raise UserError(f"unknown dataset {name!r}; {hint}") from error
        option = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"dataset {name!r} is not prepared in {data_dir or tfds.core.constants.DATA_DIR};"
            f" {_WITH_TENSORFLOW}: tfds build {name} --file_format=array_record{option}"
            " (files to download by hand first:"
            f" https://www.tensorflow.org/datasets/catalog/{base})"
        ) from error
    # A name that TFDS cannot parse (ValueError), a folder that cannot be read (OSError), ...
    except Exception as error:
        hint = "" if base in known else "; " + _nearest_dataset(name, known, suggested)
        raise UserError(f"cannot open dataset {name!r} ({first_line(error)}){hint}") from error


def _nearest_dataset(name: str, known: Sequence[str], suggested: Sequence[str]) -> str:
    """Returns a hint for an unknown name: a close name of TFDS's, or the suggested ones."""
    # The cutoff is high, since some of TFDS's hundreds of names always looks a little like this.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return nearest(name, [*suggested, *close])


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppresses TFDS's output: a needless "Downloading", progress bars and warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
