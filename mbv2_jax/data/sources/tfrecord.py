"""TFRecord files by record number, without TensorFlow.

A record is its length (uint64, little-endian), the length's checksum, the data and the data's
checksum (https://www.tensorflow.org/tutorials/load_data/tfrecord). Where a record begins is only
told by the one before it, so a split's files are run through once, and the offsets kept
(data/index_cache.py). What is read is always checked against both checksums: offsets that no longer
fit lead to an error, never to other data.
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
_CACHED = "tfrecord-1"  # the layout of a cached index; another number when it changes
_THREADS = 16  # to wait for a disk or a network with


class Records:
    """The records of a split's files, end to end; picklable, and safe to use from threads.

    Local files stay open, one a file and process. Of files elsewhere (gs://, s3://: what fsspec
    opens) each record is a request for its range of bytes.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int], name: str):
        """Reads the index of the files, or makes it.

        Args:
          paths: the files.
          counts: how many records each must hold.
          name: of the dataset and split, for messages.

        Raises:
          UserError: a file is missing, damaged or cut short, or holds another number of records.
        """
        self._paths = list(paths)
        self._stops = np.cumsum(counts).tolist()
        # Of each file the beginning of every record, and the file's end.
        self._offsets = _index(self._paths, name)
        for path, offsets, count in zip(self._paths, self._offsets, counts, strict=True):
            if len(offsets) - 1 != count:
                raise UserError(
                    f"{path} holds {len(offsets) - 1} records, and the dataset_info.json beside it"
                    f" says {count}: copy or prepare the dataset anew"
                )
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> bytes:
        """Returns the data of a record.

        Raises:
          UnreadableImage: it is damaged.
          OSError: its file cannot be read; of files that are not local also other errors.
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
                " file anew"
            )
        return data

    def _read(self, file: int, start: int, stop: int) -> bytes:
        path = self._paths[file]
        if _is_remote(path):
            import fsspec  # etils opens with it, too, but then reads 5 MB ahead of each record

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
    """The images and labels of parts of splits, end to end."""

    def __init__(self, chosen: Sequence[parts.Part], records: Mapping[str, Records]):
        """Takes the parts, and the records of each split that they are of."""
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
            raise UnreadableImage("it holds no image with a label")
        return {"image": image[0], "label": label[0]}


def _index(paths: list[str], name: str) -> list[np.ndarray]:
    """Returns for each file the beginnings of its records and its end: int64 (records + 1,)."""
    location = os.path.realpath(paths[0]) if not _is_remote(paths[0]) else paths[0]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        stamps = list(pool.map(_stamp, paths))
        missing = [path for path, stamp in zip(paths, stamps, strict=True) if stamp is None]
        if missing:
            raise UserError(
                f"{name} lacks {len(missing)} of its {len(paths)} files:"
                f" {listed(missing, 2, ', ')}; copy them there, or prepare the dataset anew"
            )
        key = np.frombuffer("\n".join(map(str, stamps)).encode(), np.uint8)
        cached = index_cache.load(_CACHED, location)
        if cached is not None and np.array_equal(cached["key"], key):
            return np.split(cached["offsets"], cached["splits"])
        if _is_remote(paths[0]):
            print(f"indexing {name}: all its files are read, once", file=sys.stderr)
        offsets = list(
            tqdm.tqdm(
                pool.map(_offsets, paths),
                desc=f"indexing {name} (once)",
                total=len(paths),
                unit="file",
                delay=1,
                disable=None,  # where it is not a terminal
                leave=False,
                file=sys.stderr,
            )
        )
    splits = np.cumsum([len(part) for part in offsets])[:-1]
    arrays = {"key": key, "offsets": np.concatenate(offsets), "splits": splits}
    index_cache.save(_CACHED, location, arrays)
    return offsets


def _stamp(path: str) -> tuple[str, int, int] | None:
    """Returns what tells a file from another: name, size and time; None where there is none."""
    with _telling(path), contextlib.suppress(FileNotFoundError):
        if _is_remote(path):
            remote = epath.Path(path).stat()
            return os.path.basename(path), remote.length, remote.mtime
        local = os.stat(path)
        return os.path.basename(path), local.st_size, local.st_mtime_ns
    return None


def _offsets(path: str) -> np.ndarray:
    """Runs through a file from record to record."""
    offsets = [0]
    with _telling(path), _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        while offsets[-1] < size:
            file.seek(offsets[-1])
            header = file.read(_LENGTH.size)
            length = _length(header)
            if length is None and len(header) == _LENGTH.size:
                raise UserError(
                    f"{path} is damaged at byte {offsets[-1]} (a checksum is wrong), or is no"
                    " TFRecord file: copy it anew"
                )
            offsets.append(offsets[-1] + _LENGTH.size + (length or 0) + _CHECKSUM.size)
        if offsets[-1] > size:
            raise UserError(
                f"{path} is cut short: its {size} bytes end in record {len(offsets) - 2}; copy it"
                " anew"
            )
    return np.array(offsets, np.int64)


def _opened(path: str) -> Any:
    """Opens a file to read the lengths of its records one after the other.

    A local one without a buffer, which would read much of every record. Another one is read whole
    in large pieces: a request for every length would take longer.
    """
    return epath.Path(path).open("rb") if _is_remote(path) else open(path, "rb", 0)


@contextlib.contextmanager
def _telling(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    # An OSError; of files that are not local whatever their library raises.
    except Exception as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _length(frame: bytes) -> int | None:
    """Returns the length that a record begins with; None where its checksum is wrong."""
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
