"""Image files in one folder per class, in the order of torchvision's ImageFolder.

A large folder is listed once. The listing is cached (index_cache.py) and stays valid as long as no
folder in it changes, so that a later start only reads the times of the folders.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NoReturn

import numpy as np
import tqdm

from mbv2_jax.data.sample import Sample
from mbv2_jax.data.sources import file_splits, index_cache, parts
from mbv2_jax.errors import UnreadableImage, UserError, nearest

# torchvision's list (torchvision/datasets/folder.py), so that both see the same files.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_CACHE_KIND = "folder-1"  # the number changes with the layout of a cached listing
_MIN_CACHED = 10_000  # files; fewer are listed in a moment
# A file added to a folder within a tick of the file system's clock after the listing may leave the
# folder's times unchanged. The longest tick is FAT's, two seconds.
_SETTLED_NS = 2_000_000_000
_SCAN_THREADS = 8  # they mostly wait for a disk or a network


class FolderSource:
    """A split of image files: ROOT/CLASS/*.jpg, or files in folders below CLASS.

    Classes are the sub-folders in sorted order, without hidden ones. The split "validation" is the
    folder val if there is no folder validation, and the other way round.

    A part such as "train[10000:]" is a random one (file_splits.py).

    A folder of classes without splits is one split if it has the name of a split (photos/val).
    Otherwise it is split: "train" is four fifths of each class, "val" (or "test", ...) the rest,
    and "all" everything (held_out.py).

    Args:
      path: the folder of the splits' folders, or of the classes' folders.
      split: a name, or an expression as `parts.read` takes it.

    Attributes:
      root: the folder of the classes' folders.
      class_names, parts: as `sources.Source` describes them.
      note: a sentence for the user about a split that was made here; "" if there is none.

    Raises:
      UserError: there is no such folder or split, or a class without images.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise UserError("folder: needs a path, such as 'folder:/data/flowers'")
        name = file_splits.split_name(path, split)
        self.root, is_split = _split_root(path, name)
        self._listing = _list(self.root)
        _check_classes(self.root, self._listing)
        count = len(self._listing)
        self.class_names = self._listing.class_names
        if is_split:
            chosen = file_splits.choose(self.root, split, name, count)
        else:
            files = [self._listing[number] for number in range(count)]
            chosen = file_splits.choose_held_out(path, split, name, files, "classes")
        self._numbers, self.parts, self.note = chosen.numbers, chosen.parts, chosen.note

    def __len__(self) -> int:
        return len(self._listing) if self._numbers is None else len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        path, label = self._locate(index)
        try:
            with open(path, "rb", buffering=0) as file:
                encoded = file.read()
        except OSError as error:
            raise UnreadableImage(f"cannot read the image: {error.strerror}") from error
        return Sample(encoded, path, {"label": label})

    def describe(self, index: int) -> str:
        return self._locate(index)[0]

    def _locate(self, index: int) -> tuple[str, int]:
        """Returns an example's file and label."""
        number = index if self._numbers is None else int(self._numbers[index])
        file, label = self._listing[number]
        return os.path.join(self.root, file), label


def _split_root(path: str, split: str) -> tuple[str, bool]:
    """Returns the folder whose sub-folders are classes, and whether it is the split itself.

    It is not the split itself if `path` holds classes and no splits.
    """
    if not os.path.isdir(path):
        local = " on a local disk" if "://" in path else ""
        raise UserError(f"no folder {path!r}; folder: takes the path of a folder of images{local}")
    folders = _sub_folders(path)
    for name in file_splits.spellings(split):
        if name in folders:
            root = os.path.join(path, name)
            if not _sub_folders(root):
                raise UserError(f"no class folders in {root}; images belong in {root}/CLASS/")
            return root, True
    if not folders:
        raise UserError(
            f"no folders in {path}; images belong in {path}/CLASS/, or in {path}/train/CLASS/ and "
            f"{path}/val/CLASS/"
        )
    splits = [name for name in folders if _is_split(path, name)]
    if splits:
        fault = f"no split {split!r} in {path}; {nearest(split, splits)}"
        others = [name for name in folders if name not in splits]
        if others:
            fault += f". If {others[0]!r} is a class, it belongs in {os.path.join(path, split)}"
        raise UserError(fault)
    return path, os.path.basename(os.path.abspath(path)).lower() in file_splits.NAMES


def _is_split(path: str, name: str) -> bool:
    """Returns whether the folder holds class folders, rather than the images of a class."""
    if name.lower() in file_splits.NAMES:
        return True
    has_folders = False
    with _scan(os.path.join(path, name)) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS):
                return False
            has_folders = has_folders or entry.is_dir()
    return has_folders


def _sub_folders(path: str) -> list[str]:
    """Returns the names of the folders in a folder, sorted, without hidden ones."""
    with _scan(path) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def _raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def _scan(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(path) as entries:
            yield entries
    except OSError as error:
        _raise_unreadable(error)


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The image files below a folder, compact: every worker process gets 1.3 million names.

    Attributes:
      folders: relative to the root; those of a class together, the class's own first.
      labels: of each folder.
      stops: the number of files in each folder and all folders before it.
      names: of the files, one after the other.
      name_stops: int64 (files,), where each name ends.
    """

    folders: list[str]
    labels: list[int]
    stops: list[int]
    names: bytes
    name_stops: np.ndarray

    def __len__(self) -> int:
        return len(self.name_stops)

    def __getitem__(self, number: int) -> tuple[str, int]:
        """Returns a file's path, relative to the root, and its label."""
        folder, _ = parts.locate(self.stops, number)
        start = self.name_stops[number - 1] if number else 0
        name = os.fsdecode(self.names[start : self.name_stops[number]])
        return os.path.join(self.folders[folder], name), self.labels[folder]

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(folder for folder in self.folders if os.sep not in folder)


def _check_classes(root: str, listing: _Listing) -> None:
    """Raises UserError if there are no images, or a class has none."""
    if not len(listing):
        raise UserError(
            f"no images in the folders of {root}; looked for CLASS/* with {', '.join(EXTENSIONS)}"
        )
    counts = np.bincount(listing.labels, np.diff(listing.stops, prepend=0))
    empty = [name for name, count in zip(listing.class_names, counts, strict=True) if not count]
    if empty:
        raise UserError(
            f"no images in {', '.join(os.path.join(root, name) for name in empty)};"
            " remove the folder, or put the class's images there"
        )


def _list(root: str) -> _Listing:
    """Returns the listing of a folder, from the cache if no folder in it has changed."""
    location = os.path.realpath(root)
    cached = index_cache.load(_CACHE_KIND, location)
    if cached is not None:
        folders = os.fsdecode(cached["folders"].tobytes()).split("\0")
        if np.array_equal(_times(root, folders), cached["times"]):
            return _Listing(
                folders,
                cached["labels"].tolist(),
                cached["stops"].tolist(),
                cached["names"].tobytes(),
                cached["name_stops"],
            )
    started = time.time_ns()
    listing, times = _walk(root)
    if len(listing) >= _MIN_CACHED and times.max() < started - _SETTLED_NS:
        arrays = {
            "folders": np.frombuffer(os.fsencode("\0".join(listing.folders)), np.uint8),
            "times": times,
            "labels": np.array(listing.labels),
            "stops": np.array(listing.stops),
            "names": np.frombuffer(listing.names, np.uint8),
            "name_stops": listing.name_stops,
        }
        index_cache.save(_CACHE_KIND, location, arrays)
    return listing


def _times(root: str, folders: Sequence[str]) -> np.ndarray:
    """Returns the `_time` of the root and its folders: int64 (1 + folders, 2)."""
    with futures.ThreadPoolExecutor(_SCAN_THREADS) as pool:
        paths = [root, *(os.path.join(root, folder) for folder in folders)]
        return np.array(list(pool.map(_time, paths)), np.int64)


def _time(folder: str) -> tuple[int, int]:
    """Returns a folder's mtime in ns, and its ctime, which tar and rsync cannot set back."""
    try:
        status = os.stat(folder)
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_ctime_ns


def _walk(root: str) -> tuple[_Listing, np.ndarray]:
    """Returns the listing of a folder, and the times of its folders as `_times` does."""
    times = [_time(root)]
    classes = _sub_folders(root)
    folders, labels, counts, names = [], [], [], []
    with futures.ThreadPoolExecutor(_SCAN_THREADS) as pool:
        for label, found in enumerate(
            tqdm.tqdm(
                pool.map(functools.partial(_walk_class, root), classes),
                desc=f"listing {root}",
                total=len(classes),
                unit="class",
                delay=2,
                disable=None,  # unless stderr is a terminal
                leave=False,
                file=sys.stderr,
            )
        ):
            for folder, when, files in found:
                folders.append(folder)
                labels.append(label)
                times.append(when)
                counts.append(len(files))
                names.append((b"".join(files), np.array([len(file) for file in files], np.int64)))
    lengths = np.concatenate([length for _, length in names]) if names else np.zeros(0, np.int64)
    listing = _Listing(
        folders,
        labels,
        np.cumsum(counts, dtype=np.int64).tolist(),
        b"".join(name for name, _ in names),
        np.cumsum(lengths),
    )
    return listing, np.array(times, np.int64)


def _walk_class(root: str, name: str) -> list[tuple[str, tuple[int, int], list[bytes]]]:
    """Returns path, times and image files of a class's folders, in ImageFolder's order."""
    top = os.path.join(root, name)
    times = {top: _time(top)}
    found = []
    # Without `onerror` os.walk would silently leave out a folder that it cannot read.
    for folder, inside, files in os.walk(top, followlinks=True, onerror=_raise_unreadable):
        # Read before the folders are listed, so that a later change shows in the time.
        times |= {path: _time(path) for path in (os.path.join(folder, sub) for sub in inside)}
        images = [os.fsencode(file) for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
        found.append((folder, images))
    return [(os.path.relpath(path, root), times[path], images) for path, images in sorted(found)]
