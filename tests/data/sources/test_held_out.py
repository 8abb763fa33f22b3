"""A folder that has classes and no splits: a fifth of each class is held out."""

import hashlib
import os
import pathlib
import pickle
import shutil
from collections import Counter

import pytest

from mbv2_jax.data.sources import held_out, notes, open_source, overlap
from mbv2_jax.errors import UserError

# Files of each class, and how many of them are held out: a fifth, rounded, and at least one.
SIZES = {"ant": (40, 8), "bee": (8, 2), "cat": (7, 1), "dog": (3, 1), "eel": (2, 1), "fox": (1, 0)}


def write(folder: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def animals(tmp_path) -> pathlib.Path:
    names = (f"{name}/{i}.jpg" for name, (size, _) in SIZES.items() for i in range(size))
    return write(tmp_path / "animals", *names)


def files(folder: pathlib.Path, split: str) -> list[str]:
    """Returns the files of a split, relative to the folder, and reads them."""
    source = open_source(f"folder:{folder}", split)
    names = [os.path.relpath(source.describe(i), folder) for i in range(len(source))]
    classes = [source.class_names[source[i].targets["label"]] for i in range(len(source))]
    assert classes == [name.split("/")[0] for name in names]
    assert [source[i].image.decode() for i in range(len(source))] == names
    return names


def test_each_class_is_split_and_no_file_is_lost(animals):
    train, val, everything = (files(animals, name) for name in ("train", "val", "all"))
    assert sorted(train + val) == everything
    assert len(everything) == sum(size for size, _ in SIZES.values())
    counted = Counter(name.split("/")[0] for name in val)
    assert counted == {name: count for name, (_, count) in SIZES.items() if count}
    # The order is that of the folder, as in every split.
    assert val == [name for name in everything if name in val]
    # By another program: the first of each class by SHA-256.
    ants = sorted((n for n in everything if n[:3] == "ant"), key=lambda n: _sha256(n))
    assert sorted(ants[:8]) == [name for name in val if name[:3] == "ant"]


def _sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def test_both_sides_have_the_classes_of_the_folder_and_share_no_image(animals):
    train, val, everything = (
        open_source(f"folder:{animals}", name) for name in ("train", "val", "all")
    )
    assert train.class_names == val.class_names == tuple(SIZES)
    assert not overlap(train, val)
    assert overlap(train, everything) and overlap(everything, val)
    copy = pickle.loads(pickle.dumps(val))  # as workers get it
    assert [copy[i] for i in range(len(copy))] == [val[i] for i in range(len(val))]


def test_the_split_does_not_depend_on_place_order_or_name(animals, tmp_path):
    shutil.copytree(animals, tmp_path / "elsewhere" / "copy")
    assert files(tmp_path / "elsewhere" / "copy", "val") == files(animals, "val")
    for name in ("valid", "validation", "test", "eval"):
        assert files(animals, name) == files(animals, "val")
    listing = [(f"{name}/{i}.jpg", name) for name, (size, _) in SIZES.items() for i in range(size)]
    chosen = []
    for order in (listing, listing[::-1]):
        numbers, count = held_out.order([(path, ord(label[0])) for path, label in order])
        chosen.append([order[number] for number in numbers[:count]])
    assert chosen[0] == chosen[1]


def test_new_files_move_few_of_the_others(animals):
    before = set(files(animals, "val"))
    write(animals, *(f"ant/new{i}.jpg" for i in range(10)))
    after = set(files(animals, "val"))
    assert sum(name.startswith("ant/") for name in after) == 10  # of 50
    assert {name[:3] for name in before - after} <= {"ant"}
    # One new file at most takes the place of one that was there.
    write(animals, "ant/one.jpg")
    assert len(after - set(files(animals, "val"))) <= 1


def test_parts_are_parts_of_their_side(animals):
    train = files(animals, "train")
    half, rest = files(animals, "train[:50%]"), files(animals, "train[50%:]")
    assert sorted(half + rest) == sorted(train)
    assert abs(len(half) - len(train) / 2) < 1
    assert len({name.split("/")[0] for name in half}) > 1  # random, not the first classes
    opened = [open_source(f"folder:{animals}", name) for name in ("train[:50%]", "val", "val[:3]")]
    assert not overlap(opened[0], opened[1])
    assert overlap(opened[1], opened[2]) and len(opened[2]) == 3


def test_the_user_is_told_once(animals):
    train, val = (open_source(f"folder:{animals}", name) for name in ("train", "val"))
    (note,) = notes(train, val)
    assert note.startswith(f"{animals} has classes and no splits: 48 of its 61 images are for")
    assert "13, a fifth of each class, are held out" in note and "\n" not in note
    assert "eval_split=all" in note
    assert notes(open_source(f"folder:{animals}", "all")) == []


@pytest.mark.parametrize("name", ["val", "Validation", "train", "test"])
def test_a_folder_with_the_name_of_a_split_is_that_split(animals, name):
    folder = animals.rename(animals.parent / name)
    for split in ("train", "val", "test"):
        source = open_source(f"folder:{folder}/", split)
        assert len(source) == 61 and notes(source) == []


def fails(folder: pathlib.Path, split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        open_source(f"folder:{folder}", split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_split_is_explained(animals, tmp_path):
    assert "'train', 'val' and 'all' are made of it" in fails(animals, "holdout")
    assert "'train', 'val' and 'all' are made of it" in fails(animals, "holdout[:9]")
    assert "cannot take 'train[:90]'" in fails(animals, "train[:90]")
    single = write(tmp_path / "single", "a/1.jpg", "b/1.jpg")
    assert "nothing can be held out" in fails(single, "val")
    assert files(single, "train") == files(single, "all") == ["a/1.jpg", "b/1.jpg"]
    flat = write(tmp_path / "flat", "1.jpg", "2.jpg")
    assert f"images belong in {flat}/CLASS/, or in {flat}/train/CLASS/" in fails(flat)


def test_classes_beside_a_split_are_not_mixed_with_it(animals):
    write(animals, "test/ant/1.jpg")
    assert "known are 'test'. If 'ant' is a class, it belongs in" in fails(animals, "train")
    assert len(open_source(f"folder:{animals}", "test")) == 1


def test_hidden_folders_and_other_files_are_no_part_of_it(animals):
    before = files(animals, "all")
    write(animals, ".cache/1.jpg", "notes.txt", "top.jpg", "ant/notes.txt")
    assert files(animals, "all") == before


def test_folders_below_a_class_belong_to_it(animals):
    write(animals, *(f"gnu/{year}/{i}.jpg" for year in (2023, 2024) for i in range(5)), "gnu/1.jpg")
    assert sum(name.startswith("gnu/") for name in files(animals, "val")) == 2  # of 11
