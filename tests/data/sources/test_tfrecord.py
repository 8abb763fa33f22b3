"""TFRecord copies of a TFDS dataset: the ArrayRecord copy's examples, and every damage."""

import concurrent.futures
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys

import fsspec
import google_crc32c
import numpy as np
import pytest
from array_record.python import array_record_module
from fsspec.implementations import memory
from tensorflow_datasets.proto import tf_example_pb2

from mbv2_jax.data import loader
from mbv2_jax.data.sample import Sample
from mbv2_jax.data.sources import open_source, tfrecord
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UnreadableImage, UserError
from tests.support.coded import LabelCollator

# The file that TensorFlow 2.21's tf.io.TFRecordWriter wrote for b"inverted residual" and b"".
BY_TENSORFLOW = bytes.fromhex(
    "11000000000000009d6db52e696e76657274656420726573696475616c7b6a760b"
    "000000000000000029039807d8ea82a2"
)


def content(sample: Sample) -> tuple:
    """Returns all of a sample but its id, which names the file and the part."""
    return sample.image, sample.targets


def checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def write_copy(folder: pathlib.Path, records: list[bytes], lengths: list[int]) -> None:
    """Turns the ArrayRecord copy in `folder` into TFRecord, its test split in several files."""
    for file in folder.glob("*.array_record-*"):
        file.unlink()
    info = json.loads((folder / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
    (split,) = (split for split in info["splits"] if split["name"] == "test")
    split["shardLengths"] = [str(length) for length in lengths]
    info["splits"] = [split]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    first = 0
    for number, length in enumerate(lengths):
        name = f"shapes-test.tfrecord-{number:05d}-of-{len(lengths):05d}"
        (folder / name).write_bytes(b"".join(map(frame, records[first : first + length])))
        first += length


@pytest.fixture(scope="module")
def array_record_dir(tmp_path_factory) -> pathlib.Path:
    """Prepares the digits under another name, as any other dataset."""
    path = tmp_path_factory.mktemp("array_record")
    open_source("digits", "test", str(path))
    folder = path / "shapes" / "1.0.0"
    shutil.move(path / "digits" / "1.0.0", folder)
    for file in folder.iterdir():
        if file.suffix == ".json":
            file.write_text(file.read_text().replace('"digits"', '"shapes"'))
        else:
            file.rename(folder / file.name.replace("digits", "shapes"))
    return path


@pytest.fixture(scope="module")
def records(array_record_dir) -> list[bytes]:
    (file,) = array_record_dir.glob("shapes/*/shapes-test.*")
    return array_record_module.ArrayRecordReader(str(file)).read_all()


@pytest.fixture
def data_dir(array_record_dir, records, tmp_path, monkeypatch) -> pathlib.Path:
    """Returns the TFRecord copy, in three files, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(array_record_dir, tmp_path / "data")
    write_copy(tmp_path / "data" / "shapes" / "1.0.0", records, [100, 3, 257])
    return tmp_path / "data"


def shard(data_dir: pathlib.Path, number: int) -> pathlib.Path:
    return data_dir / "shapes" / "1.0.0" / f"shapes-test.tfrecord-{number:05d}-of-00003"


def change(file: pathlib.Path, place: int) -> None:
    """Changes one byte of a file, and neither its size nor its time."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=times)


def fails(data_dir, split: str = "test") -> str:
    with pytest.raises(UserError) as error:
        open_source("shapes", split, str(data_dir))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_both_copies_give_the_same_batches(array_record_dir, data_dir):
    transform = make_transform("random_crop(6)|random_flip(0.5)", 6)

    def batches(path, workers):
        with_all = {"batch_size": 48, "seed": 3, "start": 5, "stop": 14, "workers": workers}
        source = open_source("shapes", "test", str(path))
        found = loader.train_batches(source, transform, LabelCollator(), **with_all)
        yield from found
        found.close()

    expected = list(batches(array_record_dir, 0))
    assert len({image.tobytes() for batch in expected for image in batch["image"]}) > 300
    for workers in (0, 2):
        for one, other in zip(batches(data_dir, workers), expected, strict=True):
            np.testing.assert_array_equal(one["image"], other["image"])
            np.testing.assert_array_equal(one["label"], other["label"])


@pytest.mark.parametrize("split", ["test", "test[101:]", "test[-30%:]+test[:2]", "all"])
def test_both_copies_give_the_same_parts(array_record_dir, data_dir, split):
    # The ArrayRecord copy has a training split, too, which "all" would include.
    expected = open_source("shapes", split.replace("all", "test"), str(array_record_dir))
    source = open_source("shapes", split, str(data_dir))
    assert len(source) == len(expected)
    for i in range(len(source)):
        assert content(source[i]) == content(expected[i])


def test_an_example_is_named_with_its_place(data_dir):
    assert open_source("shapes", "test[90:]", str(data_dir)).describe(12) == (
        "record 12 of shapes[test[90:]] (number 2 in shapes-test.tfrecord-00001-of-00003)"
    )


def test_array_record_is_preferred(array_record_dir, data_dir):
    folder = data_dir / "shapes" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"alternativeFileFormats": ["array_record"]}
    info["splits"][0]["shardLengths"] = ["360"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (file,) = array_record_dir.glob("shapes/*/shapes-test.*")
    shutil.copy(file, folder)
    source = open_source("shapes", "test", str(data_dir))
    assert len(source) == 360
    assert source.describe(0).endswith("in shapes-test.array_record-00000-of-00001)")
    assert source[359].targets["label"] in range(10)


def test_a_copy_that_does_not_say_its_form_is_tfrecord(data_dir):
    """Datasets that were prepared before there was a choice do not state it."""
    file = data_dir / "shapes" / "1.0.0" / "dataset_info.json"
    file.write_text(file.read_text().replace('"fileFormat": "tfrecord", ', ""))
    assert "fileFormat" not in file.read_text()
    assert len(open_source("shapes", "test", str(data_dir))) == 360


def test_a_file_of_tensorflow_is_read(tmp_path):
    (tmp_path / "file").write_bytes(BY_TENSORFLOW)
    found = tfrecord.Records([str(tmp_path / "file")], [2], "x")
    assert [found[0], found[1]] == [b"inverted residual", b""]
    assert (
        frame(b"inverted residual") + frame(b"") == BY_TENSORFLOW
    )  # the helper writes the same bytes


def test_many_threads_read_at_once(data_dir):
    source = open_source("shapes", "test", str(data_dir))
    expected = [open_source("shapes", "test", str(data_dir))[i] for i in range(360)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(source.__getitem__, list(range(360)) * 4)) == expected * 4


def test_a_source_is_picklable_when_it_was_read_from(data_dir):
    source = open_source("shapes", "test", str(data_dir))
    first = source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[0] == first
    del source  # closes its own files, and not the copy's
    assert copy[1] != first
    assert copy[0] == first


def test_damaged_data_is_reported_at_its_record(data_dir, records):
    size = len(frame(records[100]))
    change(shard(data_dir, 1), size + 40)
    source = open_source("shapes", "test", str(data_dir))
    with pytest.raises(UnreadableImage) as error:
        source[101]
    assert str(error.value) == (
        f"cannot read the record: its checksum is wrong, {shard(data_dir, 1)} is damaged at byte"
        f" {size}: copy that file again"
    )
    assert all(source[index].image for index in range(360) if index != 101)


def test_damaged_files_are_reported_at_once(data_dir):
    change(shard(data_dir, 2), 3)
    assert f"{shard(data_dir, 2)} is damaged at byte 0 (a checksum is wrong)" in fails(data_dir)
    change(shard(data_dir, 2), 3)
    content = shard(data_dir, 2).read_bytes()
    # In a record's data, and in the few bytes of its length.
    for size in (len(content) - 54, len(content) - 1, 5):
        shard(data_dir, 2).write_bytes(content[:size])
        message = fails(data_dir)
        assert f"{shard(data_dir, 2)} is cut short: its {size} bytes end in record " in message
    shard(data_dir, 2).write_text("<html>not a record in sight</html>")
    assert "or is not a TFRecord file" in fails(data_dir)


def test_missing_files_are_reported_at_once(data_dir):
    shard(data_dir, 1).unlink()
    assert f"shapes[test] lacks 1 of its 3 files: {shard(data_dir, 1)};" in fails(data_dir)
    shard(data_dir, 0).unlink()
    shard(data_dir, 2).unlink()
    assert "lacks 3 of its 3 files" in fails(data_dir)
    assert "and 1 more" in fails(data_dir)


def test_wrong_record_counts_are_reported_at_once(data_dir, records):
    for content in (b"", b"".join(map(frame, records[:2])), b"".join(map(frame, records[:4]))):
        shard(data_dir, 1).write_bytes(content)
        message = fails(data_dir)
        assert f"{shard(data_dir, 1)} holds {content.count(b'image')} records" in message
        assert "dataset_info.json beside it says 3" in message


def test_a_file_that_cannot_be_read_is_reported(data_dir):
    shard(data_dir, 1).unlink()
    shard(data_dir, 1).mkdir()
    assert f"cannot read {shard(data_dir, 1)}: Is a directory" in fails(data_dir)


def test_a_record_of_something_else_is_reported(data_dir):
    example = tf_example_pb2.Example()
    example.features.feature["label"].int64_list.value.append(3)
    for data in (example.SerializeToString(), b"not a message"):
        shard(data_dir, 1).write_bytes(frame(data) * 3)
        source = open_source("shapes", "test", str(data_dir))
        with pytest.raises(UnreadableImage, match="cannot read the record: "):
            source[101]
        assert source[99].image


def test_the_index_is_made_once(data_dir, tmp_path):
    examples = list(map(open_source("shapes", "test", str(data_dir)).__getitem__, range(360)))
    # Another scan of the file would notice this.
    change(shard(data_dir, 0), 3)
    source = open_source("shapes", "test[:200]", str(data_dir))
    assert content(source[1]) == content(examples[1])
    # Reading the record itself does.
    with pytest.raises(UnreadableImage, match="its checksum is wrong"):
        source[0]
    change(shard(data_dir, 0), 3)

    (cache,) = (tmp_path / "cache" / "mbv2_jax").iterdir()
    saved = cache.read_bytes()
    damaged = bytearray(saved)
    damaged[len(saved) // 2] ^= 1
    for bad in (b"", b"PK no zip", saved[:-40], bytes(damaged)):
        cache.write_bytes(bad)
        assert open_source("shapes", "test", str(data_dir))[359] == examples[359]
        assert cache.read_bytes() == saved  # made anew
    assert list(cache.parent.iterdir()) == [cache]


def test_the_index_follows_the_files(data_dir, records):
    open_source("shapes", "test", str(data_dir))
    before = shard(data_dir, 0).stat()
    # The same records in another order; the first two files change their lengths.
    write_copy(data_dir / "shapes" / "1.0.0", records[::-1], [100, 3, 257])
    source = open_source("shapes", "test", str(data_dir))
    assert tf_example_pb2.Example.FromString(records[-1]).features.feature[
        "image"
    ].bytes_list.value == [source[0].image]
    assert [source[i].targets["label"] for i in range(360)][::-1] == [
        tf_example_pb2.Example.FromString(data).features.feature["label"].int64_list.value[0]
        for data in records
    ]
    assert shard(data_dir, 0).stat().st_mtime_ns != before.st_mtime_ns


def test_a_cache_that_cannot_be_written_costs_time_only(data_dir, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", pathlib.Path("/proc/1"), pathlib.Path("relative")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        for _ in range(2):
            assert len(open_source("shapes", "test", str(data_dir))) == 360
    assert not pathlib.Path("relative").exists()


class Bucket(memory.MemoryFileSystem):
    """Stands in for gcsfs behind gs://, in memory, and notes the sizes of fetched ranges."""

    protocol = ("gcs", "gs")
    ranges: list[int] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gcs://").removeprefix("gs://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.ranges.append(end - start)
        return super().cat_file(path, start, end, **kwargs)


def test_a_bucket_is_read_in_ranges(data_dir, records, monkeypatch):
    for protocol in Bucket.protocol:
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    bucket = fsspec.filesystem("gcs")
    bucket.put(str(data_dir), "/photos/tfds", recursive=True)
    expected = open_source("shapes", "test", str(data_dir))
    for _ in range(2):  # without an index, and with one
        source = open_source("shapes", "test[50:150]", "gs://photos/tfds")
        del bucket.ranges[:]
        copy = pickle.loads(pickle.dumps(source))
        for i in range(100):
            assert content(copy[i]) == content(expected[i + 50])
        assert bucket.ranges == [len(frame(data)) for data in records[50:150]]
    bucket.rm("/photos/tfds/shapes/1.0.0/shapes-test.tfrecord-00002-of-00003")
    assert "lacks 1 of its 3 files: gs://photos/tfds/shapes/1.0.0/sh" in fails("gs://photos/tfds")
    with pytest.raises(UnreadableImage, match="cannot read the record: "):
        source[99]


def test_more_files_than_a_process_may_open_at_first(data_dir, records):
    """The usual limit is 1,024, as many as imagenet2012 has; and TensorFlow is not imported."""
    write_copy(data_dir / "shapes" / "1.0.0", records, [1] * 360)
    code = f"""
import importlib.util, resource, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
from mbv2_jax.data import loader, sources
from mbv2_jax.data.transforms import pipeline
source = sources.open_source("shapes", "test", {str(data_dir)!r})
from tests.support.coded import LabelCollator
transform = pipeline.make_transform("resize(8)", 8)
batches = loader.eval_batches(source, transform, LabelCollator(), batch_size=60, workers=0)
print(sum(int(batch["mask"].sum()) for batch in batches))
assert importlib.util.find_spec("tensorflow") is None, "the tests' environment has TensorFlow"
assert not [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")]
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "360\n", process.stderr
