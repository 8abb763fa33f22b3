"""TensorFlow.js's layers models are read: of its converter, of its own library, and quantised ones.

The files are written after the format's description, with the weights of models of live Keras.
"""

import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mbv2_jax.convert import importer, readers
from mbv2_jax.convert.readers.contents import Dense
from tests.support import keras_files, outputs, peers
from tests.support.keras_files import application, camel_case, keras_2_config, randomize

# Keras itself warns, on its torch backend with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = 64


@pytest.fixture(scope="module")
def model() -> Any:
    """Returns a Functional model with preprocessing, a model in it, and two dense layers."""
    keras = peers.keras()
    layers = keras.layers
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.applications.mobilenet_v2.preprocess_input(layers.RandomFlip()(inputs))
    x = layers.GlobalAveragePooling2D()(application()(x, training=False))
    x = layers.Dropout(0.2)(layers.Dense(16, activation="relu")(x))
    model = keras.Model(inputs, layers.Dense(4, name="flowers")(x))
    randomize(model)
    return model


def quantized(bits: int) -> Callable[[np.ndarray], tuple[np.ndarray, dict[str, Any]]]:
    """Returns the quantisation of TensorFlow.js's converter; 16 bits of float for 0."""

    def quantize(array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        if not bits:
            return array.astype(np.float16), {"dtype": "float16", "original_dtype": "float32"}
        least, most = float(array.min()), float(array.max())
        scale = (most - least) / (2**bits - 1) or 1.0
        dtype = f"uint{bits}"
        stored = np.round((array - least) / scale).astype(dtype)
        return stored, {"dtype": dtype, "min": least, "scale": scale, "original_dtype": "float32"}

    return quantize


@pytest.mark.parametrize("bits", [0, 8, 16])
def test_quantized(bits, model, tmp_path):
    """The values are Keras's within half a step; in float16 within 2^-11 of each."""
    path = keras_files.write_tfjs(model, tmp_path, quantize=quantized(bits))
    found = readers.read(path).tensors
    for name, array in keras_files.weights(model).items():
        step = (array.max() - array.min()) / (2**bits - 1) if bits else 0
        # 1e-6: float32's own rounding of the product and the sum.
        bound = 0.5 * step + 1e-6 if bits else abs(array).max() * 2**-11
        assert found[name].dtype == np.float32
        assert abs(found[name] - array).max() <= bound, name


@pytest.mark.parametrize(
    "config",
    [
        keras_2_config,
        lambda model: camel_case(keras_2_config(model)),
        lambda model: json.loads(model.to_json()),
    ],
    ids=["Keras 2", "TensorFlow.js", "Keras 3"],
)
def test_shards(config, model, tmp_path):
    shards = [f"group1-shard{n}of3.bin" for n in (1, 2, 3)]
    file = readers.read(keras_files.write_tfjs(model, tmp_path, shards=shards, config=config))
    contents = file.contents
    assert file.container == "tfjs"
    assert [dense.activation for dense in contents.head] == ["relu", "linear"]
    assert contents.head[-1] == Dense("flowers", "linear")
    scale = (127.5, 127.5, 127.5)
    assert contents.stated == {
        "data.mean": scale,
        "data.std": scale,
        "data.image_size": SIZE,
    }
    assert (contents.obstacles, contents.guesses) == ((), ())
    expected = keras_files.weights(model)
    assert contents.tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(contents.tensors[name], array, err_msg=name, strict=True)


def teachable(folder: pathlib.Path) -> Any:
    """Returns a model like Teachable Machine's, after writing its three files."""
    keras = peers.keras()
    layers = keras.layers
    features = keras.Sequential([application(), layers.GlobalAveragePooling2D()])
    head = keras.Sequential(
        [
            keras.Input((1280,)),
            layers.Dense(100, activation="relu", name="dense_Dense1"),
            layers.Dense(2, activation="softmax", use_bias=False, name="dense_Dense2"),
        ]
    )
    model = keras.Sequential([features, head])
    model.build((None, SIZE, SIZE, 3))
    randomize(model)
    path = keras_files.write_tfjs(model, folder, shards=["weights.bin"])
    description = json.loads(path.read_text())
    topology = description["modelTopology"]
    description["modelTopology"] = {
        **topology.pop("model_config"),
        "keras_version": "tfjs-layers 1.7.4",
        "backend": "tensor_flow.js",
    }
    description["weightsManifest"][0]["paths"] = ["./weights.bin"]
    path.write_text(json.dumps(description))
    metadata = {
        "tfjsVersion": "1.7.4",
        "tmVersion": "2.4.7",
        "packageVersion": "0.8.4",
        "packageName": "@teachablemachine/image",
        "labels": ["cat", "dog"],
        "imageSize": 224,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return model


@pytest.mark.parametrize("zipped", [True, False])
def test_teachable_machine(zipped, tmp_path):
    """Its pixels are pixel / 127 - 1 of the central square."""
    model, path = teachable(tmp_path), tmp_path / "model.json"
    if zipped:
        path = tmp_path / "tm-my-image-model.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("model.json", "weights.bin", "metadata.json"):
                archive.write(tmp_path / name, name)
    saved = importer.load(path).saved
    assert saved.classes == ("cat", "dog")
    assert saved.spec.preprocessing.eval_transforms == "resize_edge(size)|center_crop(size)"
    images = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.float32)
    preprocessing = saved.spec.preprocessing
    scaled = (images.astype(np.float64) - preprocessing.mean) / preprocessing.std
    logits = outputs.of_converted(saved, scaled).logits
    assert logits is not None
    theirs = peers.keras().ops.convert_to_numpy(model(images / 127 - 1, training=False))
    ours = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert abs(ours - theirs).max() <= 1e-4  # Keras computes in float32
