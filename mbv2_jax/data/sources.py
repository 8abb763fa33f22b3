"""A dataset's name -> a random-access sequence of encoded images and labels.

digits              handwritten digits of scikit-learn (data/digits.py), prepared on first use
cifar10, ...        any prepared TFDS builder with `image` and `label`, in ArrayRecord files
folder:PATH         image files: PATH/SPLIT/CLASS/*.jpg, or PATH/CLASS/*.jpg for one split
"""

import contextlib
import difflib
import fcntl
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mbv2_jax.errors import UserError, nearest

KNOWN = ("digits", "cifar10", "imagenet2012", "folder:PATH")

# torchvision's list (torchvision/datasets/folder.py), so that both see the same files.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Folders of these names are splits even where they hold no class folders.
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "eval"})


class Source(Protocol):
    """A split of a dataset; picklable, so that it goes to worker processes."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": encoded bytes, "label": int} of example `index`, 0 <= index < len."""

    def describe(self, index: int) -> str:
        """Returns the name of example `index` for a message: its file, or dataset and number."""


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens a split of a dataset.

    Args:
      name: "digits", the name of a TFDS builder, or "folder:PATH".
      split: the split's name, for TFDS also an expression such as "train[:90%]".
      data_dir: where TFDS keeps prepared datasets; None = TFDS's default (TFDS_DATA_DIR, or
        tensorflow_datasets in the home folder). Of no use to a folder.

    Returns:
      The split.

    Raises:
      UserError: the dataset or split is unknown, not prepared, empty, or of another kind.
    """
    if name.startswith("folder:"):
        return FolderSource(os.path.expanduser(name.removeprefix("folder:")), split)
    if os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name):
        raise UserError(
            f"unknown dataset {name!r}; for a folder of images write {'folder:' + name!r}"
        )
    return TfdsSource(name, split, os.path.expanduser(data_dir) if data_dir else None)


class FolderSource:
    """Image files in a folder per class, in torchvision's ImageFolder order.

    Classes are the sub-folders in sorted order, hidden ones left out; files may lie in folders
    below them.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise UserError("folder: needs a path, such as 'folder:/data/flowers'")
        self.root = _split_root(path, split)
        self.class_names = tuple(_sub_folders(self.root))
        files: list[str] = []
        counts = []
        for name in self.class_names:
            found = _image_files(self.root, name)
            files.extend(found)
            counts.append(len(found))
        if not files:
            raise UserError(
                f"no images in the folders of {self.root}; looked for CLASS/* with"
                f" {', '.join(EXTENSIONS)}"
            )
        empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        if empty:
            raise UserError(
                f"no images in {', '.join(os.path.join(self.root, n) for n in empty)};"
                " remove the folder, or put the class's images there"
            )
        self._files = files
        self._labels = np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.describe(index)
        try:
            with open(path, "rb") as file:
                encoded = file.read()
        except OSError as error:
            raise UserError(f"cannot read the image: {error.strerror}") from error
        return {"image": encoded, "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self._files[index])


def _split_root(path: str, split: str) -> str:
    """Returns the folder whose sub-folders are the classes of `split`."""
    if not os.path.isdir(path):
        raise UserError(f"no folder {path!r}; folder: takes the path of a folder of images")
    folders = _sub_folders(path)
    if split in folders:
        root = os.path.join(path, split)
        if not _sub_folders(root):
            raise UserError(f"no class folders in {root}; images belong in {root}/CLASS/")
        return root
    if not folders:
        raise UserError(f"no folders in {path}; images belong in {path}/{split}/CLASS/")
    splits = [name for name in folders if _is_split(path, name)]
    if splits:
        raise UserError(f"no split {split!r} in {path}; {nearest(split, splits)}")
    return path  # the folders are classes: one split, given directly


def _is_split(path: str, name: str) -> bool:
    """Whether the folder holds class folders, rather than the images of a class."""
    if name.lower() in _SPLIT_NAMES:
        return True
    has_folders = False
    with _scan(os.path.join(path, name)) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS):
                return False
            has_folders = has_folders or entry.is_dir()
    return has_folders


def _sub_folders(path: str) -> list[str]:
    with _scan(path) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def _image_files(root: str, class_name: str) -> list[str]:
    """Returns the class's image files relative to `root`, in ImageFolder's order."""
    found = []
    for folder, _, names in sorted(os.walk(os.path.join(root, class_name), followlinks=True)):
        inside = os.path.relpath(folder, root)
        found += [
            os.path.join(inside, name)
            for name in sorted(names)
            if name.lower().endswith(EXTENSIONS)
        ]
    return found


@contextlib.contextmanager
def _scan(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(path) as entries:
            yield entries
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}") from error


class TfdsSource:
    """A split of a TFDS dataset prepared as ArrayRecord; reads encoded images, no TensorFlow."""

    def __init__(self, name: str, split: str, data_dir: str | None):
        import tensorflow_datasets as tfds

        builder = _digits(data_dir) if name == "digits" else _prepared(name, data_dir)
        features = dict(builder.info.features.items())
        label = features.get("label")
        if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(
            label, tfds.features.ClassLabel
        ):
            raise UserError(
                f"dataset {name!r} is not for image classification: it has"
                f" {', '.join(map(repr, features))}, and no 'image' with a 'label'"
            )
        if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
            raise UserError(
                f"dataset {name!r} in {builder.data_dir} is prepared as"
                f" {builder.info.file_format.value}, which cannot be read by index;"
                " with tensorflow and importlib_resources installed run: tfds"
                f" convert_format --dataset_version_dir={builder.data_dir}"
                " --out_file_format=array_record"
            )
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))
        self._name = f"{name}[{split}]"
        try:
            count = builder.info.splits[split].num_examples
        # TFDS raises ValueError, KeyError or AssertionError, by what is wrong with the expression.
        except Exception as error:
            raise UserError(
                f"no split {split!r} in dataset {name!r}; {nearest(split, builder.info.splits)}"
            ) from error
        if not count:
            raise UserError(f"split {split!r} of dataset {name!r} is empty")
        self._records = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record"
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._records[index]
        # A missing or damaged file shows only now (array_record checks hashes); its errors are of
        # several types.
        except Exception as error:
            raise UserError(f"cannot read the record: {_first_line(error)}") from error
        return {"image": record["image"], "label": int(record["label"])}

    def describe(self, index: int) -> str:
        return f"record {index} of {self._name}"


def _digits(data_dir: str | None) -> Any:
    """Returns the builder of the digits, and prepares them on first use."""
    from mbv2_jax.data import digits

    with _quiet():
        builder = digits.Digits(data_dir=data_dir, file_format="array_record")
        if builder.is_prepared():
            return builder
    digits.load()  # its error should come before any folder is made
    path = Path(os.fspath(builder.data_dir))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / "preparing.lock", "w") as lock:
            # Two runs that start at once would take each other's temporary folder for their own.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (path / "dataset_info.json").exists():
                print(f"preparing the digits dataset in {path} (once)", file=sys.stderr)
                with _quiet():
                    builder.download_and_prepare()
    except OSError as error:
        raise UserError(
            f"cannot write the digits dataset to {path}: {error.strerror}; set"
            " data.data_dir to a folder that can be written"
        ) from error
    return digits.Digits(data_dir=data_dir, file_format="array_record")


def _prepared(name: str, data_dir: str | None) -> Any:
    """Returns the builder of a dataset that was prepared before.

    It is made from the dataset's files alone: the code that prepared it may be the user's own, and
    often imports TensorFlow.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    known = tfds.list_builders(with_community_datasets=False)
    base = name.split("/")[0].split(":")[0]
    try:
        with _quiet():
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        if base not in known:
            raise UserError(f"unknown dataset {name!r}; {_nearest_dataset(name, known)}") from error
        option = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"dataset {name!r} is not prepared in {data_dir or tfds.core.constants.DATA_DIR}; with"
            " tensorflow and importlib_resources installed run: tfds build"
            f" {name} --file_format=array_record{option} (what to download by hand before:"
            f" https://www.tensorflow.org/datasets/catalog/{base})"
        ) from error
    # A name that TFDS cannot parse (ValueError), a folder that cannot be read (OSError), ...
    except Exception as error:
        hint = "" if base in known else "; " + _nearest_dataset(name, known)
        raise UserError(f"cannot open dataset {name!r} ({_first_line(error)}){hint}") from error


def _nearest_dataset(name: str, known: list[str]) -> str:
    """Returns what helps after an unknown name: a close one of TFDS's, or what configs use."""
    # Nearer than elsewhere: among TFDS's hundreds something always looks a little like the name.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return nearest(name, [*KNOWN, *close])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the terminal what TFDS says: a download that there is not, bars, log warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
