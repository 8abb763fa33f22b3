"""Pictures and objects in COCO's format."""

import json

import pytest

from mbv2_jax.data.sources import bad_objects, notes, overlap
from mbv2_jax.errors import UserError
from tests.support.boxed import all_faults, annotation, opened, write_coco

IMAGES = {7: "b.jpg", 3: "a.jpg", 5: "c.jpg"}
CATEGORIES = {18: "dog", 1: "person"}  # not in the order of the ids, and with gaps
ANNOTATIONS = [
    annotation(1, 3, 18, 1, 2, 10.5, 20),
    annotation(2, 7, 1, 0, 0, 4, 5, iscrowd=1, area=17.5),
    annotation(3, 3, 1, 30, 20, 20, 20),  # reaches beyond the picture
]


@pytest.fixture
def coco(tmp_path):
    file = tmp_path / "annotations" / "instances_train2017.json"
    write_coco(file, tmp_path / "train2017", IMAGES, ANNOTATIONS, CATEGORIES)
    return tmp_path


def rewrite(coco, change) -> None:
    """Changes the annotation file."""
    file = coco / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_pictures_classes_and_objects(coco):
    source = opened(f"coco:{coco}")
    assert source.class_names == ("person", "dog")  # by their ids
    assert source.category_ids == (1, 18)
    assert source.benchmark == "coco"
    assert [source.image_id(i) for i in range(3)] == [7, 3, 5]  # in the file's order
    assert source.describe(1) == str(coco / "train2017" / "a.jpg")
    sample = source[1]
    assert sample.image == (coco / "train2017" / "a.jpg").read_bytes()
    boxes = sample.targets["boxes"]
    assert boxes.corners.dtype == boxes.area.dtype == "float32"
    assert boxes.corners.tolist() == [[1, 2, 11.5, 22], [30, 20, 50, 40]]
    assert boxes.labels.tolist() == [1, 0]
    assert boxes.area.tolist() == [210, 400]
    assert not boxes.crowd.any() and not boxes.difficult.any()
    crowd = source.boxes(0)
    assert crowd.corners.dtype == crowd.area.dtype == "float64"
    assert (crowd.crowd.tolist(), crowd.area.tolist()) == ([True], [17.5])
    assert len(source[2].targets["boxes"]) == 0


@pytest.mark.parametrize("split", ["train", "train2017"])
def test_train_is_cocos_train2017(coco, split):
    assert len(opened(f"coco:{coco}", split)) == 3


@pytest.mark.parametrize("split", ["val", "validation", "valid"])
def test_roboflows_layout(tmp_path, split):
    """Its first category is the group of all classes, here with the name of the only class."""
    folder = tmp_path / "valid"
    categories = {0: "cells", 1: "cells"}
    write_coco(
        folder / "_annotations.coco.json",
        folder,
        {0: "x.jpg"},
        [annotation(0, 0, 1, 1, 1, 5, 5)],
        categories,
    )
    source = opened(f"coco:{tmp_path}", split)
    assert (source.class_names, source.category_ids) == (("cells",), (1,))
    assert source[0].targets["boxes"].labels.tolist() == [0]


def test_a_group_with_a_name_of_its_own_is_a_class_without_objects(tmp_path):
    folder = tmp_path / "train"
    file = folder / "_annotations.coco.json"
    found = [annotation(0, 0, 1, 1, 1, 5, 5)]
    write_coco(file, folder, {0: "x.jpg"}, found, {0: "cells", 1: "red"})
    source = opened(f"coco:{tmp_path}")
    assert source.class_names == ("cells", "red")
    assert source[0].targets["boxes"].labels.tolist() == [1]


@pytest.mark.parametrize("folder", ["images/val2017", "images"])
def test_pictures_may_lie_in_images(tmp_path, folder):
    file = tmp_path / "annotations" / "instances_val2017.json"
    write_coco(file, tmp_path / folder, IMAGES, ANNOTATIONS, CATEGORIES)
    assert len(opened(f"coco:{tmp_path}", "val")) == 3


# What is wrong with an annotation, and what is said about it; pictures have 40 x 30 pixels.
BAD = [
    (annotation(9, 5, 1, 40, 0, 5, 5), "outside the picture of 40 x 30"),
    (annotation(9, 5, 1, 0, -6, 5, 5), "outside the picture of 40 x 30"),
    (annotation(9, 5, 1, 5, 5, 0, 5), "its box is 0 x 5"),
    (annotation(9, 5, 1, 5, 5, 3, -5), "its box is 3 x -5"),
    (annotation(9, 5, 1, 5, 5, 0.5, 5), "a side below 1"),
    (annotation(9, 5, 1, 5, 5, 5, 5, area=0), "its area is 0"),
]
UNUSABLE = [
    (annotation(9, 5, 4, 5, 5, 5, 5), "no category 4"),
    (annotation(9, 5, 1, 5, 5, 5, float("nan")), "not four numbers"),
    (annotation(9, 5, 1, 5, 5, 5, 5) | {"bbox": [1, 2, 3]}, "not four numbers"),
    (annotation(9, 5, 1, 5, 5, 5, 5) | {"bbox": None}, "not four numbers"),
    (annotation(9, 5, 1, 5, 5, 5, 1e308), "not four numbers"),
    (annotation(9, 5, 1, 5, 5, 10**400, 5), "not four numbers"),
    (annotation(9, 5, 1, 5, 5, 5, 5, area="7"), "its area is '7'"),
]


@pytest.mark.parametrize(("bad", "why"), BAD + UNUSABLE)
def test_bad_objects_are_named_and_left_out(coco, bad, why):
    rewrite(coco, lambda content: content["annotations"].append(bad))
    source = opened(f"coco:{coco}")
    (line,) = bad_objects(source)
    assert "instances_train2017.json: annotation 9 of c.jpg: " in line
    assert why in line
    assert len(source[2].targets["boxes"]) == 0
    # Evaluation counts whatever has a class and a box, as pycocotools does.
    assert len(source.boxes(2)) == ((bad, why) in BAD)


def test_bad_objects_are_counted_in_one_note(coco):
    bad = [each for each, _ in BAD + UNUSABLE]
    rewrite(coco, lambda content: content["annotations"].extend(bad))
    (note,) = notes(opened(f"coco:{coco}"), opened(f"coco:{coco}").without_empty(1))
    assert note == (
        f"13 of 16 objects of train are not trained on, such as {coco}/annotations/"
        "instances_train2017.json: annotation 9 of c.jpg: its box (40, 0, 45, 5) lies outside the "
        "picture of 40 x 30 (python -m mbv2_jax.data verify names all)"
    )


def test_objects_to_ignore_are_not_trained_on(coco):
    rewrite(coco, lambda content: content["annotations"][0].update(ignore=1))
    source = opened(f"coco:{coco}")
    assert (len(source[1].targets["boxes"]), len(source.boxes(1))) == (1, 2)
    assert not bad_objects(source)


def test_without_empty(coco):
    """The first picture has only a crowd, and the last one nothing."""
    source = opened(f"coco:{coco}")
    kept = source.without_empty(30)
    assert [kept.image_id(i) for i in range(len(kept))] == [3]
    assert kept[0].id == source[1].id
    assert kept.boxes(0).labels.tolist() == [1, 0]
    assert len(source) == 3
    with pytest.raises(UserError, match=r"none of 3 pictures, .* sides of 31 pixels"):
        source.without_empty(31)


def test_random_parts(coco):
    parts = [opened(f"coco:{coco}", split) for split in ("train[:1]", "train[1:]")]
    ids = [[part.image_id(i) for i in range(len(part))] for part in parts]
    assert sorted(ids[0] + ids[1]) == [3, 5, 7]
    assert not overlap(*parts)
    assert overlap(parts[0], opened(f"coco:{coco}"))
    assert not notes(*parts)


def test_missing_pictures_are_faults(coco):
    (coco / "train2017" / "b.jpg").unlink()
    assert all_faults(f"coco:{coco}") == [f"{coco}/train2017/b.jpg is missing"]
    with pytest.raises(UserError, match=r"1 file of coco:.* cannot be used: .*b\.jpg is missing"):
        opened(f"coco:{coco}")


def test_annotations_of_unknown_pictures_are_faults(coco):
    rewrite(coco, lambda c: c["annotations"].append(annotation(9, 44, 1, 1, 1, 5, 5)))
    (line,) = all_faults(f"coco:{coco}")
    assert line.endswith("annotation 9 is of image 44, which it does not list")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "has no list 'annotations'"),
        (lambda c: c.update(images={}), "has no list 'images'"),
        (lambda c: c.update(images=[]), "lists no images"),
        (lambda c: c["images"][1].pop("file_name"), "'file_name' of entry 1 of 'images' is missi"),
        (lambda c: c["images"][1].update(width="4"), "'width' of entry 1 of 'images' is '4'"),
        (lambda c: c["images"][1].update(width=float("inf")), "'width' of entry 1 of 'images' is"),
        (
            lambda c: c["images"][1].update(width=10**30),
            "'width' of entry 1 of 'images' is 1000000",
        ),
        (lambda c: c["images"][1].update(height=-5), "'height' of entry 1 of 'images' is -5"),
        (lambda c: c["images"][1].update(height=True), "'height' of entry 1 of 'images' is True"),
        (lambda c: c["images"][1].update(id=True), "'id' of entry 1 of 'images' is True"),
        (lambda c: c["images"][1].update(id=7), "images has the id 7 more than once"),
        (lambda c: c["annotations"].append(5), "entry 3 of 'annotations' is no object"),
        (lambda c: c["annotations"][0].pop("image_id"), "'image_id' of entry 0 of 'annotations'"),
        (lambda c: c["categories"][0].update(name="person"), "categories 1; 18 are named 'person'"),
    ],
)
def test_other_json_is_refused(coco, change, message):
    rewrite(coco, change)
    with pytest.raises(UserError, match=message):
        opened(f"coco:{coco}")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff"])
def test_other_files_are_refused(coco, text):
    file = coco / "annotations" / "instances_train2017.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"instances_train2017\.json"):
        opened(f"coco:{coco}")


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("", "train", "needs a path"),
        ("/nowhere", "train", "no folder '/nowhere'"),
        ("{coco}", "vall", "no split 'vall' in .*; did you mean|known are 'train2017'"),
        ("{coco}/train2017", "train", "no annotations/instances_train.json and no train/_annota"),
    ],
)
def test_wrong_folders_are_explained(coco, path, split, message):
    with pytest.raises(UserError, match=message):
        opened("coco:" + path.format(coco=coco), split)
