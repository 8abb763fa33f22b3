"""Pascal VOC in VOCdevkit's layout."""

import os
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data.sources import faults, open_source, overlap
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UserError
from tests.support.masked import write_image, write_mask

ROWS = [[0, 15, 20], [1, 255, 0]]


def write_list(year: pathlib.Path, split: str, *lines: str) -> None:
    folder = year / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def devkit(tmp_path) -> pathlib.Path:
    """Pictures a to f; d, e and f have masks in SegmentationClassAug only."""
    year = tmp_path / "VOCdevkit" / "VOC2012"
    for name in "abcdef":
        write_image(year / "JPEGImages" / f"{name}.jpg", (3, 2))
        write_mask(year / "SegmentationClassAug" / f"{name}.png", ROWS)
    for name in "abc":
        write_mask(year / "SegmentationClass" / f"{name}.png", np.zeros((2, 3)))
    write_list(year, "train", "a", "b")
    write_list(year, "val", "c")
    write_list(year, "trainval", "a", "b", "c")
    write_list(year, "train_aug", *(f"/JPEGImages/{n}.jpg /Masks/{n}.png" for n in "abdef"))
    return tmp_path / "VOCdevkit"


def names(source) -> list[str]:
    return [os.path.basename(source.describe(i)) for i in range(len(source))]


def mask(source, index: int = 0) -> list[list[int]]:
    return np.asarray(source[index].targets["mask"]).tolist()


def test_any_folder_above_the_year_is_found(devkit):
    for path in (devkit, devkit.parent, devkit / "VOC2012"):
        source = open_source(f"voc:{path}", "train")
        assert names(source) == ["a.jpg", "b.jpg"]
        assert len(source.class_names) == 21
        assert (source.class_names[0], source.class_names[15]) == ("background", "person")
        assert source[0].image == (devkit / "VOC2012/JPEGImages/a.jpg").read_bytes()
    (devkit / "VOC2012").rename(devkit / "VOC2007")
    assert names(open_source(f"voc:{devkit}", "validation")) == ["c.jpg"]
    shutil.copytree(devkit / "VOC2007", devkit / "VOC2010")
    with pytest.raises(UserError, match=r"several years .* give one of '.*VOC2007', '.*VOC2010'"):
        open_source(f"voc:{devkit}", "val")


def test_vocs_own_masks_come_before_sbds(devkit):
    own = [[0, 0, 0], [0, 0, 0]]
    assert mask(open_source(f"voc:{devkit}", "val")) == own
    augmented = open_source(f"voc:{devkit}", "train_aug")
    assert [mask(augmented, index) for index in range(5)] == [own, own, ROWS, ROWS, ROWS]
    (devkit / "VOC2012/SegmentationClass/c.png").unlink()
    assert mask(open_source(f"voc:{devkit}", "val")) == ROWS


def test_a_list_of_paths_names_the_pictures(devkit):
    assert names(open_source(f"voc:{devkit}", "train_aug")) == [f"{n}.jpg" for n in "abdef"]


def test_splits_that_share_pictures_overlap(devkit):
    opened = {
        split: open_source(f"voc:{devkit}", split)
        for split in ("train", "val", "trainval", "train_aug", "train_aug[:60%]", "train_aug[60%:]")
    }
    assert overlap(opened["train"], opened["train_aug"])
    assert overlap(opened["trainval"], opened["val"])
    assert not overlap(opened["val"], opened["train_aug"])
    assert not overlap(opened["train_aug[:60%]"], opened["train_aug[60%:]"])
    both = names(opened["train_aug[:60%]"]) + names(opened["train_aug[60%:]"])
    assert sorted(both) == names(opened["train_aug"])


def test_missing_files_are_named(devkit):
    year = devkit / "VOC2012"
    (year / "JPEGImages/e.jpg").unlink()
    (year / "SegmentationClassAug/f.png").unlink()
    with pytest.raises(UserError) as error:
        open_source(f"voc:{devkit}", "train_aug")
    assert "2 files of" in str(error.value)
    assert f"{year}/JPEGImages/e.jpg is missing" in str(error.value)
    assert f"{year}/SegmentationClassAug/f.png is missing" in str(error.value)
    source = open_source(f"voc:{devkit}", "train_aug", with_faults=True)
    assert names(source) == ["a.jpg", "b.jpg", "d.jpg"]
    assert len(faults(source)) == 2
    assert names(open_source(f"voc:{devkit}", "train")) == ["a.jpg", "b.jpg"]


def test_wrong_lists_and_folders_are_explained(devkit, tmp_path):
    year = devkit / "VOC2012"
    with pytest.raises(UserError, match=r"no split 'train_agu' .*did you mean 'train_aug'\?"):
        open_source(f"voc:{devkit}", "train_agu")
    write_list(year, "val", "c", "a", "c")
    with pytest.raises(UserError, match=r"val.txt names 'c' more than once"):
        open_source(f"voc:{devkit}", "val")
    write_list(year, "val", "")
    with pytest.raises(UserError, match=r"val.txt names no picture"):
        open_source(f"voc:{devkit}", "val")
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        (year / folder).rename(year / f"{folder}.old")
    with pytest.raises(UserError, match="no SegmentationClass and no SegmentationClassAug in"):
        open_source(f"voc:{devkit}", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no ImageSets/Segmentation in .*empty, nor in a VOC2012"):
        open_source(f"voc:{tmp_path / 'empty'}", "train")
    with pytest.raises(UserError, match="no folder"):
        open_source(f"voc:{tmp_path / 'missing'}", "train")


def test_24_pictures_of_voc(check_data, tmp_path):
    with tarfile.open(check_data / "data/voc_seg.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    source = open_source(f"voc:{tmp_path}", "val")
    assert len(source) == 24
    transform = make_transform("fit(size)|pad(size)", 513)
    seen = set()
    for index in range(24):
        sample = source[index]
        name = pathlib.Path(source.describe(index)).stem
        stored = Image.open(tmp_path / "VOC2012/SegmentationClassAug" / f"{name}.png")
        np.testing.assert_array_equal(np.asarray(sample.targets["mask"]), np.asarray(stored))
        moved = transform.from_encoded(sample, np.random.default_rng(0))
        assert moved.image.shape == (513, 513, 3)
        seen |= set(np.unique(np.asarray(moved.targets["mask"])).tolist())
    assert seen <= {*range(21), 255} and len(seen) > 10
