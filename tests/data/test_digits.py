"""The digits against scikit-learn's own arrays, and the command that writes them."""

import io
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mbv2_jax.data import digits
from mbv2_jax.data.decoding import decode
from mbv2_jax.data.sources import open_source
from mbv2_jax.errors import UserError
from tests.support.boxed import opened


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("tfds"))


def test_both_splits_together_are_the_dataset(data_dir):
    """The splits hold each image of scikit-learn once, scaled from 0..16 to 0..255."""
    sklearn = load_digits()
    expected = sorted(
        (np.floor(image * 255 / 16 + 0.5).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(sklearn.images, sklearn.target, strict=True)
    )
    found = []
    for split, count in {"train": 1437, "test": 360}.items():
        source = open_source("digits", split, data_dir)
        assert len(source) == count
        assert source.class_names == tuple("0123456789")
        for i in range(count):
            pixels = np.asarray(Image.open(io.BytesIO(source[i].image)))
            found.append((pixels.tobytes(), source[i].targets["label"]))
    assert sorted(found) == expected


def test_each_class_is_held_out_alike(data_dir):
    source = open_source("digits", "test", data_dir)
    labels = [source[i].targets["label"] for i in range(len(source))]
    np.testing.assert_array_equal(np.bincount(labels), [36] * 10)
    assert labels != sorted(labels)


def test_a_full_disk_is_reported_and_the_next_try_succeeds(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write the digits dataset to .*File too large"):
            open_source("digits", "test", str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(open_source("digits", "test", str(tmp_path))) == 360


def test_command_writes_the_held_out_images(tmp_path, data_dir):
    command = [sys.executable, "-m", "mbv2_jax.data.digits", f"--export={tmp_path}", "--count=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote 12 digits" in done.stdout
    source = open_source("digits", "test", data_dir)
    assert len(list(tmp_path.iterdir())) == 12
    for i in range(12):
        (path,) = tmp_path.glob(f"digit_?_{i}.png")
        assert path.name == f"digit_{source[i].targets['label']}_{i}.png"
        # The files have the pixels of the evaluation.
        np.testing.assert_array_equal(
            np.asarray(decode(path.read_bytes())), np.asarray(decode(source[i].image))
        )


def test_command_writes_scenes_with_boxes(tmp_path, capsys):
    """They are read again as they were, training and test scenes apart."""
    assert digits.main([f"--export={tmp_path}", "--scenes=yolo", "--count=3"]) == 0
    assert "wrote 6 scenes" in capsys.readouterr().out
    for split, name in (("train", "train"), ("test", "val")):
        scenes, written = opened("digit_scenes", split), opened(f"yolo:{tmp_path}", name)
        assert len(written) == 3
        assert written.class_names == scenes.class_names
        for index in range(3):
            sample, other = scenes[index], written[index]
            assert other.image == sample.image
            boxes, others = sample.targets["boxes"], other.targets["boxes"]
            np.testing.assert_array_equal(others.corners, boxes.corners)  # 128 is a power of 2
            np.testing.assert_array_equal(others.labels, boxes.labels)
    assert digits.main([f"--export={tmp_path}", "--scenes=yolo", "--count=201"]) == 2


def test_command_writes_scenes_with_masks(tmp_path):
    assert digits.main([f"--export={tmp_path}", "--scenes", "--count=2"]) == 0
    scenes, written = open_source("digit_scenes", "test"), open_source(f"pairs:{tmp_path}", "test")
    assert written.class_names == scenes.class_names
    assert np.array_equal(scenes[1].targets["mask"], written[1].targets["mask"])


@pytest.mark.parametrize("count", ["0", "361"])
def test_command_refuses_a_count_that_there_is_not(tmp_path, capsys, count):
    assert digits.main([f"--export={tmp_path}", f"--count={count}"]) == 2
    assert f"--count={count} must be from 1 to 360" in capsys.readouterr().err


def test_command_refuses_a_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert digits.main([f"--export={tmp_path / 'taken'}"]) == 2
    assert "cannot write to --export=" in capsys.readouterr().err


def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"needs sklearn, .* pip install '\.\[demo\]'"):
        open_source("digits", "train", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_prepare_at_once(tmp_path):
    """Each of the runs prints the number of examples that it opened."""
    code = (
        "from mbv2_jax.data.sources import open_source;"
        f"print(len(open_source('digits', 'train', {str(tmp_path)!r})))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [run.communicate()[0] for run in runs] == ["1437\n"] * 3


def test_opening_needs_neither_tensorflow_nor_jax_and_keeps_stdout_clean(tmp_path):
    code = (
        "import sys; from mbv2_jax.data import sources, transforms, loader;"
        f"sources.open_source('digits', 'train', {str(tmp_path)!r})[0];"
        "print({'tensorflow', 'jax', 'grain'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert done.stderr.splitlines() == [
        f"preparing the digits dataset in {tmp_path}/digits/1.0.0 (once)"
    ]
