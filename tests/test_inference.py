"""Prediction through Python and the command line; tests/parity/test_prediction.py has the peer."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mbv2_jax
from mbv2_jax.errors import UserError
from mbv2_jax.inference import Classifier
from tests import tiny_model
from tests.training import commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model, three images as PNG files, and two files that are no images."""
    folder = tmp_path_factory.mktemp("prediction")
    tiny_model.write(folder / "model")
    for i in range(3):
        photo(i).save(folder / f"{i}.png")
    (folder / "text.png").write_text("no image")
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def classifier(folder) -> Classifier:
    return mbv2_jax.init_model(folder / "model")


def photo(seed: int) -> Image.Image:
    """An image that is neither square nor of the network's size."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((70, 50), Image.Resampling.BICUBIC)


def pixels(count: int) -> np.ndarray:
    shape = (count, tiny_model.SIZE, tiny_model.SIZE, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pixels_and_normalised_floats_give_the_same_logits(classifier):
    images = pixels(4)
    logits = classifier(images)
    assert logits.shape == (4, 6)
    assert logits.dtype == np.float32
    mean, std = np.asarray(tiny_model.MEAN, np.float32), np.asarray(tiny_model.STD, np.float32)
    normalised = (images.astype(np.float32) - mean) / std
    # XLA's float32 quotients are an ulp beside numpy's, 2e-7 of a pixel; logits reach 10.
    np.testing.assert_allclose(logits, classifier(normalised), rtol=0, atol=1e-4)
    assert np.ptp(logits) > 1  # not all the same, whatever goes in


def test_logits_of_an_image_do_not_depend_on_those_beside_it(classifier):
    images = pixels(4)
    alone = np.concatenate([classifier(images[i : i + 1]) for i in range(4)])
    # Another batch size orders the sums of up to 1,280 float32 terms differently; logits reach 10.
    np.testing.assert_allclose(classifier(images), alone, rtol=0, atol=1e-4)


def test_jax_arrays_are_taken_too(classifier):
    images = pixels(4)
    np.testing.assert_array_equal(classifier(jnp.asarray(images)), classifier(images))


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((4, 3, 32, 32), r"\(N, 3, H, W\) = \(4, 3, 32, 32\): give \(N, H, W, 3\)"),
        ((32, 32, 3), r"shape \(32, 32, 3\): give \(N, H, W, 3\)"),
        ((4, 32, 32, 1), r"shape \(4, 32, 32, 1\)"),
        ((4, 32, 32, 4), r"shape \(4, 32, 32, 4\)"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_other_shapes_are_refused_by_name(classifier, shape, dtype, named):
    with pytest.raises(UserError, match=named):
        classifier(np.zeros(shape, dtype))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.bool_])
def test_other_dtypes_are_refused_by_name(classifier, dtype):
    with pytest.raises(UserError, match=f"{np.dtype(dtype).name}: give uint8"):
        classifier(np.zeros((1, 32, 32, 3), dtype))


def test_path_bytes_pil_image_and_array_are_the_same_image(classifier, folder):
    path = folder / "0.png"
    image = photo(0)
    expected = classifier.prepare(path)
    assert expected.shape == (32, 32, 3)
    assert expected.dtype == np.uint8
    for same in (str(path), path.read_bytes(), image, image.convert("RGBA"), np.asarray(image)):
        np.testing.assert_array_equal(classifier.prepare(same), expected)


def test_opened_image_is_turned_upright_as_its_file_is(classifier, tmp_path):
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo(0).save(file, exif=exif)
    with Image.open(file) as opened:
        ours = classifier.prepare(opened)
    np.testing.assert_array_equal(ours, classifier.prepare(file))
    untold = tmp_path / "untold.jpg"
    photo(0).save(untold)
    assert not np.array_equal(ours, classifier.prepare(untold))


def test_preparing_is_the_models_evaluation_transform(classifier):
    # resize_edge(36)|center_crop(32) of 70 x 50: the short side becomes 36, the long one 50.4, cut.
    resized = photo(0).resize((50, 36), Image.Resampling.BILINEAR)
    expected = resized.crop((9, 2, 41, 34))
    np.testing.assert_array_equal(classifier.prepare(photo(0)), np.asarray(expected))


def test_what_is_no_image_is_refused_by_name(classifier, folder):
    with pytest.raises(UserError, match=r"missing\.png: No such file"):
        classifier.prepare(folder / "missing.png")
    with pytest.raises(UserError, match=r"text\.png: cannot decode"):
        classifier.prepare(folder / "text.png")
    with pytest.raises(UserError, match=r"half\.png: cannot decode"):
        classifier.prepare(str(folder / "half.png"))
    with pytest.raises(UserError, match="cannot decode"):
        classifier.prepare(b"")
    with pytest.raises(UserError, match=f"{folder}: Is a directory"):
        classifier.prepare(folder)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_rgb_pixels_are_refused(classifier, value):
    with pytest.raises(UserError, match=r"give uint8 \(H, W, 3\)"):
        classifier.prepare(value)


@pytest.mark.parametrize("value", [None, 7, [[0, 0, 0]]])
def test_other_types_are_refused(classifier, value):
    with pytest.raises(UserError, match=type(value).__name__):
        classifier.prepare(value)


def test_prediction_has_mmpretrains_keys_and_names_the_largest_logit(classifier):
    image = photo(1)
    logits = np.asarray(classifier(classifier.prepare(image)[None])[0], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()

    found = mbv2_jax.inference_model(classifier, image)
    assert list(found) == ["pred_label", "pred_class", "pred_score", "pred_scores"]
    assert type(found["pred_label"]) is int
    assert found["pred_label"] == probabilities.argmax()
    assert found["pred_class"] == tiny_model.CLASSES[probabilities.argmax()]
    # A float32 softmax of six logits.
    np.testing.assert_allclose(found["pred_scores"], probabilities, rtol=1e-5, atol=0)
    assert type(found["pred_score"]) is float
    assert found["pred_score"] == found["pred_scores"].max()


def test_init_model_refuses_what_is_no_model(folder):
    with pytest.raises(UserError, match="does not exist"):
        mbv2_jax.init_model(folder / "nothing")


@pytest.fixture(scope="module")
def predict(folder, tmp_path_factory):
    """Returns the function that runs `python -m mbv2_jax.predict` in the folder of images."""
    environment = commands.environment(tmp_path_factory.mktemp("compiled"))
    environment["PYTHONPATH"] = str(commands.REPOSITORY)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mbv2_jax.predict", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def test_predict_prints_a_line_for_each_image(predict, classifier):
    done = predict("0.png", "1.png", "--checkpoint=model")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines):
        scores = mbv2_jax.inference_model(classifier, photo(i))["pred_scores"]
        best = sorted(range(6), key=lambda label: -scores[label])[:5]
        words = line.split()
        assert words[0] == f"{i}.png"
        assert words[1::2] == [tiny_model.CLASSES[label] for label in best]
        # Printed with two decimals of a percent; the other process may round the last float32 bits.
        printed = [float(word.rstrip("%")) for word in words[2::2]]
        np.testing.assert_allclose(printed, 100 * scores[best], rtol=0, atol=0.006)


def test_predict_reports_bad_files_and_predicts_the_others(predict, classifier):
    images = ["0.png", "missing.png", "text.png", "2.png", "half.png"]
    done = predict(*images, "--checkpoint=model", "--topk=2", "--json")
    assert done.returncode == 2
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in found] == ["0.png", "2.png"]
    for line, i in zip(found, (0, 2), strict=True):
        scores = mbv2_jax.inference_model(classifier, photo(i))["pred_scores"]
        best = sorted(range(6), key=lambda label: -scores[label])[:2]
        assert [entry["label"] for entry in line["predictions"]] == best
        assert [entry["class"] for entry in line["predictions"]] == [
            tiny_model.CLASSES[label] for label in best
        ]
        # The same float32 network, compiled for one device instead of four.
        found_scores = [entry["score"] for entry in line["predictions"]]
        np.testing.assert_allclose(found_scores, scores[best], rtol=1e-4, atol=0)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: missing.png: No such file or directory"
    assert errors[1].startswith("error: text.png: cannot decode")
    assert errors[2].startswith("error: half.png: cannot decode")
    assert errors[3:] == ["error: 3 of 5 images could not be predicted"]
    assert "Traceback" not in done.stderr


def test_predict_names_all_classes_where_there_are_fewer_than_topk(predict):
    done = predict("0.png", "--checkpoint=model", "--topk=100", "--json")
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)["predictions"]
    assert sorted(entry["label"] for entry in predictions) == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["0.png", "--checkpoint=nothing"], "error: checkpoint nothing does not exist"),
        (["0.png", "--checkpoint=model", "--topk=0"], "--topk=0: give 1 or more"),
        (["0.png", "--checkpoint=model", "--topk=two"], "'two'"),
        (["0.png"], "--checkpoint"),
        (["--checkpoint=model"], "IMAGE"),
    ],
    ids=["no model", "topk 0", "topk no number", "no checkpoint", "no image"],
)
def test_predict_refuses_what_it_cannot_do(predict, arguments, named):
    done = predict(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_predict_teaches_without_jax():
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
        [sys.executable, "-c", program], cwd=commands.REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "python -m mbv2_jax.predict seven.png four.jpg --checkpoint=" in done.stdout
    assert "--topk" in done.stdout
