"""Folders, TFDS datasets, and wrong names."""

import dataclasses
import hashlib
import shutil

import pytest

from mbv2_jax.data import sources
from mbv2_jax.data.sources import identity, open_source
from mbv2_jax.errors import UserError
from tests.support.flowers import write, write_flowers


@pytest.fixture
def flowers(tmp_path):
    return write_flowers(tmp_path)


def test_the_identity_of_a_split_is_its_size_its_classes_and_its_ends(flowers):
    source = open_source(f"folder:{flowers}", "train")
    assert identity(source, "training") == {
        "training examples": 9,
        "SHA-256 of training classes": hashlib.sha256(b"Iris\nrose\ntulip").hexdigest(),
        "first and last of training": ["10.jpg", "b.jpg"],
    }


def test_another_kind_of_source_is_an_entry_of_the_table(monkeypatch, data_dir):
    opened = []
    monkeypatch.setitem(sources._PREFIXES, "pairs", lambda *where: opened.append(where))
    open_source("pairs:/data:1", "val")
    assert opened == [("/data:1", "val")]
    assert "'folder:PATH', 'pairs:PATH'" in fails("mine", data_dir=data_dir)


def test_a_split_may_be_given_directly(flowers):
    source = open_source(f"folder:{flowers / 'val'}", "val")
    assert source.class_names == ("Iris", "rose", "tulip")
    assert [source[i].targets["label"] for i in range(len(source))] == [0, 1, 2]


def test_hidden_folders_are_no_classes(flowers):
    (flowers / "val" / ".thumbnails").mkdir()
    assert open_source(f"folder:{flowers}", "val").class_names == ("Iris", "rose", "tulip")


def test_home_is_expanded(flowers, monkeypatch):
    monkeypatch.setenv("HOME", str(flowers.parent))
    assert len(open_source(f"folder:~/{flowers.name}", "val")) == 3


def test_a_file_that_vanished_is_reported(flowers):
    source = open_source(f"folder:{flowers}", "val")
    (flowers / "val" / "rose" / "1.jpg").unlink()
    with pytest.raises(UserError, match="cannot read the image: No such file"):
        source[1]


def fails(name: str, split: str = "train", data_dir=None) -> str:
    with pytest.raises(UserError) as error:
        open_source(name, split, str(data_dir) if data_dir else None)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_wrong_folders_are_explained(flowers, tmp_path):
    assert "no folder '/nowhere'" in fails("folder:/nowhere")
    assert "needs a path" in fails("folder:")
    assert f"write 'folder:{flowers}'" in fails(str(flowers))
    assert "did you mean 'val'?" in fails(f"folder:{flowers}", "vall")
    assert open_source(f"folder:{flowers}", "valid").describe(0).startswith(f"{flowers}/val/")
    assert "known are 'train', 'val'" in fails(f"folder:{flowers}", "holdout")


def test_splits_are_never_taken_for_classes(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "test/cat/1.jpg")
    assert "no split 'val'" in fails(f"folder:{tmp_path}", "val")
    # Under any name: these folders hold class folders, and no images.
    write(tmp_path / "folds", "fold1/cat/1.jpg", "fold2/cat/1.jpg")
    assert "known are 'fold1', 'fold2'" in fails(f"folder:{tmp_path / 'folds'}")
    # Nor if the split's folder holds no class folders.
    write(tmp_path / "other", "train/1.jpg", "val/1.jpg")
    assert "no class folders in" in fails(f"folder:{tmp_path / 'other'}", "val")
    assert "no split 'test'" in fails(f"folder:{tmp_path / 'other'}", "test")


def test_folders_without_images_are_explained(tmp_path):
    write(tmp_path, "flat/1.jpg", "train/cat/1.jpg")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "none" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    assert "images belong in" in fails(f"folder:{tmp_path / 'flat'}")
    assert "images belong in" in fails(f"folder:{tmp_path / 'bare'}")
    assert f"no images in {tmp_path}/train/dog;" in fails(f"folder:{tmp_path}")
    assert "no images in the folders of" in fails(f"folder:{tmp_path / 'none'}")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Returns a folder of the prepared digits, and of copies with other names and formats."""
    path = tmp_path_factory.mktemp("tfds")
    open_source("digits", "train", str(path))
    for name, old, new in [
        ("letters", "digits", "letters"),
        ("stored", "array_record", "riegeli"),
        ("unlabelled", '"label"', '"writer"'),
    ]:
        copy = path / name / "1.0.0"
        shutil.copytree(path / "digits" / "1.0.0", copy)
        for file in copy.glob("digits-*"):
            file.rename(copy / file.name.replace("digits", name))
        for file in copy.glob("*.json"):
            text = file.read_text().replace('"digits"', f'"{name}"')
            file.write_text(text.replace(old, new))
    return path


def test_tfds_datasets_are_opened_from_their_files(data_dir):
    """The code of a user's own builder is not needed."""
    letters, digits = (open_source(name, "test", str(data_dir)) for name in ("letters", "digits"))
    assert len(letters) == 360
    assert letters[7] == dataclasses.replace(digits[7], id=letters.describe(7))
    assert letters.describe(7) == (
        "record 7 of letters[test] (number 7 in letters-test.array_record-00000-of-00001)"
    )


def test_tfds_split_expressions_work(data_dir):
    assert len(open_source("digits", "train[:10%]", str(data_dir))) == 144
    both = open_source("digits", "test+train[:5]", str(data_dir))
    assert len(both) == 365
    assert both[360].image == open_source("digits", "train", str(data_dir))[0].image
    assert both.describe(362) == (
        "record 362 of digits[test+train[:5]] (number 2 in"
        " digits-train.array_record-00000-of-00001)"
    )
    assert len(open_source("digits", "all", str(data_dir))) == 1797


def test_parts_that_hold_an_example_twice_are_refused(data_dir, tmp_path):
    """Evaluation counts each example once."""
    twice = r"overlap: some examples would count twice"
    assert twice in fails("digits", "test+test[:10%]", data_dir)
    assert twice in fails("digits", "train[:60%]+train[40%:]", data_dir)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(10):
        (tmp_path / "train" / "a" / f"{number}.jpg").touch()
    assert twice in fails(f"folder:{tmp_path}", "train[:60%]+train[40%:]")


def test_wrong_tfds_datasets_are_explained(data_dir):
    assert "did you mean 'digits'?" in fails("digist", data_dir=data_dir)
    assert "did you mean 'imagenet2012'?" in fails("imagenet_2012", data_dir=data_dir)
    assert "'cifar10', 'imagenet2012', 'digit_scenes', 'folder:PATH'" in fails(
        "mine", data_dir=data_dir
    )
    assert "cannot open dataset 'a/b/c'" in fails("a/b/c", data_dir=data_dir)
    assert "cannot open dataset ''" in fails("", data_dir=data_dir)
    assert "did you mean 'test'?" in fails("digits", "tset", data_dir)
    assert "no split 'tarin[:9]' in dataset 'digits'; did you mean 'train'?" in fails(
        "digits", "tarin[:9]", data_dir
    )
    for expression in (
        "train[:x%]",
        "train[:2000]",
        "train[:101%]",
        "all[:5]",
        "train[5",
        "train[",
    ):
        message = fails("digits", expression, data_dir)
        assert f"cannot take {expression!r} of dataset 'digits' (" in message
        assert "train has 1437" in message
    for expression in ("train[:0]", "train[9:3]"):
        assert f"split {expression!r} of dataset 'digits' is empty" in fails(
            "digits", expression, data_dir
        )
    assert "and no 'image' with a 'label'" in fails("unlabelled", data_dir=data_dir)


def test_a_tfds_dataset_that_is_not_prepared_names_the_command(data_dir):
    assert f"tfds build cifar10 --file_format=array_record --data_dir={data_dir}" in fails(
        "cifar10", data_dir=data_dir
    )
    # Its code is not imported, which would need TensorFlow.
    assert "tfds build coco/2017 --file_format=array_record" in fails(
        "coco/2017", data_dir=data_dir
    )


def test_a_tfds_dataset_in_another_form_names_the_command(data_dir):
    message = fails("stored", data_dir=data_dir)
    assert "is prepared as riegeli" in message
    assert (
        f"tfds convert_format --dataset_version_dir={data_dir}/stored/1.0.0"
        " --out_file_format=array_record"
    ) in message


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write the digits dataset to" in fails("digits", data_dir=tmp_path / "file")


def test_record_files_that_are_damaged_or_missing_are_reported(data_dir, tmp_path):
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    (file,) = (tmp_path / "digits" / "1.0.0").glob("*-test.*")
    content = bytearray(file.read_bytes())
    content[3000] ^= 255
    for damaged in (content, content[:100_000], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        source = open_source("digits", "test", str(tmp_path))
        with pytest.raises(UserError, match="cannot read the record: "):
            [source[i] for i in range(len(source))]
