"""Large folders are listed once, and parts of a folder are random ones."""

import os
import pathlib
import pickle
import shutil
import time

import numpy as np
import pytest

from mbv2_jax.data.sources import folder, open_source, overlap
from mbv2_jax.data.sources.folder import FolderSource
from mbv2_jax.errors import UnreadableImage, UserError


def touch(root: pathlib.Path, *names: str) -> None:
    """Writes files that a source lists; their content is their name and their folder's."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("/".join((root / name).parts[-2:]))


def files(source) -> list[str]:
    """Returns the files of a source, relative to its root, and reads them."""
    found = [source.describe(i) for i in range(len(source))]
    for i, name in enumerate(found):
        assert name.endswith("/" + source[i].image.decode())
    return [os.path.relpath(name, source.root) for name in found]


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """A split that is given directly."""
    touch(tmp_path / "train", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/old/9.jpg", "emu/é.jpg")
    return tmp_path / "train"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """Makes an empty cache that accepts few files, and files that were just written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "_MIN_CACHED", 0)
    monkeypatch.setattr(folder, "_SETTLED_NS", 0)
    return tmp_path / "cache" / "mbv2_jax"


def settle() -> None:
    """Waits for the next tick of the file system's clock: 10 ms at most on Linux."""
    time.sleep(0.03)


def listed_anew(monkeypatch) -> list[str]:
    """Returns a list to which every folder that is listed from now on is added."""
    walked, walk = [], folder._walk

    def spy(root):
        walked.append(root)
        return walk(root)

    monkeypatch.setattr(folder, "_walk", spy)
    return walked


def test_a_folder_is_listed_once(root, cache, monkeypatch):
    settle()
    walked = listed_anew(monkeypatch)
    for _ in range(3):
        source = open_source(f"folder:{root}", "train")
        assert files(source) == [
            "cat/1.jpg",
            "cat/2.jpg",
            "dog/1.jpg",
            "dog/old/9.jpg",
            "emu/é.jpg",
        ]
        assert source.class_names == ("cat", "dog", "emu")
        assert [source[i].targets["label"] for i in range(5)] == [0, 0, 1, 1, 2]
    assert walked == [str(root)]


CHANGES = {
    "new file": lambda root: touch(root, "cat/15.jpg"),
    "new file in a folder below": lambda root: touch(root, "dog/old/5.jpg"),
    "new folder below": lambda root: touch(root, "dog/old/er/5.jpg"),
    "new class": lambda root: touch(root, "bee/1.jpg"),
    "removed file": lambda root: (root / "cat" / "1.jpg").unlink(),
    "removed class": lambda root: shutil.rmtree(root / "cat"),
    "renamed class": lambda root: (root / "cat").rename(root / "zebra"),
    "moved folder": lambda root: (root / "dog" / "old").rename(root / "emu" / "old"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(root, cache, change):
    def now() -> list[str]:
        found = [f for f in sorted(root.rglob("*.jpg")) if f.is_file()]
        by_folder = sorted(found, key=lambda f: (f.relative_to(root).parts[0], f.parent, f.name))
        return [str(f.relative_to(root)) for f in by_folder]

    settle()
    assert len(FolderSource(str(root), "train")) == 5
    assert list(cache.iterdir())
    change(root)
    expected = now()
    assert expected != ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/old/9.jpg", "emu/é.jpg"]
    for _ in range(2):
        settle()
        source = FolderSource(str(root), "train")
        assert [os.path.relpath(source.describe(i), root) for i in range(len(source))] == expected


def test_a_renamed_file_is_seen_where_the_folders_time_was_set_back(root, cache):
    """rsync and tar set the times of folders back."""
    settle()
    FolderSource(str(root), "train")
    before = (root / "cat").stat()
    (root / "cat" / "1.jpg").rename(root / "cat" / "3.jpg")
    os.utime(root / "cat", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert FolderSource(str(root), "train").describe(1) == f"{root}/cat/3.jpg"


def test_a_link_to_another_folder_is_seen(root, cache, tmp_path):
    touch(tmp_path / "elsewhere", "7.jpg")
    (root / "fox").symlink_to(tmp_path / "elsewhere")
    settle()
    assert FolderSource(str(root), "train").describe(5) == f"{root}/fox/7.jpg"
    touch(tmp_path / "elsewhere", "6.jpg")
    assert FolderSource(str(root), "train").describe(5) == f"{root}/fox/6.jpg"


def test_folders_that_only_just_changed_are_not_trusted(root, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    monkeypatch.setattr(folder, "_MIN_CACHED", 0)
    FolderSource(str(root), "train")
    assert not cache.exists()


def test_small_folders_leave_the_cache_alone(root, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    monkeypatch.setattr(folder, "_SETTLED_NS", 0)
    settle()
    FolderSource(str(root), "train")
    assert not cache.exists()


def test_a_damaged_cache_costs_time_only(root, cache):
    settle()
    FolderSource(str(root), "train")
    (file,) = cache.iterdir()
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[content.index(b"dog/old")] ^= 1
    for bad in (b"", content[:200], bytes(damaged)):
        file.write_bytes(bad)
        assert len(files(FolderSource(str(root), "train"))) == 5
        assert file.read_bytes() == content
    (file.unlink(), cache.rmdir(), cache.write_text("no folder"))
    assert len(files(FolderSource(str(root), "train"))) == 5


def test_a_listing_is_small(tmp_path, monkeypatch):
    """It is sent to every worker; 1.3 million names as Python strings would be 100 MB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "_SETTLED_NS", 0)
    names = [f"n{i % 20:08d}/n{i % 20:08d}_{i:05d}.JPEG" for i in range(10_000)]
    for name in {os.path.dirname(name) for name in names}:
        (tmp_path / "train" / name).mkdir(parents=True)
    for name in names:
        os.close(os.open(tmp_path / "train" / name, os.O_CREAT))
    settle()
    for _ in range(2):  # listed, and from the cache
        source = FolderSource(str(tmp_path), "train")
        content = pickle.dumps(source)
        assert len(content) < 10_000 * (len("n00000000_00000.JPEG") + 8) + 10_000
        copy = pickle.loads(content)
        assert [copy.describe(i) for i in (0, 777, 9999)] == [
            str(tmp_path / "train" / sorted(names)[i]) for i in (0, 777, 9999)
        ]
    assert len(list((tmp_path / "cache" / "mbv2_jax").iterdir())) == 1


def test_a_torchvision_imagenet_folder(tmp_path):
    """torchvision.datasets.ImageNet leaves archives and meta.bin beside the splits."""
    touch(
        tmp_path,
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "ILSVRC2012_devkit_t12.tar.gz",
        "meta.bin",
        "train/n01440764/n01440764_10026.JPEG",
        "train/n01443537/n01443537_2.JPEG",
        "val/n01440764/ILSVRC2012_val_00000293.JPEG",
        "val/n01443537/ILSVRC2012_val_00000236.JPEG",
    )
    train = open_source(f"folder:{tmp_path}", "train")
    assert train.class_names == ("n01440764", "n01443537")
    expected = ["n01440764/ILSVRC2012_val_00000293.JPEG", "n01443537/ILSVRC2012_val_00000236.JPEG"]
    assert files(open_source(f"folder:{tmp_path}", "val")) == expected
    # TFDS's name works, too, so that a recipe's eval_split need not change with the source.
    source = open_source(f"folder:{tmp_path}", "validation")
    assert files(source) == expected
    assert not overlap(train, source)
    assert overlap(open_source(f"folder:{tmp_path}", "val[:1]"), source)
    (tmp_path / "val").rename(tmp_path / "validation")
    assert files(open_source(f"folder:{tmp_path}", "val")) == expected
    touch(tmp_path, "val/n01440764/1.JPEG")
    assert len(open_source(f"folder:{tmp_path}", "val")) == 1
    assert len(open_source(f"folder:{tmp_path}", "validation")) == 2


@pytest.fixture
def hundred(tmp_path) -> str:
    names = (f"{label}/{i:02d}.jpg" for label in "abcde" for i in range(20))
    touch(tmp_path / "hundred" / "train", *names)
    return f"folder:{tmp_path / 'hundred'}"


def test_parts_are_random_and_stay_the_same(hundred):
    everything = files(open_source(hundred, "train"))
    order = np.random.RandomState(0).permutation(100)  # see FolderSource
    for split, numbers in {
        "train[30:]": order[30:],
        "train[:30]": order[:30],
        "train[-10:]": order[90:],
        "train[25%:50%]": order[25:50],
        "train[:20%]+train[40%:]": np.concatenate([order[:20], order[40:]]),
        "train[:100]": np.arange(100),
    }.items():
        source = open_source(hundred, split)
        assert files(source) == [everything[i] for i in np.sort(numbers)]
        copy = pickle.loads(pickle.dumps(source))
        assert copy.describe(3) == source.describe(3)
        assert copy[3] == source[3]
        assert [source[i].targets["label"] for i in range(len(source))] == [
            "abcde".index(name[0]) for name in files(source)
        ]
    held_out = files(open_source(hundred, "train[:30]"))
    assert {name[0] for name in held_out} == set("abcde")
    assert sorted(held_out + files(open_source(hundred, "train[30:]"))) == everything


def test_parts_that_share_files_are_known(hundred):
    def share(one: str, other: str) -> bool:
        first, second = open_source(hundred, one), open_source(hundred, other)
        common = set(files(first)) & set(files(second))
        assert overlap(first, second) == overlap(second, first) == bool(common)
        return bool(common)

    assert share("train", "train")
    assert share("train", "train[99:]")
    assert share("train[:31]", "train[30:]")
    assert not share("train[:30]", "train[30:]")
    assert not share("train[:20%]+train[40%:]", "train[20:40]")
    pathlib.Path(hundred.removeprefix("folder:"), "test").symlink_to("train")
    assert share("train[:30]", "test[29:]")


def test_parts_of_tfds_datasets_that_share_examples_are_known(tmp_path):
    def share(one: str, other: str) -> bool:
        return overlap(*(open_source("digits", split, str(tmp_path)) for split in (one, other)))

    assert share("train[:10]", "test+train[9:12]")
    assert not share("train", "test")
    assert not share("train[10:]", "train[:10]+test")


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train[200:]", "cannot take 'train[200:]' of {path}/train (train has 100 examples)"),
        ("train[:half]", "cannot take 'train[:half]' of"),
        ("train[:101%]", "cannot take 'train[:101%]' of"),
        ("train[", "cannot take 'train[' of"),
        ("train[:0]", "split 'train[:0]' of {path}/train is empty"),
        ("train[60:40]", "split 'train[60:40]' of {path}/train is empty"),
        ("trian[:9]", "no split 'trian' in {path}; did you mean 'train'?"),
        ("train[:9]+val[:9]", "give parts of one split, such as 'train[10000:]'"),
        ("train[:1shard]", "give parts of one split"),
    ],
)
def test_parts_that_cannot_be_are_explained(hundred, split, words):
    with pytest.raises(UserError) as error:
        open_source(hundred, split)
    assert words.format(path=hundred.removeprefix("folder:")) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_may_have_the_name_of_an_expression(tmp_path):
    touch(tmp_path, "train+extra/a/1.jpg", "fold[1]/a/1.jpg", "fold[1]/a/2.jpg")
    assert len(open_source(f"folder:{tmp_path}", "train+extra")) == 1
    assert len(open_source(f"folder:{tmp_path}", "fold[1]")) == 2


def test_a_file_that_cannot_be_read_is_one_that_training_may_skip(hundred):
    source = open_source(hundred, "train[50:]")
    os.unlink(source.describe(7))
    with pytest.raises(UnreadableImage, match="cannot read the image: No such file"):
        source[7]
    assert source[8].image


def test_a_folder_in_a_bucket_is_refused():
    with pytest.raises(UserError, match="a folder of images on a local disk"):
        open_source("folder:gs://bucket/flowers", "train")


@pytest.mark.parametrize("lost", ["cat", "dog", "dog/old", "emu"])
def test_a_folder_that_cannot_be_read_is_reported_and_not_cached(root, cache, monkeypatch, lost):
    """A temporary error of a disk must not lose a class or images, now or at the next start."""
    scan = os.scandir

    def fail(path):
        if str(path) == str(root / lost):
            raise OSError(5, "Input/output error", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        with pytest.raises(UserError, match=rf"cannot read the folder .*/{lost}: Input/output"):
            FolderSource(str(root), "train")
    source = FolderSource(str(root), "train")
    assert source.class_names == ("cat", "dog", "emu")
    assert len(source) == 5
