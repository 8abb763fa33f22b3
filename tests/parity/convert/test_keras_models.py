"""Models around Keras's MobileNetV2 are converted with their preprocessing and their head.

Live Keras 3 gives the probabilities to expect, for pixels of 0 to 255 as its model takes them.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from mbv2_jax.convert import importer, readers
from mbv2_jax.convert.readers.contents import Dense
from mbv2_jax.spec import TrainingMode
from tests.support import keras_files, peers
from tests.support.keras_files import application, randomize

# Keras itself warns, on its torch backend with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = 64
# Keras computes in float32, which rounds at 6e-8; 53 layers and logits up to 20 enlarge it.
TOLERANCE = 1e-4


def pixels(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, size, size, 3)).astype(np.float32)


def of_keras(model: Any, images: np.ndarray) -> np.ndarray:
    return peers.keras().ops.convert_to_numpy(model(images, training=False))


def of_converted(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Returns the logits of a converted model, for pixels of 0 to 255."""
    saved = importer.load(path).saved
    preprocessing = saved.spec.preprocessing
    with jax.enable_x64(True):
        network = saved.task().network(saved.spec.backbone, TrainingMode(dtype="float64"))
        x = (images.astype(np.float64) - preprocessing.mean) / preprocessing.std
        return np.asarray(network.apply(jax.tree.map(np.float64, saved.variables()), x))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def save(model: Any, path: pathlib.Path) -> pathlib.Path:
    """Saves a model in the format of a file's name."""
    if path.name == "keras_2.h5":
        keras_files.write_keras_2(model, path)
    elif path.name == "model.json":
        keras_files.write_tfjs(model, path.parent)
    else:
        (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return path


# ---- Models as people build them ----


def functional(*, size: int = SIZE) -> Any:
    """Returns the model of Keras's guide to transfer learning, with one dense layer."""
    keras = peers.keras()
    layers = keras.layers
    inputs = keras.Input((size, size, 3))
    x = layers.RandomRotation(0.1)(layers.RandomFlip("horizontal")(inputs))
    x = layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = application(size)(x, training=False)
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="flowers")(x))


def preprocessed() -> Any:
    """Returns the model of TensorFlow's tutorial: preprocess_input, logits; two dense layers."""
    keras = peers.keras()
    layers = keras.layers
    inputs = keras.Input((SIZE, SIZE, 3))
    augmentation = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.2)])
    x = keras.applications.mobilenet_v2.preprocess_input(augmentation(inputs))
    x = application()(x, training=False)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.2)(layers.Dense(16, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(4)(x))


def sequential() -> Any:
    """Returns a Sequential model with its activations in layers of their own, for pixels / 255."""
    keras = peers.keras()
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Rescaling(1 / 255),
            application(pooling="avg"),
            layers.Dense(8, name="a"),
            layers.ReLU(),
            layers.Dense(6, name="b"),
            layers.Activation("relu"),
            layers.Dense(3, use_bias=False, name="c"),
            layers.Softmax(),
        ]
    )


def flat() -> Any:
    """Returns the application's layers with a head of AveragePooling2D and Flatten, for -1 to 1."""
    keras = peers.keras()
    layers = keras.layers
    base = application()
    x = layers.AveragePooling2D(pool_size=(2, 2))(base.output)
    x = layers.Dense(8, activation="relu")(layers.Flatten(name="flatten")(x))
    x = layers.Dense(2, activation="softmax")(layers.Dropout(0.5)(x))
    return keras.Model(base.input, x)


def binary() -> Any:
    """Returns a model with one unit and a sigmoid, two models deep."""
    keras = peers.keras()
    layers = keras.layers
    features = keras.Sequential([application(), layers.GlobalAveragePooling2D()])
    head = keras.Sequential([keras.Input((1280,)), layers.Dense(1, activation="sigmoid")])
    scale = layers.Rescaling(1 / 127.5, offset=-1)
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), scale, features, head])


MINUS_1_TO_1 = {"data.mean": (127.5,) * 3, "data.std": (127.5,) * 3, "data.image_size": SIZE}
# Builder -> activations of the head, stated fields.
MODELS: dict[Callable[[], Any], tuple[list[str], dict[str, Any]]] = {
    functional: (["softmax"], MINUS_1_TO_1),
    preprocessed: (["relu", "linear"], MINUS_1_TO_1),
    sequential: (
        ["relu", "relu", "softmax"],
        {"data.mean": (0.0,) * 3, "data.std": (255.0,) * 3, "data.image_size": SIZE},
    ),
    flat: (["relu", "softmax"], {"data.image_size": SIZE}),
    binary: (["sigmoid"], MINUS_1_TO_1),
}
FILES = ("net.keras", "net.h5", "keras_2.h5", "model.json")


@pytest.fixture(scope="module")
def built() -> dict[Callable[[], Any], Any]:
    """Returns each of MODELS, with random weights."""
    models = {build: build() for build in MODELS}
    for model in models.values():
        randomize(model)
    return models


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("build", MODELS)
def test_what_a_file_says(build, name, built, tmp_path):
    """The reader names the dense layers in order, and states preprocessing and input size."""
    model = built[build]
    contents = readers.read(save(model, tmp_path / name)).contents
    activations, stated = MODELS[build]
    dense = [each for each in keras_files.layers(model) if type(each).__name__ == "Dense"]
    names = [each.name for each in dense]
    assert contents.head == tuple(map(Dense, names, activations))
    assert (contents.stated, contents.obstacles, contents.guesses) == (stated, (), ())
    expected = keras_files.weights(model)
    assert contents.tensors.keys() == expected.keys()
    for array, value in expected.items():
        np.testing.assert_array_equal(contents.tensors[array], value, err_msg=array, strict=True)
