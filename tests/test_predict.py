"""python -m mbv2_jax.predict: tables, JSON lines, annotated pictures, and refusals."""

import json
import os
import pathlib
import pty
import subprocess
import sys
import termios

import numpy as np
import pytest
from PIL import Image

import mbv2_jax
from mbv2_jax.inference import Predictor
from tests.support import REPOSITORY, commands, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a model, three images, a folder of two more, and two files of other kinds."""
    names = ["0.png", "1.png", "2.png", "more/1.png", "more/three.jpeg"]
    return tiny_model.write_images(tmp_path_factory.mktemp("prediction"), names)


@pytest.fixture(scope="module")
def predictor(folder) -> Predictor:
    return mbv2_jax.init_model(folder / "model")


@pytest.fixture(scope="module")
def predict(folder, cache):
    """Returns the function that runs `python -m mbv2_jax.predict` in the folder of images."""
    environment = commands.environment(cache)
    environment["PYTHONPATH"] = str(REPOSITORY)

    def run(*arguments: str | bytes, text: bool = True, stderr: int = subprocess.PIPE):
        return subprocess.run(
            [sys.executable, "-m", "mbv2_jax.predict", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=text,
            timeout=120,
        )

    return run


def best_classes(predictor: Predictor, image: pathlib.Path, count: int) -> list[tuple[int, float]]:
    """Returns the labels and scores, in percent, of the `count` best classes."""
    scores = mbv2_jax.inference_model(predictor, image)["pred_scores"]
    return [(i, 100 * scores[i]) for i in sorted(range(6), key=lambda i: -scores[i])[:count]]


def test_table_has_a_row_for_each_class(predict, predictor, folder):
    done = predict("0.png", "more", "--checkpoint=model", "--topk=3", "--batch-size=2")
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["image", "rank", "score", "label", "class"]
    images = ["0.png", "more/1.png", "more/three.jpeg"]
    assert [line.split()[0] for line in lines[::3]] == images
    for i, line in enumerate(lines):
        rank, score, label, name = line.split()[-4:]
        expected, percent = best_classes(predictor, folder / images[i // 3], 3)[i % 3]
        assert int(rank) == i % 3 + 1
        assert int(label) == expected
        assert name == tiny_model.CLASSES[expected]
        # Printed with two decimals of a percent; the other process may round the last float32 bits.
        assert abs(float(score.rstrip("%")) - percent) < 0.006
    # The columns are aligned: the class begins where its heading begins, a score ends where its
    # heading ends.
    assert {line.rindex(" ") + 1 for line in lines} == {header.index("class")}
    assert {line.index("%") for line in lines} == {header.index("score") + 4}


def test_bad_files_are_reported_and_the_others_predicted(predict, predictor, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    images = ["0.png", "missing.png", "text.png", empty, "2.png", "half.png"]
    done = predict(*images, "--checkpoint=model", "--topk=2", "--json", "--batch-size=2")
    assert done.returncode == 2
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in found] == ["0.png", "2.png"]
    for line in found:
        expected = best_classes(predictor, folder / line["image"], 2)
        entries = line["predictions"]
        assert [entry["label"] for entry in entries] == [label for label, _ in expected]
        assert [entry["class"] for entry in entries] == [
            tiny_model.CLASSES[label] for label, _ in expected
        ]
        # The same float32 network, compiled for one device instead of four.
        np.testing.assert_allclose(
            [100 * entry["score"] for entry in entries], [percent for _, percent in expected], 1e-4
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith(f"error: no image files in {empty}")
    assert errors[1] == "error: missing.png: No such file or directory"
    assert errors[2].startswith("error: text.png: cannot decode")
    assert errors[3].startswith("error: half.png: cannot decode")
    assert errors[4:] == ["error: 4 of 6 images could not be predicted"]
    assert "Traceback" not in done.stderr


def test_all_classes_are_named_where_there_are_fewer_than_topk(predict):
    done = predict("0.png", "--checkpoint=model", "--topk=100", "--json")
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)["predictions"]
    assert sorted(entry["label"] for entry in predictions) == list(range(6))


def test_annotated_pictures_overwrite_nothing(predict, folder, tmp_path):
    show = tmp_path / "new" / "shown"
    done = predict("1.png", "more", "half.png", "--checkpoint=model", f"--show-dir={show}")
    assert done.returncode == 2
    assert {file.name for file in show.iterdir()} == {"1.png", "1-2.png", "three.jpeg"}
    # The photo, 70 x 50 enlarged three times, is above the predictions.
    with Image.open(show / "1-2.png") as picture:
        left = (picture.width - 210) // 2
        shown = picture.crop((left, 0, left + 210, 150))
        assert picture.height > 250
    expected = tiny_model.photo(3).resize((210, 150), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))

    before = {file: file.read_bytes() for file in folder.glob("*.png")}
    done = predict("0.png", "--checkpoint=model", "--show-dir=.")
    assert done.returncode == 0, done.stderr
    assert {file: file.read_bytes() for file in before} == before
    (folder / "0-2.png").unlink()  # written here; the other tests do not expect it


def test_a_file_name_that_is_no_text_comes_out_as_it_came_in(predict, folder, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(name, "wb") as file:
        file.write((folder / "0.png").read_bytes())
    done = predict(name, "--checkpoint=model", "--topk=1", text=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith(name)


def test_bar_is_for_a_terminal_and_not_in_the_table(predict):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(ours, False)
    done = predict("more", "--checkpoint=model", "--json", "--batch-size=1", stderr=theirs)
    shown = os.read(ours, 10000).decode()
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, shown
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == [
        "more/1.png",
        "more/three.jpeg",
    ]
    assert "2/2" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["0.png", "--checkpoint=nothing"], "error: 'nothing' is not a file"),
        (["0.png", "--checkpoint=model", "--topk=0"], "--topk=0: give 1 or more"),
        (["0.png", "--checkpoint=model", "--topk=two"], "'two'"),
        (["0.png", "--checkpoint=model", "--batch-size=0"], "--batch-size=0: give 1 or more"),
        (["0.png"], "--checkpoint"),
        (["--checkpoint=model"], "IMAGE"),
        (
            ["more", "--checkpoint=model", "--show-dir=more/shown"],
            "error: --show-dir=more/shown lies in more: give a folder elsewhere",
        ),
        (
            ["0.png", "--checkpoint=model", "--show-dir=text.png"],
            "error: cannot make the folder --show-dir=text.png: File exists",
        ),
    ],
    ids=[
        *("no model", "topk 0", "topk no number", "batch size 0", "no checkpoint", "no image"),
        *("show-dir among images", "show-dir a file"),
    ],
)
def test_refuses_what_it_cannot_do(predict, arguments, named):
    done = predict(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_help_teaches_without_jax():
    program = (
        "import runpy, sys\n"
        "sys.argv = ['predict', '--help']\n"
        "try:\n"
        "    runpy.run_module('mbv2_jax.predict', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "else:\n"
        "    raise AssertionError('it went on')\n"
        "assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "python -m mbv2_jax.predict cat.jpg dog.png --checkpoint=mmpretrain" in done.stdout
    for known in ("--topk", "--show-dir", "torchvision_v2", ".safetensors", "mobilenet_v2_1.0_224"):
        assert known in done.stdout
