"""Pictures and objects in VOC's XML format."""

import numpy as np
import pytest

from mbv2_jax.data.classes import VOC_NAMES
from mbv2_jax.data.sources import bad_objects, open_source, overlap
from mbv2_jax.errors import UserError
from tests.support.boxed import all_faults, corners, opened, voc_object, write_voc

DOG = voc_object("dog", 1, 2, 11.7, 22, difficult=0)  # 40 x 30 pixels
PERSON = voc_object("person", 5, 5, 40, 30, difficult=1)


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    write_voc(root, "train", {"b": [DOG, PERSON], "a": [PERSON], "c": []})
    write_voc(root, "val", {"d": [DOG]})
    return root


def test_pictures_classes_and_objects(voc):
    """Coordinates are cut to whole numbers and less by 1, as mmdetection takes them."""
    source = opened(f"voc:{voc.parent.parent}")
    assert source.class_names == VOC_NAMES[1:]
    assert source.category_ids == tuple(range(1, 21))
    assert source.benchmark == "voc"
    assert [source.image_id(i) for i in range(3)] == ["b", "a", "c"]  # in the list's order
    boxes = source[0].targets["boxes"]
    assert boxes.corners.dtype == "float32"
    assert boxes.corners.tolist() == [[0, 1, 10, 21], [4, 4, 39, 29]]
    assert [source.class_names[label] for label in boxes.labels] == ["dog", "person"]
    assert boxes.difficult.tolist() == [False, True]
    assert boxes.area.tolist() == [200, 875]
    every = source.boxes(0)
    assert every.corners.dtype == "float64"
    assert np.array_equal(every.corners, boxes.corners)


def test_without_boxes_the_same_folder_has_masks(voc):
    with pytest.raises(UserError, match="no ImageSets/Segmentation"):
        open_source(f"voc:{voc}", "train")


def test_names_of_ones_own_are_those_of_all_splits(voc):
    write_voc(voc, "test", {"e": [voc_object("axolotl", 1, 2, 11, 22)]})
    for split in ("train", "val", "test"):
        assert opened(f"voc:{voc}", split).class_names == ("axolotl", "dog", "person")


def test_classes_txt_comes_first(voc):
    (voc / "classes.txt").write_text("person\ncow\ndog\n")
    source = opened(f"voc:{voc}")
    assert source.class_names == ("person", "cow", "dog")
    assert source.boxes(0).labels.tolist() == [2, 0]


def test_names_that_classes_txt_lacks_are_faults(voc):
    (voc / "classes.txt").write_text("person\nDog\n")
    (line,) = all_faults(f"voc:{voc}")
    assert line == f"{voc}/Annotations/b.xml: object 1 (dog): 'dog' is no class of classes.txt"
    with pytest.raises(UserError, match=r"1 file of voc:.* cannot be used: .*b\.xml: object 1"):
        opened(f"voc:{voc}")
    source = opened(f"voc:{voc}", with_faults=True)
    assert not bad_objects(source)
    assert len(source.boxes(0)) == len(source[0].targets["boxes"]) == 1


@pytest.mark.parametrize(
    ("bad", "why", "counts"),
    [
        (voc_object("dog", 5, 5, 5, 9), "its box is 0 x 4", True),
        (voc_object("dog", 5, 5, 4, 9), "its box is -1 x 4", True),
        (voc_object("dog", 41, 1, 50, 9), "outside the picture of 40 x 30", True),
        (voc_object("dog", 1, "x", 5, 9), "bndbox does not hold four numbers", False),
        (voc_object("dog", 1, "1e300", 5, 9), "bndbox does not hold four numbers", False),
        (voc_object("dog", 1, "inf", 5, 9), "bndbox does not hold four numbers", False),
        ("<object><name>dog</name></object>", "bndbox does not hold four numbers", False),
    ],
)
def test_bad_objects_are_named_and_left_out(voc, bad, why, counts):
    write_voc(voc, "train", {"b": [PERSON, bad]})
    source = opened(f"voc:{voc}")
    (line,) = bad_objects(source)
    assert line.startswith(f"{voc}/Annotations/b.xml: object 2 (dog): ")
    assert why in line
    assert len(source[0].targets["boxes"]) == 1
    assert len(source.boxes(0)) == 1 + counts


def test_without_empty(voc):
    """Difficult objects alone do not count; a size that the XML lacks passes."""
    source = opened(f"voc:{voc}").without_empty(30)
    assert [source.image_id(i) for i in range(len(source))] == ["b"]
    with pytest.raises(UserError, match="sides of 31 pixels or more"):
        opened(f"voc:{voc}").without_empty(31)
    (voc / "Annotations" / "b.xml").write_text(f"<annotation>{DOG}</annotation>")
    assert len(opened(f"voc:{voc}").without_empty(1000)) == 1


def test_random_parts(voc):
    parts = [opened(f"voc:{voc}", split) for split in ("train[:1]", "train[1:]")]
    assert [len(part) for part in parts] == [1, 2]
    assert not overlap(*parts)


def test_names_may_hold_dots_and_pictures_be_png(voc):
    write_voc(voc, "test", {"x_jpg.rf.01ab": [DOG]})
    picture = voc / "JPEGImages" / "x_jpg.rf.01ab.jpg"
    picture.rename(picture.with_suffix(".png"))
    source = opened(f"voc:{voc}", "test")
    assert source.describe(0).endswith("x_jpg.rf.01ab.png")
    assert corners(source) == [[0, 1, 10, 21]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "JPEGImages" / "a.jpg").unlink(), "JPEGImages/a.jpg is missing"),
        (lambda root: (root / "Annotations" / "a.xml").unlink(), "Annotations/a.xml is missing"),
        (
            lambda root: (root / "Annotations" / "a.xml").write_text("<annotation>"),
            "cannot read .*a.xml as XML",
        ),
        (
            lambda root: (root / "Annotations" / "a.xml").write_text(
                '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation>&e;'
                "</annotation>"
            ),
            "cannot read .*a.xml as XML: undefined entity",
        ),
    ],
)
def test_files_that_cannot_be_used_are_faults(voc, change, message):
    change(voc)
    (line,) = all_faults(f"voc:{voc}")
    with pytest.raises(UserError, match=message):
        opened(f"voc:{voc}")
    assert str(voc) in line


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("", "train", "needs a path"),
        ("{voc}", "trian", "did you mean 'train'"),
        ("{voc}/JPEGImages", "train", "no ImageSets/Main in"),
    ],
)
def test_wrong_folders_are_explained(voc, path, split, message):
    with pytest.raises(UserError, match=message):
        opened("voc:" + path.format(voc=voc), split)
