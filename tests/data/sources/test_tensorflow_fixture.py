"""A TFRecord dataset that TFDS wrote with TensorFlow is read without it.

fixtures/eleven_digits was made by fixtures/prepare_digits.py: eleven of scikit-learn's digits in
three files of 4, 3 and 4 records. test_imagenet_document.py makes datasets in the same way.
"""

import io
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mbv2_jax.data import digits
from mbv2_jax.data.sources import open_source

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Returns a copy of the dataset, with its own cache of indexes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(FIXTURES / "eleven_digits", tmp_path / "eleven_digits")
    return str(tmp_path)


def pixels(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image)


def test_images_and_labels_are_those_of_scikit_learn(data_dir):
    source = open_source("eleven_digits", "test", data_dir)
    assert len(source) == 11
    assert source.class_names == tuple("0123456789")
    images, labels = (part[:11] for part in digits.load()["test"])
    everything = load_digits()
    for i in range(11):
        assert source[i].targets["label"] == labels[i]
        np.testing.assert_array_equal(pixels(source[i].image), images[i])
        # scikit-learn's grey levels are 0..16.
        same = (everything.images == np.round(images[i] / (255 / 16))).all(axis=(1, 2))
        assert labels[i] in everything.target[same]


def test_a_part_of_the_split_crosses_files(data_dir):
    whole = open_source("eleven_digits", "test", data_dir)
    for expression, rows in [
        ("test[3:8]", range(3, 8)),
        ("test[:-2]", range(9)),
        ("test[10:]", [10]),
    ]:
        part = open_source("eleven_digits", expression, data_dir)
        for sample, row in zip(map(part.__getitem__, range(len(part))), rows, strict=True):
            assert sample.image == whole[row].image
            assert sample.targets == whole[row].targets


def test_tensorflow_is_not_imported(data_dir):
    script = (
        "import sys\n"
        "from mbv2_jax.data.sources import open_source\n"
        f"source = open_source('eleven_digits', 'test', {data_dir!r})\n"
        "print(source[10].targets['label'])\n"
        "sys.exit('tensorflow' in sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [str(digits.load()["test"][1][10])]
