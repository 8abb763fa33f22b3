"""Pictures and objects in Ultralytics' layout."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from mbv2_jax.data.sources import bad_objects, notes, overlap
from mbv2_jax.errors import UnreadableImage, UserError
from tests.support.boxed import all_faults, corners, opened, write_yolo

LINES = {
    "b": "1 0.5 0.5 0.5 0.2\n\n0 0.25 0.5 0.5 1\n",
    "a": None,
    "c": "",
    "d": "1 0.1 0.2 0.6 0.2 0.3 0.9",  # a triangle
}


@pytest.fixture
def yolo(tmp_path):
    (tmp_path / "data.yaml").write_text("train: ../elsewhere\nnc: 2\nnames: [cat, dog]\n")
    write_yolo(tmp_path / "images" / "train", tmp_path / "labels" / "train", LINES)
    return tmp_path


def test_pictures_classes_and_objects(yolo):
    source = opened(f"yolo:{yolo}")
    assert source.class_names == ("cat", "dog")
    assert source.category_ids == (1, 2)
    assert source.benchmark == "coco"
    assert [source.image_id(i) for i in range(4)] == ["a", "b", "c", "d"]
    boxes = source[1].targets["boxes"]
    assert boxes.corners.dtype == "float32"
    # Of 40 x 30 pixels, to a few units in the last place of float32.
    np.testing.assert_allclose(boxes.corners, [[10, 12, 30, 18], [0, 0, 20, 30]], rtol=1e-6)
    np.testing.assert_allclose(boxes.area, [120, 600], rtol=1e-6)
    assert boxes.labels.tolist() == [1, 0]
    assert source.boxes(1).corners.dtype == "float64"
    assert [len(source.boxes(index)) for index in range(4)] == [0, 2, 0, 1]


def test_a_polygon_becomes_its_box(yolo):
    np.testing.assert_allclose(corners(opened(f"yolo:{yolo}"), 3), [[4, 6, 24, 27]], rtol=1e-6)


def test_of_a_pose_only_the_box_is_taken(yolo):
    """Two keypoints, which as corners of a polygon would give another box."""
    with (yolo / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 3]\n")
    pose = "1 .5 .5 .5 .2 .1 .1 2 .9 .9 1"
    (yolo / "labels/train/b.txt").write_text(f"{pose}\n0 .25 .5 .5 1\n")
    (yolo / "labels/train/d.txt").write_text("")
    source = opened(f"yolo:{yolo}")
    expected = [[10, 12, 30, 18], [0, 0, 20, 30]]
    np.testing.assert_allclose(corners(source, 1), expected, rtol=1e-6)
    assert not bad_objects(source)
    (yolo / "labels/train/b.txt").write_text(f"{pose} .5")
    message = r"b\.txt: line 1 is '1 \.5 .*, and not `class cx .*`, nor these and 6 numbers of key"
    with pytest.raises(UserError, match=message):
        opened(f"yolo:{yolo}")


@pytest.mark.parametrize("shape", ["17", "[17]", "[17, 4]", "[0, 2]", "[a, 2]", "{0: 17}"])
def test_other_shapes_of_poses_are_explained(yolo, shape):
    with (yolo / "data.yaml").open("a") as file:
        file.write(f"kpt_shape: {shape}\n")
    with pytest.raises(UserError, match=r"data\.yaml: `kpt_shape` is .*: it must be \[number of"):
        opened(f"yolo:{yolo}")


def test_pixels_are_those_of_the_upright_picture(yolo):
    """A picture that is stored as 40 x 30 and shown as 30 x 40."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 30)).save(yolo / "images/train/b.jpg", exif=exif)
    expected: list[list[float]] = [[7.5, 16, 22.5, 24], [0, 0, 15, 40]]
    np.testing.assert_allclose(corners(opened(f"yolo:{yolo}"), 1), expected, rtol=1e-6)


@pytest.mark.parametrize("split", ["val", "validation", "valid"])
def test_roboflows_layout(yolo, split):
    write_yolo(yolo / "valid" / "images", yolo / "valid" / "labels", {"x": "1 .5 .5 1 1"})
    assert corners(opened(f"yolo:{yolo}", split)) == [[0, 0, 40, 30]]


def test_a_fifth_is_held_out_where_there_are_no_splits(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [cat]")
    lines = {f"{number}": "0 .5 .5 1 1" for number in range(10)}
    write_yolo(tmp_path / "images", tmp_path / "labels", lines)
    train, held_out = (opened(f"yolo:{tmp_path}", split) for split in ("train", "val"))
    assert (len(train), len(held_out)) == (8, 2)
    assert not overlap(train, held_out)
    (tmp_path / "labels" / "0.txt").write_text("0 .5 .5 0 1")
    made, left_out = notes(*(opened(f"yolo:{tmp_path}", split) for split in ("train", "val")))
    assert "has pictures and no splits: 8 of its 10 images" in made
    assert " is not trained on, such as " in left_out


def test_random_parts(yolo):
    parts = [opened(f"yolo:{yolo}", split) for split in ("train[:50%]", "train[50%:]")]
    assert [len(part) for part in parts] == [2, 2]
    assert not overlap(*parts)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data.yaml", "names:\n  0: cat\n  1: dog\n"),
        ("animals.yml", 'names: {"1": dog, "0": cat}'),
        ("classes.txt", "cat\ndog\n"),
    ],
)
def test_lists_of_classes(yolo, file, text):
    (yolo / "data.yaml").unlink()
    (yolo / "other.yaml").write_text("epochs: 3")
    (yolo / file).write_text(text)
    assert opened(f"yolo:{yolo}").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: cat", "must be a list of the classes"),
        ("names: {0: cat, 2: dog}", "keys of `names` must be 0, 1, 2"),
        ("names: [cat, cat]", "names 'cat' more than once"),
        ("names: [cat, ~]", "class 1 of `names` is None, which is no name"),
        ("names: {0: , 1: dog}", "class 0 of `names` is None, which is no name"),
        ("names: [yes, no]", "class 0 of `names` is True, which is no name: write it in quotes"),
        ("names: [cat, '']", "class 1 of `names` is '', which is no name"),
        ("names: [cat, {dog: 1}]", "class 1 of `names` is {'dog': 1}, which is no name"),
        ("names: [", "cannot read .*data.yaml as YAML"),
        ("!!python/object/apply:os.system ['true']", "cannot read .*data.yaml as YAML"),
        ("nc: 2", "no list of classes in"),
    ],
)
def test_wrong_lists_of_classes_are_explained(yolo, text, message):
    (yolo / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(f"yolo:{yolo}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 .5 .5 .1 .1", r"b\.txt: line 2 is of class 2, and there are classes 0 to 1"),
        ("-1 .5 .5 .1 .1", r"b\.txt: line 2 is of class -1"),
        ("0.5 .5 .5 .1 .1", r"b\.txt: line 2 is of class 0\.5"),
        ("0 .5 .5 .1", r"b\.txt: line 2 is '0 \.5 \.5 \.1', and not `class cx cy width height`"),
        ("0 .5 .5 .1 .1 .9", r"b\.txt: line 2 is"),
        ("0 .5 .5 .1 .1 .9 .8 .7", r"b\.txt: line 2 is"),  # not pairs
        ("cat .5 .5 .1 .1", r"b\.txt: line 2 is 'cat"),
        ("0 .5 .5 nan .1", r"b\.txt: line 2 is"),
    ],
)
def test_unreadable_lines_are_refused(yolo, line, message):
    (yolo / "labels/train/b.txt").write_text(f"0 .5 .5 1 1\n{line}\n")
    with pytest.raises(UserError, match=message):
        opened(f"yolo:{yolo}")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("0 .5 .5 0 .1", "its box is 0 x 0.1"),
        ("0 .5 .5 .1 -.1", "its box is 0.1 x -0.1"),
        ("0 -.2 .5 .1 .1", "its box (-0.25, 0.45, -0.15, 0.55) lies outside the picture of 1 x 1"),
    ],
)
def test_bad_objects_are_named_and_left_out(yolo, line, why):
    (yolo / "labels/train/b.txt").write_text(f"0 .5 .5 1 1\n{line}\n")
    source = opened(f"yolo:{yolo}")
    assert bad_objects(source) == (f"{yolo}/labels/train/b.txt: line 2: {why}",)
    assert (len(source[1].targets["boxes"]), len(source.boxes(1))) == (1, 2)


@pytest.mark.parametrize(
    ("line", "largest"),
    [
        ("0 20 15 10 10", "20"),
        ("0 30 20 60 40", "60"),  # at the upper left edge, where it overlaps the unit square
        ("0 0.5 0.5 1.4 0.5", "1.4"),
        ("0 .5 1.002 .1 .1", "1.002"),
        ("0 1 2 30 2 3 25", "30"),  # a polygon
    ],
)
def test_numbers_in_pixels_are_no_objects(yolo, line, largest):
    (yolo / "labels/train/b.txt").write_text(f"0 .5 .5 1 1.001\n{line}\n")  # rounded up
    source = opened(f"yolo:{yolo}")
    assert bad_objects(source) == (
        f"{yolo}/labels/train/b.txt: line 2: it has {largest}; its numbers must be shares of the "
        "picture, 0 to 1, and not pixels",
    )
    assert (len(source[1].targets["boxes"]), len(source.boxes(1))) == (1, 1)


def test_without_empty(yolo):
    source = opened(f"yolo:{yolo}").without_empty(32)  # the size is not known
    assert [source.image_id(i) for i in range(len(source))] == ["b", "d"]
    for name in "bd":
        (yolo / f"labels/train/{name}.txt").write_text("0 20 15 10 10")
    with pytest.raises(UserError, match=r"none of 4 pictures, .*b\.txt: line 1: it has 20"):
        opened(f"yolo:{yolo}").without_empty(32)


def test_labels_without_a_picture_are_faults(yolo):
    (yolo / "images/train/b.jpg").unlink()
    (yolo / "labels/train/classes.txt").write_text("cat\ndog\n")  # of a labelling program
    assert all_faults(f"yolo:{yolo}") == [
        f"{yolo}/labels/train/b.txt: there is no picture of this name"
    ]
    with pytest.raises(UserError, match="1 file of yolo"):
        opened(f"yolo:{yolo}")


def test_an_unreadable_picture_is_named(yolo):
    source = opened(f"yolo:{yolo}")
    (yolo / "images/train/b.jpg").write_bytes(b"none")
    for read in (source.__getitem__, source.boxes):
        with pytest.raises(UnreadableImage, match="cannot read the image: not an image file"):
            read(1)


def test_a_picture_of_too_many_pixels_is_named(yolo, monkeypatch):
    source = opened(f"yolo:{yolo}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 // 2 - 1)  # Pillow refuses twice as many
    for read in (source.__getitem__, source.boxes):
        with pytest.raises(UnreadableImage, match="cannot read the image: Image size"):
            read(1)


def test_an_example_is_read_from_its_file_once(yolo, monkeypatch):
    """A file that is replaced between two readings would give boxes of another picture."""
    source = opened(f"yolo:{yolo}")
    read = Image.open
    kinds = []

    def noted(file):
        kinds.append(type(file))
        return read(file)

    monkeypatch.setattr(Image, "open", noted)
    source[1]
    assert kinds == [io.BytesIO]


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("", "train", "needs a path"),
        ("/nowhere", "train", "no folder '/nowhere'"),
        ("{yolo}", "test", "no split 'test' in .*; known are 'train'"),
    ],
)
def test_wrong_folders_are_explained(yolo, path, split, message):
    with pytest.raises(UserError, match=message):
        opened("yolo:" + path.format(yolo=yolo), split)
