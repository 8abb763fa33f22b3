"""Models around Keras's MobileNetV2 are converted with their preprocessing and their head.

Live Keras 3 gives the probabilities to expect, for pixels of 0 to 255 as its model takes them.
"""

import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import h5py
import jax
import numpy as np
import pytest

from mbv2_jax.convert import importer, readers
from mbv2_jax.convert.readers.contents import Dense
from mbv2_jax.spec import TrainingMode
from tests.support import keras_files, outputs, peers
from tests.support.keras_files import application, randomize
from tests.support.outputs import Outputs

# Keras itself warns, on its torch backend with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = 64
# Of the largest output, or of 1 for probabilities. Keras computes in float32; the networks here in
# float32 and in float64 differ by as much as 2e-5 with these weights, and so do Keras and float64.
TOLERANCE = 1e-4


def pixels(size: int = SIZE) -> np.ndarray:
    images = np.random.default_rng(1).integers(0, 256, (2, size, size, 3)).astype(np.float32)
    return images * np.array([1.0, 0.2], np.float32)[:, None, None, None]


def of_keras(model: Any, images: np.ndarray) -> np.ndarray:
    return peers.keras().ops.convert_to_numpy(model(images, training=False))


def of_converted(path: pathlib.Path, images: np.ndarray) -> Outputs:
    """Returns the outputs of a converted model for pixels of 0 to 255."""
    saved = importer.load(path).saved
    preprocessing = saved.spec.preprocessing
    scaled = (images.astype(np.float64) - preprocessing.mean) / preprocessing.std
    return outputs.of_converted(saved, scaled)


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


@pytest.mark.parametrize(("build", "name"), [*zip(MODELS, (*FILES, "net.keras"), strict=True)])
def test_outputs(build, name, built, tmp_path):
    """The converted model gives Keras's probabilities or logits, and its last feature map."""
    model = built[build]
    images = pixels()
    result = of_converted(save(model, tmp_path / name), images)
    theirs = of_keras(model, images / 127.5 - 1 if build is flat else images)
    activation = MODELS[build][0][-1]
    assert result.logits is not None
    ours = result.logits if activation == "linear" else softmax(result.logits)
    if activation == "sigmoid":
        ours = ours[:, 1:]
    assert theirs.std() > 10 * TOLERANCE
    assert abs(ours - theirs).max() <= TOLERANCE * max(1, abs(theirs).max())
    layer = next(each for each in keras_files.layers(model) if each.name == "out_relu")
    base = peers.keras().Model(_application(model).input, layer.output)
    scale = 255 if build is sequential else 127.5
    features = of_keras(base, images / scale - (build is not sequential))
    assert abs(result.maps[-1] - features).max() <= TOLERANCE * features.max()


def _application(model: Any) -> Any:
    """Returns the model whose own layers are the application's."""
    if any(layer.name == "Conv1" for layer in model.layers):
        return model
    inner = (layer for layer in model.layers if hasattr(layer, "layers"))
    return next(filter(None, map(_application, inner)), None)


def test_a_folder_of_the_hub(built, tmp_path):
    """Keras writes the members of a .keras file as files to Hugging Face's hub."""
    path = save(built[preprocessed], tmp_path / "net.keras")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "hub")
    weights = tmp_path / "hub/model.weights.h5"
    alone, whole = readers.read(weights).contents, readers.read(path).contents
    assert (alone.head, alone.stated) == (whole.head, whole.stated)
    (tmp_path / "hub/config.json").unlink()
    assert readers.read(weights).contents.head is None


@pytest.mark.parametrize("names", [True, False])
def test_weights_alone(names, tmp_path):
    """A .weights.h5 file has no description: the dense layers are found by their sizes."""
    keras = peers.keras()
    model = keras.Sequential(
        [
            application(pooling="avg"),
            keras.layers.Dense(16, activation="relu", name="z"),
            keras.layers.Dense(3, name="a"),
        ]
    )
    randomize(model)
    path = save(model, tmp_path / "net.weights.h5")
    if not names:
        with h5py.File(path, "r+") as file:
            file.visititems(lambda _, item: item.attrs.pop("name", None) and None)
    contents = readers.read(path).contents
    assert (contents.head, contents.stated, contents.obstacles) == (None, {}, ())
    assert len(contents.guesses) == (not names)
    images = pixels()
    result, theirs = of_converted(path, images), of_keras(model, images / 127.5 - 1)
    assert abs(result.logits - theirs).max() <= TOLERANCE * abs(theirs).max()


def test_a_model_of_the_users_own_class(tmp_path):
    keras = peers.keras()

    class Flowers(keras.Model):  # type: ignore[name-defined] # imported when it runs
        def __init__(self) -> None:
            super().__init__()
            self.base = application(pooling="avg")
            self.head = keras.layers.Dense(3, name="flowers")

        def call(self, x: Any) -> Any:
            return self.head(self.base(x))

    model, images = Flowers(), pixels()
    model(images)
    randomize(model)
    path = save(model, tmp_path / "net.weights.h5")
    result, theirs = of_converted(path, images), of_keras(model, images / 127.5 - 1)
    assert abs(result.logits - theirs).max() <= TOLERANCE * abs(theirs).max()


def test_a_network_without_its_last_convolution(tmp_path):
    keras = peers.keras()
    base = application()
    x = keras.layers.GlobalAveragePooling2D()(base.get_layer("block_16_project_BN").output)
    model, images = keras.Model(base.input, keras.layers.Dense(3)(x)), pixels()
    randomize(model)
    path = save(model, tmp_path / "net.keras")
    saved = importer.load(path).saved
    assert not saved.spec.backbone.last_convolution
    theirs = of_keras(model, images / 127.5 - 1)
    network = saved.task().network(saved.spec.backbone, TrainingMode())
    logits = network.apply(jax.tree.map(np.asarray, saved.variables()), images / 127.5 - 1)
    assert abs(np.asarray(logits) - theirs).max() <= TOLERANCE * abs(theirs).max()
