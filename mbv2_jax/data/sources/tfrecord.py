"""TFRecord files by record number, without TensorFlow.

A record consists of its length (uint64, little-endian), the length's checksum, the data and the
data's checksum (https://www.tensorflow.org/tutorials/load_data/tfrecord). A record's offset follows
only from the records before it, so a split's files are scanned once, and the offsets are cached
(index_cache.py). Both checksums of a record are checked whenever it is read: stale offsets lead to
an error, never to wrong data.
"""

import contextlib
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import google_crc32c
import numpy as np
import tqdm
from etils import epath

from mbv2_jax.data.sources import index_cache, parts
from mbv2_jax.errors import UnreadableImage, UserError, first_line, listed

_LENGTH = struct.Struct("<QI")  # and its checksum
_CHECKSUM = struct.Struct("<I")
_CACHE_KIND = "tfrecord-1"  # the number changes with the layout of a cached index
_THREADS = 16  # they mostly wait for a disk or a network


class Records:
    """The concatenated records of a split's files; picklable, and safe to use from threads.

    Each process keeps its local files open. A record of a remote file (gs://, s3://, and whatever
    else fsspec opens) is read with a request for its range of bytes.

    Args:
      paths: the files.
      counts: the number of records that each must hold.
      name: of the dataset and split, for messages.

    Raises:
      UserError: a file is missing, damaged or cut short, or holds another number of records.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int], name: str):
        self._paths = list(paths)
        self._stops = np.cumsum(counts).tolist()
        # For each file, the beginning of every record, and the file's end.
        self._offsets = _index(self._paths, name)
        for path, offsets, count in zip(self._paths, self._offsets, counts, strict=True):
            if len(offsets) - 1 != count:
                raise UserError(
                    f"{path} holds {len(offsets) - 1} records, and the dataset_info.json beside it"
                    f" says {count}: copy or prepare the dataset again"
                )
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> bytes:
        """Returns the data of a record.

        Raises:
          UnreadableImage: it is damaged.
          OSError: its file cannot be read; remote files raise other errors, too.
        """
        file, position = parts.locate(self._stops, index)
        start, stop = map(int, self._offsets[file][position : position + 2])
        frame = self._read(file, start, stop)
        data = frame[_LENGTH.size : -_CHECKSUM.size]
        if not (
            len(frame) == stop - start
            and _length(frame) == len(data)
            and _CHECKSUM.unpack(frame[-_CHECKSUM.size :])[0] == _checksum(data)
        ):
            raise UnreadableImage(
                f"its checksum is wrong, {self._paths[file]} is damaged at byte {start}: copy that"
                " file again"
            )
        return data

    def _read(self, file: int, start: int, stop: int) -> bytes:
        path = self._paths[file]
        if _is_remote(path):
            import fsspec  # etils would read 5 MB ahead of each record

            system, inside = fsspec.url_to_fs(path)
            return system.cat_file(inside, start, stop)
        handle = self._open.get(file)
        if handle is None:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            kept = self._open.setdefault(file, handle)
            if kept != handle:  # another thread was faster
                os.close(handle)
            handle = kept
        return os.pread(handle, stop - start, start)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for handle in self.__dict__.get("_open", {}).values():
            os.close(handle)


class Examples:
    """The images and labels of concatenated parts of splits.

    Args:
      chosen: the parts.
      records: the records of each split that the parts belong to.
    """

    def __init__(self, chosen: Sequence[parts.Part], records: Mapping[str, Records]):
        self._chosen = list(chosen)
        self._stops = np.cumsum([len(part) for part in chosen]).tolist()
        self._records = records

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": encoded bytes, "label": int}."""
        from tensorflow_datasets.proto import tf_example_pb2  # slow to import

        part, number = parts.locate(self._stops, index)
        data = self._records[self._chosen[part].split][self._chosen[part].start + number]
        feature = tf_example_pb2.Example.FromString(data).features.feature
        image, label = feature["image"].bytes_list.value, feature["label"].int64_list.value
        if len(image) != 1 or len(label) != 1:
            raise UnreadableImage("it does not hold one image with one label")
        return {"image": image[0], "label": label[0]}


def _index(paths: list[str], name: str) -> list[np.ndarray]:
    """Returns, for each file, the beginnings of its records and its end: int64 (records + 1,)."""
    location = os.path.realpath(paths[0]) if not _is_remote(paths[0]) else paths[0]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        stamps = list(pool.map(_stamp, paths))
        missing = [path for path, stamp in zip(paths, stamps, strict=True) if stamp is None]
        if missing:
            raise UserError(
                f"{name} lacks {len(missing)} of its {len(paths)} files:"
                f" {listed(missing, 2, ', ')}; copy them there, or prepare the dataset again"
            )
        key = np.frombuffer("\n".join(map(str, stamps)).encode(), np.uint8)
        cached = index_cache.load(_CACHE_KIND, location)
        if cached is not None and np.array_equal(cached["key"], key):
            return np.split(cached["offsets"], cached["splits"])
        if _is_remote(paths[0]):
            print(f"indexing {name}: its files are read whole, once", file=sys.stderr)
        offsets = list(
            tqdm.tqdm(
                pool.map(_offsets, paths),
                desc=f"indexing {name} (once)",
                total=len(paths),
                unit="file",
                delay=1,
                disable=None,  # unless stderr is a terminal
                leave=False,
                file=sys.stderr,
            )
        )
    splits = np.cumsum([len(part) for part in offsets])[:-1]
    arrays = {"key": key, "offsets": np.concatenate(offsets), "splits": splits}
    index_cache.save(_CACHE_KIND, location, arrays)
    return offsets


def _stamp(path: str) -> tuple[str, int, int] | None:
    """Returns name, size and time of a file, which change with it; None if there is none."""
    with _reading(path), contextlib.suppress(FileNotFoundError):
        if _is_remote(path):
            remote = epath.Path(path).stat()
            return os.path.basename(path), remote.length, remote.mtime
        local = os.stat(path)
        return os.path.basename(path), local.st_size, local.st_mtime_ns
    return None


def _offsets(path: str) -> np.ndarray:
    """Scans a file; returns the beginnings of its records and its end: int64 (records + 1,)."""
    offsets = [0]
    with _reading(path), _open_for_scan(path) as file:
        size = file.seek(0, os.SEEK_END)
        while offsets[-1] < size:
            file.seek(offsets[-1])
            header = file.read(_LENGTH.size)
            length = _length(header)
            if length is None and len(header) == _LENGTH.size:
                raise UserError(
                    f"{path} is damaged at byte {offsets[-1]} (a checksum is wrong), or is not a"
                    " TFRecord file: copy it again"
                )
            offsets.append(offsets[-1] + _LENGTH.size + (length or 0) + _CHECKSUM.size)
        if offsets[-1] > size:
            raise UserError(
                f"{path} is cut short: its {size} bytes end in record {len(offsets) - 2}; copy it"
                " again"
            )
    return np.array(offsets, np.int64)


def _open_for_scan(path: str) -> Any:
    """Opens a file for reading the lengths of its records one after the other.

    A local file gets no buffer, which would read much of every record. A remote file is read whole,
    in large pieces: a request for every length would take longer.
    """
    return epath.Path(path).open("rb") if _is_remote(path) else open(path, "rb", 0)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns errors of reading a file into UserError."""
    try:
        yield
    except UserError:
        raise
    # An OSError for a local file; for a remote one, any error of its library.
    except Exception as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _length(frame: bytes) -> int | None:
    """Returns the length at the beginning of a record; None if its checksum is wrong."""
    if len(frame) < _LENGTH.size:
        return None
    length, checksum = _LENGTH.unpack_from(frame)
    return length if _checksum(frame[:8]) == checksum else None


def _checksum(data: bytes) -> int:
    """Returns TFRecord's masked CRC-32C: tensorflow/core/lib/hash/crc32c.h, Mask."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _is_remote(path: str) -> bool:
    return "://" in path
