"""The commands of docs/imagenet.md, run on tar files of ImageNet's structure with tiny photos.

TFDS's own builder runs in .venv-tensorflow; what it wrote is read here, where TensorFlow is not.
"""

import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data import classes
from mbv2_jax.data.loader import train_batches
from mbv2_jax.data.sources import open_source
from mbv2_jax.data.transforms.pipeline import make_transform
from tests.support import REPOSITORY
from tests.support.coded import LabelCollator

# TFDS knows the CMYK files and the PNG file by their names.
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"
TRAIN = ["n01440764_10.JPEG", "n01440764_2.JPEG", CMYK, "n02105855_7.JPEG", PNG, "n15075141_1.JPEG"]
# The classes of the first four validation photos: 65, 970, 230 and 809 of the 1000.
VALIDATION = ["n01751748", "n09193705", "n02105855", "n04263257"]


def photo(name: str) -> bytes:
    """Returns the file of a small smooth picture, different for each name."""
    rng = np.random.default_rng(int(hashlib.md5(name.encode()).hexdigest(), 16))
    image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((64, 48))
    file = io.BytesIO()
    image.convert("CMYK" if name == CMYK else "RGB").save(file, "PNG" if name == PNG else "JPEG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(autouse=True)
def cache_of_indexes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Returns the three folders of the document, with the tar files in TARS."""
    root = tmp_path_factory.mktemp("imagenet")
    paths = {name: root / name.lower() for name in ("TARS", "DATA", "PHOTOS")}
    paths["TARS"].mkdir()
    with tarfile.open(paths["TARS"] / "ILSVRC2012_img_train.tar", "w") as outer:
        for wordnet_id in sorted({name.partition("_")[0] for name in TRAIN}):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name in TRAIN:
                    if name.startswith(wordnet_id):
                        add(tar, name, photo(name))
            add(outer, f"{wordnet_id}.tar", inner.getvalue())
    with tarfile.open(paths["TARS"] / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (3, 1, 4, 2):  # in any order
            add(tar, validation_name(number), photo(validation_name(number)))
    return {name: str(path) for name, path in paths.items()}


def validation_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


def run(part: str, folders: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs the document's only block of commands that contains `part`."""
    text = (REPOSITORY / "docs" / "imagenet.md").read_text()
    (block,) = [b for b in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if part in b]
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-e", "-c", block],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | folders | {"PATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def check_verified(process: subprocess.CompletedProcess) -> None:
    """Checks that every image is read, and only the number of examples is wrong."""
    result = json.loads(process.stdout.splitlines()[-1])
    assert process.returncode == 1
    train, validation = result["splits"]
    assert (train["examples"], train["decoded"], train["bad"]) == (6, 6, 0)
    assert (validation["examples"], validation["decoded"], validation["bad"]) == (4, 4, 0)
    assert (train["expected"], validation["expected"]) == (1_281_167, 50_000)


def test_folders(folders):
    for part in ("img_train.tar", "img_val.tar"):
        process = run(f'tar -xf "$TARS/ILSVRC2012_{part}', folders)
        assert process.returncode == 0, process.stderr
    train = open_source(f"folder:{folders['PHOTOS']}", "train")
    found = [
        (train.class_names[train[i].targets["label"]], train[i].image) for i in range(len(train))
    ]
    assert found == [(name.partition("_")[0], photo(name)) for name in sorted(TRAIN)]
    validation = open_source(f"folder:{folders['PHOTOS']}", "validation")
    names = {photo(validation_name(number)): number for number in range(1, 5)}
    for i in range(4):
        sample = validation[i]
        wordnet_id = validation.class_names[sample.targets["label"]]
        assert wordnet_id == VALIDATION[names[sample.image] - 1]
    process = run("--config.data.source=folder:", folders)
    # The classes of these photos are too few for ImageNet's; the photos themselves are read.
    assert '"decoded": 6' in process.stdout, process.stderr


def test_labels_of_validation_photos(check_data):
    """Returns TFDS's file of the labels, in the order of the photos' names."""
    import tensorflow_datasets as tfds

    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    labels = path.read_text().split()
    assert len(labels) == 50_000
    assert labels[:4] == VALIDATION
    for line in (check_data / "data/imagenet_val20/labels.txt").read_text().splitlines():
        name, index = line.split()
        number = int(name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG"))
        assert labels[number - 1] == classes.IMAGENET_WNIDS[int(index)]


@pytest.fixture(scope="module")
def prepared(folders):
    """Returns the document's folders: DATA holds ArrayRecord, TFRECORD the other format."""
    if not (REPOSITORY / ".venv-tensorflow" / "bin" / "tfds").exists():
        pytest.fail("no .venv-tensorflow here; make test-tensorflow makes it and runs this test")
    process = run("tfds build", folders)
    assert process.returncode == 0, process.stderr
    other = str(pathlib.Path(folders["DATA"]).with_name("tfrecord"))
    command = f".venv-tensorflow/bin/tfds build imagenet2012 --manual_dir={folders['TARS']}"
    process = subprocess.run(
        [*command.split(), f"--data_dir={other}", "--file_format=tfrecord"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.returncode == 0, process.stderr
    return folders | {"TFRECORD": other}


def examples(data_dir: str, split: str) -> list[tuple[str, bytes]]:
    """Returns (WordNet id, image file) of each example."""
    source = open_source("imagenet2012", split, data_dir)
    return [
        (source.class_names[source[i].targets["label"]], source[i].image)
        for i in range(len(source))
    ]


@pytest.mark.tensorflow
@pytest.mark.parametrize("form", ["DATA", "TFRECORD"])
def test_tfds_builder(prepared, form):
    train = examples(prepared[form], "train")
    assert len(train) == 6
    kept = {(name.partition("_")[0], photo(name)) for name in TRAIN if name not in (CMYK, PNG)}
    assert kept < set(train)
    for wordnet_id, encoded in set(train) - kept:
        image = Image.open(io.BytesIO(encoded))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        if wordnet_id == "n02105855":
            original = Image.open(io.BytesIO(photo(PNG)))
            # JPEG's loss at quality 100 on a smooth picture is a level or two; colours that
            # changed places would be tens of levels away.
            difference = np.asarray(image, float) - np.asarray(original, float)
            assert np.abs(difference).mean() < 3
    assert {wordnet_id for wordnet_id, _ in set(train) - kept} == {"n01739381", "n02105855"}
    expected = {(VALIDATION[i - 1], photo(validation_name(i))) for i in range(1, 5)}
    assert set(examples(prepared[form], "validation")) == expected
    assert len(open_source("imagenet2012", "train[2:]", prepared[form])) == 4


@pytest.mark.tensorflow
def test_tfds_is_verified(prepared):
    check_verified(run("--config.data.data_dir", prepared))
    check_verified(run("--config.data.data_dir", prepared | {"DATA": prepared["TFRECORD"]}))


@pytest.mark.tensorflow
def test_forms_of_the_same_data_give_the_same_batches(prepared):
    batches = []
    for form in ("DATA", "TFRECORD"):
        iterator = train_batches(
            open_source("imagenet2012", "train", prepared[form]),
            make_transform("random_resized_crop(size)|random_flip(0.5)", 32),
            LabelCollator(),
            batch_size=4,
            seed=3,
            start=0,
            stop=4,
            workers=0,
        )
        batches.append(list(iterator))
        iterator.close()
    assert len(batches[0]) == 4
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])


@pytest.mark.tensorflow
def test_convert_format(prepared, tmp_path):
    version = pathlib.Path("imagenet2012", "5.1.0")
    shutil.copytree(prepared["TFRECORD"] / version, tmp_path / version)
    process = run("tfds convert_format", prepared | {"DATA": str(tmp_path)})
    assert process.returncode == 0, process.stderr
    for file in (tmp_path / version).glob("*.tfrecord-*"):
        file.unlink()  # so that the new files are read
    for split in ("train", "validation"):
        assert examples(str(tmp_path), split) == examples(prepared["TFRECORD"], split)
