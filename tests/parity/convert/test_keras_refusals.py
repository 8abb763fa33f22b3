"""Models of Keras that compute something else than a network here are refused by layer.

Their names and shapes of arrays would fit: the stored config tells.
"""

import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mbv2_jax.convert import importer, readers
from mbv2_jax.errors import UserError
from tests.support import peers
from tests.support.keras_files import application
from tests.support.weight_files import refusal

# Keras itself warns, on its torch backend with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = 64


@pytest.fixture(scope="module")
def base() -> Any:
    """Returns the application, which the models share."""
    return application()


@pytest.fixture
def contents(base, tmp_path) -> Callable[..., Any]:
    """Returns the contents of a file with a model of some layers around the application."""

    def contents(before: Any = lambda x: x, after: Any = lambda x: x) -> Any:
        keras = peers.keras()
        inputs = keras.Input((SIZE, SIZE, 3))
        keras.Model(inputs, after(base(before(inputs)))).save(tmp_path / "net.keras")
        return readers.read(tmp_path / "net.keras").contents

    return contents


def pooled(*layers: Any) -> Callable[[Any], Any]:
    """Returns the application of layers, and of a dense one, to the pooled map."""

    def apply(x: Any) -> Any:
        for layer in (peers.keras().layers.GlobalAveragePooling2D(), *layers):
            x = layer(x)
        return peers.keras().layers.Dense(3)(x)

    return apply


def test_layers_after_the_network(contents):
    layers = peers.keras().layers
    dense = layers.Dense
    relu = dense(8, activation="relu")
    cases = {
        "a BatchNormalization layer 'norm'": pooled(layers.BatchNormalization(name="norm")),
        "a LeakyReLU layer 'leaky'": pooled(dense(8), layers.LeakyReLU(name="leaky")),
        "a Flatten layer 'flat'": lambda x: dense(3)(layers.Flatten(name="flat")(x)),
        "a GlobalMaxPooling2D layer 'most'": lambda x: dense(3)(
            layers.GlobalMaxPooling2D(name="most")(x)
        ),
        "a Conv2D layer 'conv'": lambda x: pooled()(layers.Conv2D(8, 1, name="conv")(x)),
        "a Softmax layer 'again'": pooled(relu, layers.Softmax(name="again")),
        "an Activation layer 'tanh'": pooled(dense(8), layers.Activation("tanh", name="tanh")),
    }
    for obstacle, after in cases.items():
        assert f"{obstacle} after the network" in contents(after=after).obstacles


def test_a_branch_after_the_network(contents):
    layers = peers.keras().layers
    most, mean = layers.GlobalMaxPooling2D(name="most"), layers.GlobalAveragePooling2D(name="mean")
    found = contents(after=lambda x: layers.Dense(3)(layers.Concatenate()([most(x), mean(x)])))
    assert found.obstacles == ("a branch after the network, to 'most', 'mean'",)


def test_layers_before_the_network(contents):
    layers = peers.keras().layers
    size = (SIZE, SIZE)
    cases = {
        "an UpSampling2D layer 'twice'": lambda x: layers.Resizing(*size)(
            layers.UpSampling2D(name="twice")(x)
        ),
        "a Lambda layer 'code'": layers.Lambda(
            lambda x: x[..., ::-1], output_shape=lambda shape: shape, name="code"
        ),
        "a Normalization layer 'own'": layers.Normalization(name="own"),
        "a CenterCrop layer 'crop'": layers.CenterCrop(*size, name="crop"),
        "a Resizing layer 'near'": layers.Resizing(*size, interpolation="nearest", name="near"),
        "a Resizing layer 'pad'": layers.Resizing(*size, pad_to_aspect_ratio=True, name="pad"),
        "a Subtract layer": lambda x: 255 - x,
    }
    for obstacle, before in cases.items():
        (found,) = contents(before=before, after=pooled()).obstacles
        assert found.startswith(obstacle)
        assert found.endswith("before the network")


def test_pixels(contents):
    """The mean and deviation of (pixel - mean) / deviation are worked out by hand."""
    keras = peers.keras()
    layers = keras.layers
    cases = [
        (layers.Rescaling(1 / 255), (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
        (layers.Rescaling([2, 1, 0.5], offset=[-2, 0, 1]), (1.0, 0.0, -2.0), (0.5, 1.0, 2.0)),
        (
            layers.Normalization(mean=[10, 20, 30], variance=[4, 9, 16]),
            (10.0, 20.0, 30.0),
            (2.0, 3.0, 4.0),
        ),
        (lambda x: (x - 100) / 50, (100.0, 100.0, 100.0), (50.0, 50.0, 50.0)),
        (lambda x: x * 0.5 + 3, (-6.0, -6.0, -6.0), (2.0, 2.0, 2.0)),
        (lambda x: layers.Rescaling(2)(x - 1), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)),
    ]
    for before, mean, std in cases:
        found = contents(before=before, after=pooled())
        assert found.stated == {"data.mean": mean, "data.std": std, "data.image_size": SIZE}
        assert found.obstacles == ()


def test_resizing(contents):
    layer = peers.keras().layers.Resizing
    cases = {
        "resize(size)": layer(SIZE, SIZE, antialias=True),
        "resize(size, interpolation='bicubic')": layer(
            SIZE, SIZE, interpolation="bicubic", antialias=True
        ),
        "resize_edge(size, interpolation='bicubic')|center_crop(size)": layer(
            SIZE, SIZE, crop_to_aspect_ratio=True, interpolation="bicubic", antialias=True
        ),
    }
    for transforms, before in cases.items():
        found = contents(before=before, after=pooled())
        assert found.stated == {"data.eval_transforms": transforms, "data.image_size": SIZE}
        assert (found.obstacles, found.guesses) == ((), ())
    (guess,) = contents(before=layer(SIZE, SIZE), after=pooled()).guesses
    assert "does not antialias" in guess


def test_preprocess_input_in_a_lambda_layer(contents):
    keras = peers.keras()
    function = keras.applications.mobilenet_v2.preprocess_input
    found = contents(before=keras.layers.Lambda(function), after=pooled())
    assert found.stated["data.std"] == (127.5,) * 3
    (guess,) = found.guesses
    assert "whose code is not in the file" in guess


def test_several_outputs_and_uses(base, tmp_path):
    keras = peers.keras()
    dense, pool = keras.layers.Dense(3, name="logits"), keras.layers.GlobalAveragePooling2D()
    inputs, others = keras.Input((SIZE, SIZE, 3)), keras.Input((SIZE, SIZE, 3))
    x = pool(base(inputs))
    keras.Model(inputs, [dense(x), keras.layers.Dense(4)(x)]).save(tmp_path / "net.keras")
    assert "2 outputs" in readers.read(tmp_path / "net.keras").contents.obstacles
    both = keras.layers.Subtract()([dense(pool(base(inputs))), dense(pool(base(others)))])
    keras.Model([inputs, others], both).save(tmp_path / "net.keras")
    found = readers.read(tmp_path / "net.keras").contents.obstacles
    assert any("'logits' that is applied more than once" in obstacle for obstacle in found)


# ---- The backbone ----


def changed(base: Any, path: pathlib.Path, **settings: Any) -> pathlib.Path:
    """Writes the application with settings of one layer changed, as a user's own code would."""
    base.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    name = settings.pop("layer")
    (layer,) = (each for each in config["config"]["layers"] if each["name"] == name)
    assert settings.keys() <= layer["config"].keys()
    layer["config"] |= settings
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, json.dumps(config) if member == "config.json" else content)
    return path


@pytest.mark.parametrize(
    ("layer", "setting", "value"),
    [
        ("block_13_depthwise", "strides", [1, 1]),
        ("block_14_depthwise", "dilation_rate", [2, 2]),
        ("Conv1", "padding", "valid"),
        ("block_3_pad", "padding", [[1, 1], [1, 1]]),
        ("block_5_expand", "activation", "relu"),
        ("block_7_project_BN", "epsilon", 1e-5),
    ],
)
def test_another_backbone(layer, setting, value, base, tmp_path):
    path = changed(base, tmp_path / "net.keras", layer=layer, **{setting: value})
    line = refusal(path)
    assert f"{layer!r} has {setting}" in line or f"{layer!r} is not" in line


def test_another_activation_or_order(base, tmp_path):
    path = changed(base, tmp_path / "net.keras", layer="block_2_expand_relu", max_value=None)
    assert "'block_2_expand_BN' is not followed by a ReLU of at most 6" in refusal(path)


def test_another_epsilon_everywhere(tmp_path):
    keras = peers.keras()
    model = keras.models.clone_model(
        application(),
        clone_function=lambda layer: (
            keras.layers.BatchNormalization(epsilon=1e-5, name=layer.name)
            if isinstance(layer, keras.layers.BatchNormalization)
            else type(layer).from_config(layer.get_config())
        ),
    )
    model.save(tmp_path / "net.keras")
    assert readers.read(tmp_path / "net.keras").contents.stated["model.bn_epsilon"] == 1e-5


def test_features_of_a_model_with_another_head(contents, tmp_path):
    """--features-only converts what is before the obstacle."""
    layers = peers.keras().layers
    contents(after=lambda x: layers.Dense(3)(layers.Flatten()(x)))
    with pytest.raises(UserError, match="a Flatten layer 'flatten"):
        importer.load(tmp_path / "net.keras")
    saved = importer.load(tmp_path / "net.keras", features_only=True).saved
    assert saved.features_only
    assert np.prod(saved.params["last"]["conv"]["kernel"].shape) == 112 * 1280
