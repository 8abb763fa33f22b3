"""Prediction with a segmentation model: masks in the pictures' pixels, tables, files, and save."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mbv2_jax
from mbv2_jax import model_dir, spec
from mbv2_jax.inference import Predictor
from mbv2_jax.model_json import Description
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.segmentation.palette import colours
from mbv2_jax.tasks.segmentation.settings import Head
from mbv2_jax.tasks.segmentation.task import Segmentation
from tests.support import REPOSITORY, commands, tiny_model

COLOURS = ("red", "green", "blue")
PIXELS = Preprocessing(48, "resize(size)", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
SEEN = f"{__name__}:Seen"


class Brightest(nn.Module):
    """A network whose logits are a pixel's colour: the class is the brightest of three colours."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        return images


@dataclasses.dataclass(frozen=True)
class Seen(Segmentation):
    """Segmentation with a network whose masks are known."""

    def network(self, backbone: Backbone, mode: spec.TrainingMode, *, folded: bool = False) -> Any:
        return Brightest()

    def fold(self, params: Any, batch_stats: Any, backbone: Backbone) -> dict[str, Any]:
        return {}


def seer(preprocessing: Preprocessing) -> Predictor:
    """Returns the predictor of `Brightest`."""
    made = ModelSpec(SEEN, Backbone(), Head(3), preprocessing)
    description = Description(made, COLOURS, {"kind": "made by a test"})
    return Predictor(model_dir.SavedModel({}, {}, description, pathlib.Path("seer")))


def stripes(width: int, height: int) -> Image.Image:
    """Returns a picture: its left half red, its right half green above and blue below."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2, 0] = 255
    picture[: height // 2, width // 2 :, 1] = 255
    picture[height // 2 :, width // 2 :, 2] = 255
    return Image.fromarray(picture)


@pytest.mark.parametrize("transforms", ["resize(size)", "resize(96)", "fit(size)|pad(size)"])
def test_masks_have_the_pictures_sizes(transforms):
    sizes = [(48, 48), (96, 48), (24, 144), (300, 200), (12, 12)]
    predictor = seer(dataclasses.replace(PIXELS, eval_transforms=transforms))
    for size, found in zip(sizes, predictor.predict([stripes(*s) for s in sizes], 2), strict=True):
        width, height = size
        expected = np.asarray(stripes(*size)).argmax(-1)
        assert found["mask"].dtype == np.uint8 and found["mask"].shape == (height, width)
        # The edges are halfway in the picture, and so at an edge of the image's pixels.
        np.testing.assert_array_equal(found["mask"], expected)
        assert found["classes"] == ["red", "green", "blue"]
        assert found["areas"] == [0.5, 0.25, 0.25]


def test_what_a_crop_leaves_out_takes_the_class_at_its_edge():
    preprocessing = dataclasses.replace(PIXELS, eval_transforms="resize_edge(48)|center_crop(size)")
    (found,) = seer(preprocessing).predict([stripes(96, 48)])
    np.testing.assert_array_equal(found["mask"], np.asarray(stripes(96, 48)).argmax(-1))


# ---- The real network ----

SIZE = 33
TINY = ModelSpec(
    "segmentation",
    Backbone(width=0.1, output_stride=16, last_convolution=False),
    Head(3),
    Preprocessing(SIZE, "resize(size)", tiny_model.MEAN, tiny_model.STD),
)
NAMES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a segmentation model, a classifier and three pictures, two of one name."""
    task = Segmentation(TINY.head, NAMES)
    return tiny_model.prediction_folder(task, TINY, tmp_path_factory.mktemp("segmentation"))


def predict(cache: pathlib.Path, folder: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
    return commands.run(cache, *arguments, module="tests.support.short_predict", cwd=folder)


def test_predictors_masks_are_those_of_its_logits(folder, few_layers):
    predictor = mbv2_jax.init_model(folder / "model")
    assert predictor.class_names == NAMES
    image = predictor.prepare(folder / "two.png")
    logits = predictor(image[None])
    assert logits.shape == (1, SIZE, SIZE, 3)
    found = mbv2_jax.inference_model(predictor, folder / "two.png")
    assert set(found) == {"mask", "classes", "areas"}
    assert found["mask"].shape == (50, 70)
    # Each pixel of the picture takes the class of the network's pixel in which its centre lies.
    rows = ((np.arange(50) + 0.5) / 50 * SIZE).astype(int)
    columns = ((np.arange(70) + 0.5) / 70 * SIZE).astype(int)
    nearest = np.asarray(logits[0]).argmax(-1)[rows[:, None], columns]
    np.testing.assert_array_equal(found["mask"], nearest)
    shares = {name: (nearest == NAMES.index(name)).mean() for name in found["classes"]}
    assert found["areas"] == sorted(shares.values(), reverse=True)
    assert sum(found["areas"]) == pytest.approx(1, rel=1e-12)
    pooled: Any = predictor.extract_feat(image[None])
    assert pooled.shape == (1, 32)


def test_table_json_masks_and_overlays(folder, cache, tmp_path, few_layers):
    out, show = tmp_path / "masks", tmp_path / "shown"
    arguments = ["one.jpg", "two.png", "more", "--checkpoint=model", f"--out-dir={out}"]
    status, text, err = predict(cache, folder, *arguments, f"--show-dir={show}")
    assert status == 0, err
    header, *lines = text.splitlines()
    assert header.split() == ["image", "rank", "share", "label", "class"]
    predictor = mbv2_jax.init_model(folder / "model")
    files = {"one.jpg": "one.png", "two.png": "two.png", "more/one.png": "one-2.png"}
    expected = []
    for image, name in files.items():
        found = mbv2_jax.inference_model(predictor, folder / image)
        with Image.open(out / name) as written:
            assert written.mode == "P" and written.size == (70, 50)
            assert written.getpalette() == colours().ravel().tolist()
            # The same network on one CPU device instead of four: ties aside, the same classes.
            assert (np.asarray(written) == found["mask"]).mean() > 0.99
        expected += found["classes"]
    assert [line.split()[-1] for line in lines] == expected
    shares = [float(line.split()[-3].rstrip("%")) for line in lines if "one.jpg" in line]
    assert (
        abs(shares[0] - 100 * mbv2_jax.inference_model(predictor, folder / "one.jpg")["areas"][0])
        < 1
    )
    assert err.splitlines()[-1] == (
        f"more/one.png: its mask is {out / 'one-2.png'}, since {out / 'one.png'} exists"
    )
    assert {file.name for file in show.iterdir()} == {"one.jpg", "two.png", "one.png"}

    status, text, err = predict(cache, folder, "two.png", "--checkpoint=model", "--json")
    assert status == 0, err
    line = json.loads(text)
    assert set(line) == {"image", "predictions"}
    assert {frozenset(entry) for entry in line["predictions"]} == {
        frozenset(("share", "label", "class"))
    }


def test_masks_of_a_classifier_are_refused_before_it_starts(folder, cache, tmp_path):
    status, text, err = predict(
        cache, folder, "one.jpg", "--checkpoint=classifier", f"--out-dir={tmp_path / 'masks'}"
    )
    assert (status, text) == (2, "")
    assert "is for masks, and the predictions of classifier are none: --show-dir draws them" in err
    status, _, err = predict(cache, folder, "more", "--checkpoint=model", "--out-dir=more/masks")
    assert status == 2
    assert "error: --out-dir=more/masks lies in more: give a folder elsewhere" in err


def test_load_and_save(folder, tmp_path, few_layers, capsys):
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)

    def logits(model: mbv2_jax.LoadedModel) -> Any:
        return model.module.apply(model.variables, model.preprocessing.normalize(images))

    # A classifier's backbone under a new head.
    model = mbv2_jax.load(
        folder / "classifier", task="segmentation", num_classes=3, output_stride=16, aspp_rates=[6]
    )
    assert "with a new head" in capsys.readouterr().err
    assert logits(model).shape == (2, SIZE, SIZE, 3)
    assert "last" not in model.variables["params"]
    stem = tiny_model.variables()["params"]["stem"]
    np.testing.assert_array_equal(
        model.variables["params"]["stem"]["conv"]["kernel"], stem["conv"]["kernel"]
    )
    mbv2_jax.save(
        tmp_path / "saved",
        model.module,
        model.variables,
        NAMES,
        preprocessing=model.preprocessing,
        task="segmentation",
    )
    saved = model_dir.read(tmp_path / "saved")
    assert (saved.spec.head, saved.classes) == (Head(3, (6,)), NAMES)
    # Folded, and compiled for one batch; logits are about 1.
    np.testing.assert_allclose(
        mbv2_jax.init_model(tmp_path / "saved")(images), logits(model), atol=1e-4
    )

    # Opened as it is, at another output stride, with other classes, and without its head.
    again = mbv2_jax.load(tmp_path / "saved")
    np.testing.assert_array_equal(logits(again), logits(model))
    finer = mbv2_jax.load(tmp_path / "saved", output_stride=8, align_corners=False)
    assert finer.class_names == NAMES and not finer.module.align_corners
    assert "head included" in capsys.readouterr().err
    other = mbv2_jax.load(tmp_path / "saved", num_classes=5)
    err = capsys.readouterr().err
    assert "with new weights of logits: its 3 classes are not these 5" in err
    assert logits(other).shape[-1] == 5 and other.class_names == ()
    np.testing.assert_array_equal(
        other.variables["params"]["projection"]["conv"]["kernel"],
        model.variables["params"]["projection"]["conv"]["kernel"],
    )
    features = mbv2_jax.load(tmp_path / "saved", features_only=True)
    found: Any = features.module.apply(features.variables, features.preprocessing.normalize(images))
    assert found[0].shape == (2, 17, 17, 32)  # the short network halves once


MEMORY = """
import resource
import numpy as np
import mbv2_jax
from tests.support import short_network

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

pictures = list(np.random.default_rng(0).integers(0, 256, (16, 257, 257, 3), np.uint8))
with short_network.in_use():
    predictor = mbv2_jax.init_model("wide")
    predictor.predict(pictures[:1])  # jax and the compiler
    before = peak()
    assert len(predictor.predict(pictures)) == 16
print(peak() - before)
"""


@pytest.mark.slow
def test_logits_of_a_whole_batch_are_never_held(cache, tmp_path, few_layers):
    classes = 150
    spec_ = dataclasses.replace(TINY, head=Head(classes))
    spec_ = dataclasses.replace(spec_, preprocessing=Preprocessing(257, "resize(size)"))
    names = tuple(map(str, range(classes)))
    network = Segmentation(spec_.head, names).network(spec_.backbone, spec_.mode)
    arrays = tiny_model.filled(model_dir.shapes_of(network))
    model_dir.write(
        tmp_path / "wide", **arrays, description=Description(spec_, names, {"kind": "test"})
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=tmp_path,
        env=commands.environment(cache) | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    grown, logits = int(done.stdout) / 1024, 16 * 257 * 257 * classes * 4 / 2**20
    # Those of two images at a time, and the pixels of all, which take 17 MiB: 94 was measured.
    assert grown < 0.5 * logits, f"{grown:.0f} MiB; the logits alone have {logits:.0f}"
