"""Pictures and masks in one's own folders."""

import os
import pathlib
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data import loader
from mbv2_jax.data.sources import faults, notes, open_source, overlap
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import UnreadableImage, UserError
from mbv2_jax.tasks.segmentation.settings import Head
from mbv2_jax.tasks.segmentation.task import Segmentation
from tests.support.masked import write_classes, write_image, write_mask, write_pair

ROWS = [[0, 1, 2], [2, 255, 0]]


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """Two splits of three classes."""
    folder = write_classes(tmp_path / "streets", "road", "sky", "tree")
    for name in ("b", "a", "night/c"):
        write_pair(folder / "train", name, ROWS)
    write_pair(folder / "val", "d", ROWS)
    return folder


def mask(source, index: int = 0) -> list[list[int]]:
    found = source[index].targets["mask"]
    assert found.mode == "L"
    return np.asarray(found).tolist()


def names(source) -> list[str]:
    return [os.path.relpath(source.describe(i), source.root) for i in range(len(source))]


def test_pairs_are_read_in_the_order_of_their_names(root):
    source = open_source(f"pairs:{root}", "train")
    assert source.class_names == ("road", "sky", "tree")
    assert names(source) == ["a.png", "b.png", "night/c.png"]
    assert source[1].image == (root / "train/images/b.png").read_bytes()
    assert mask(source, 2) == ROWS
    assert notes(source) == []
    again = pickle.loads(pickle.dumps(source))
    assert mask(again, 2) == ROWS


def test_val_and_validation_find_each_other_and_other_names_do_not(root):
    assert names(open_source(f"pairs:{root}", "validation")) == ["d.png"]
    with pytest.raises(UserError, match=r"no split 'trian' .*did you mean 'train'\?"):
        open_source(f"pairs:{root}", "trian")


def test_splits_below_images_and_masks(root, tmp_path):
    other = write_classes(tmp_path / "other", "road", "sky", "tree")
    for kind in ("images", "masks"):
        (other / kind).mkdir()
        for split in ("train", "val"):
            (root / split / kind).rename(other / kind / split)
    assert names(open_source(f"pairs:{other}", "train")) == ["a.png", "b.png", "night/c.png"]
    assert names(open_source(f"pairs:{other}", "val")) == ["d.png"]
    assert mask(open_source(f"pairs:{other}", "validation")) == ROWS


def test_parts_share_no_picture(root):
    for number in range(17):
        write_pair(root / "train", f"{number:02}", ROWS)
    train, held_out = (open_source(f"pairs:{root}", f"train[{p}]") for p in (":90%", "90%:"))
    assert (len(train), len(held_out)) == (18, 2)
    assert sorted(names(train) + names(held_out)) == names(open_source(f"pairs:{root}", "train"))
    assert not overlap(train, held_out)
    assert overlap(train, open_source(f"pairs:{root}", "train[:1]"))


def test_a_fifth_of_a_folder_without_splits_is_held_out(tmp_path):
    write_classes(tmp_path, "road", "sky", "tree")
    for number in range(10):
        write_pair(tmp_path, f"{number}", ROWS)
    train, val, everything = (
        open_source(f"pairs:{tmp_path}", split) for split in ("train", "val", "all")
    )
    assert (len(train), len(val)) == (8, 2)
    assert sorted(names(train) + names(val)) == names(everything)
    assert not overlap(train, val)
    [note] = notes(train, val)
    assert "8 of its 10 images are for training, and 2, a fifth, are held out" in note


def test_ignored_classes_do_not_count_and_later_ones_move_up(root):
    write_classes(root, "ignored", "road", "ignored", "sky")
    write_pair(root / "val", "d", [[0, 1, 2], [3, 255, 1]])
    source = open_source(f"pairs:{root}", "val")
    assert source.class_names == ("road", "sky")
    assert mask(source) == [[255, 0, 255], [1, 255, 0]]
    [note] = notes(source)
    assert "pixels of class 0, 2 do not count, as its classes.txt says (later classes" in note


def grey_png(depth: int, rows: list[bytes], width: int) -> bytes:
    """Returns a grey PNG of few bits or many, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), depth, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*each) for each in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def palette(rows) -> Image.Image:
    image = Image.fromarray(np.array(rows, np.uint8))
    image.putpalette([9, 9, 9, 200, 100, 0, 7, 8, 9] + [1, 2, 3] * 253)  # not in the order of grey
    return image


def test_the_number_of_a_class_is_the_value_in_the_file(root):
    """Whatever the file's bits per pixel, and whatever the colours of its palette."""
    source = open_source(f"pairs:{root}", "val")
    file = root / "val/masks/d.png"
    palette(ROWS).save(file)
    assert mask(source) == ROWS
    palette([[0, 1, 2], [2, 0, 0]]).save(file, bits=2)
    assert mask(source) == [[0, 1, 2], [2, 0, 0]]
    rows = {
        1: ([b"\x40", b"\xa0"], [[0, 1, 0], [1, 0, 1]]),
        2: ([b"\x18", b"\x80"], [[0, 1, 2], [2, 0, 0]]),
        4: ([b"\x01\x20", b"\x20\x00"], [[0, 1, 2], [2, 0, 0]]),
        16: ([b"\0\0\0\1\0\2", b"\0\2\0\xff\0\0"], ROWS),
    }
    for depth, (packed, expected) in rows.items():
        file.write_bytes(grey_png(depth, packed, 3))
        assert mask(source) == expected


def test_masks_that_are_no_masks_are_refused(root):
    source = open_source(f"pairs:{root}", "val")
    file = root / "val/masks/d.png"
    palette(ROWS).convert("RGB").save(file)
    with pytest.raises(UserError, match=r"val/masks/d.png has pixels of mode RGB.*grey or palette"):
        source[0]
    Image.fromarray(np.array(ROWS, np.uint8)).save(file, "JPEG")
    with pytest.raises(UserError, match=r"d\.png is a JPEG"):
        source[0]
    file.write_bytes(grey_png(16, [b"\1\0\0\1\0\2"], 3))
    with pytest.raises(UserError, match="holds numbers from 1 to 256"):
        source[0]
    file.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UnreadableImage, match=r"cannot decode the mask .*d.png"):
        source[0]
    file.unlink()
    with pytest.raises(UnreadableImage, match=r"cannot read the mask .*d.png: No such file"):
        source[0]


def test_numbers_that_are_no_class_are_named(root):
    write_mask(root / "val/masks/d.png", [[0, 3, 200], [3, 255, 0]])
    with pytest.raises(UserError, match=r"d.png holds 3, 200, and there are classes 0 to 2; 255"):
        open_source(f"pairs:{root}", "val")[0]


def test_all_files_without_a_counterpart_are_counted_and_the_first_five_named(root):
    images, masks = root / "train/images", root / "train/masks"
    for name in "efghij":
        write_image(images / f"{name}.jpg")
    write_mask(masks / "x.png", ROWS)
    write_image(images / "a.bmp")
    (masks / ".hidden.png").write_text("")
    with pytest.raises(UserError) as error:
        open_source(f"pairs:{root}", "train")
    message = str(error.value)
    assert message.startswith(f"8 files of pairs:{root} cannot be used: ")
    assert "a.png: a.bmp has the same name but for its ending" in message
    for name in "efgh":
        assert f"{images}/{name}.jpg: there is no mask {masks}/{name}.png" in message
    assert message.endswith("and 3 more (python -m mbv2_jax.data verify lists all)")
    source = open_source(f"pairs:{root}", "train", with_faults=True)
    assert len(faults(source)) == 8
    assert faults(source)[-1] == f"{masks}/x.png: there is no picture of this name in {images}"
    assert len(source) == 3


CLASSES = {
    "road\nsky\n\nroad\n": "line 3 is empty",
    "road\nsky\nroad\n": "names 'road' more than once",
    "ignored\n": "names no class",
    "": "names no class",
    "\n".join(map(str, range(256))): r"has 256 lines, and there can be 255 classes, 0 to 254",
}


@pytest.mark.parametrize(("text", "message"), CLASSES.items(), ids=CLASSES.values())
def test_a_wrong_list_of_classes_is_refused(root, text, message):
    (root / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=rf"classes.txt:? {message}"):
        open_source(f"pairs:{root}", "train")


def test_missing_files_and_folders_are_named(root, tmp_path):
    (root / "val/masks/d.png").unlink()
    with pytest.raises(UserError, match=r"no picture in .*val/images has a mask in .*val/masks"):
        open_source(f"pairs:{root}", "val")
    (root / "val/masks").rmdir()
    with pytest.raises(UserError, match=r"no folder .*val/masks: it holds the masks of"):
        open_source(f"pairs:{root}", "val")
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"no file .*classes.txt: it names the classes"):
        open_source(f"pairs:{root}", "train")
    with pytest.raises(UserError, match="no folder"):
        open_source(f"pairs:{tmp_path / 'missing'}", "train")
    write_classes(tmp_path / "empty", "road")
    with pytest.raises(UserError, match=r"no images in .*: they belong in .*empty/train/images"):
        open_source(f"pairs:{tmp_path / 'empty'}", "train")


@pytest.mark.parametrize("transform", ["resize(4)", "random_resized_crop(4)|random_flip()"])
def test_a_mask_of_another_size_is_refused_with_both_sizes(root, transform):
    """Holds where the picture is decoded whole, and where only a crop of it is."""
    write_image(root / "val/images/d.png", (3, 2))
    write_mask(root / "val/masks/d.png", np.zeros((3, 2)))
    source = open_source(f"pairs:{root}", "val")
    batches = loader.train_batches(
        source,
        pipeline.make_transform(transform, 4),
        Segmentation(Head(3), source.class_names),
        batch_size=1,
        seed=0,
        start=0,
        stop=1,
        workers=0,
    )
    with pytest.raises(UserError, match=r"d.png: the image is 3 x 2 .*, and its mask 2 x 3"):
        next(batches)
    batches.close()


def test_camvid(check_data, tmp_path):
    """Keeps the set's own order: 11 classes and void, which is the twelfth."""
    with tarfile.open(check_data / "data/camvid_240x180.tar") as tar:
        for member in tar.getmembers():
            name = pathlib.PurePath(member.name)
            if name.parent.name == "test":
                kind = "images" if name.suffix == ".jpg" else "masks"
                member.name = str(pathlib.PurePath(name.parent.name, kind, name.name))
                tar.extract(member, tmp_path, filter="data")
    write_classes(tmp_path, *map(str, range(11)), "ignored")
    source = open_source(f"pairs:{tmp_path}", "test")
    assert len(source) == 233
    for index in range(0, 233, 10):
        stem = pathlib.Path(source.describe(index)).stem
        raw = np.asarray(Image.open(tmp_path / "test/masks" / f"{stem}.png"))
        np.testing.assert_array_equal(mask(source, index), np.where(raw == 11, 255, raw))
