"""Files of Keras 3, in each of its formats, are read without Keras."""

import io
import json
import pathlib
import zipfile
from typing import Any

import h5py
import numpy as np
import pytest

from mbv2_jax.convert import importer, readers
from mbv2_jax.errors import UserError
from tests.support import peers
from tests.support.weight_files import refusal

# Keras itself warns, on its torch backend with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Arrays = dict[str, np.ndarray]


def network(keras: Any, **options: Any) -> Any:
    """Returns a small MobileNetV2 whose weights all differ."""
    model = keras.applications.MobileNetV2(
        alpha=0.35, input_shape=(32, 32, 3), weights=None, **options
    )
    noise = np.random.default_rng(0)
    model.set_weights([noise.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    return model


@pytest.fixture(scope="module")
def model():
    return network(peers.keras(), classes=5)


def weights(model: Any) -> Arrays:
    """Returns the weights by name, read from the attributes of Keras's layers."""
    keras = peers.keras()
    found: Arrays = {}
    for layer in model.layers:
        variables: dict[str, Any] = {}
        if isinstance(layer, keras.Model):
            found |= weights(layer)
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            variables = {"depthwise_kernel": layer.kernel}
        elif isinstance(layer, keras.layers.Conv2D):
            variables = {"kernel": layer.kernel}
        elif isinstance(layer, keras.layers.Dense):
            variables = {"kernel": layer.kernel, "bias": layer.bias}
        elif isinstance(layer, keras.layers.BatchNormalization):
            names = ("gamma", "beta", "moving_mean", "moving_variance")
            variables = {name: getattr(layer, name) for name in names}
        for name, variable in variables.items():
            found[f"{layer.name}/{name}"] = keras.ops.convert_to_numpy(variable)
    return found


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
def test_keras_3(suffix, model, tmp_path):
    path = tmp_path / f"net{suffix}"
    (model.save_weights if suffix == ".weights.h5" else model.save)(path)
    file = readers.read(path)
    assert len(file.tensors) == 262
    assert_same(file.tensors, weights(model))
    assert (file.container, file.contents.selection, file.contents.guesses) == ("keras", "", ())


def keras_2(model: Any) -> dict[str, list[str]]:
    """Returns {layer: names of its weights} as tf.keras 2 wrote them."""
    found: dict[str, list[str]] = {layer.name: [] for layer in model.layers}
    for name in weights(model):
        found[name.split("/")[0]].append(f"{name}:0")
    return found


@pytest.mark.parametrize("whole_model", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_keras_2(whole_model, split, model, tmp_path):
    """The file is written by hand, after the format's description: Keras 2 needs TensorFlow."""
    arrays = weights(model)
    with h5py.File(tmp_path / "net.h5", "w") as file:
        root = file.create_group("model_weights") if whole_model else file
        if whole_model:
            file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": {}})
            file.create_group("optimizer_weights")["SGD/momentum:0"] = np.ones(3)
        listed = keras_2(model)
        names = [name.encode() for name in listed]
        if split:  # as Keras 2 did where the list exceeded 64 KiB
            root.attrs["layer_names0"], root.attrs["layer_names1"] = names[:50], names[50:]
        else:
            root.attrs["layer_names"] = names
        for layer, entries in listed.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [entry.encode() for entry in entries]
            for entry in entries:
                group[entry] = arrays[entry.removesuffix(":0")]
    file = readers.read(tmp_path / "net.h5")
    assert_same(file.tensors, arrays)
    assert file.contents.guesses == ()


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
def test_a_model_in_a_trained_model(suffix, tmp_path):
    """Keras's recipe for fine-tuning: the files hold optimizer, metrics and random states, too."""
    keras = peers.keras()
    model = keras.Sequential(
        [
            keras.layers.RandomFlip(),
            network(keras, include_top=False),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(3, name="predictions"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, np.int32), verbose=0)
    path = tmp_path / f"net{suffix}"
    (model.save_weights if suffix == ".weights.h5" else model.save)(path)
    with h5py.File(_hdf5(path), "r") as file:
        assert "optimizer" in str(list(file))
    assert_same(readers.read(path).tensors, weights(model))


def _hdf5(path: pathlib.Path) -> Any:
    """Returns the HDF5 file: the file itself, or the one inside a .keras file."""
    if path.suffix != ".keras":
        return path
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read("model.weights.h5"))


def strip_names(path: pathlib.Path) -> None:
    """Removes the layers' names, which older versions of Keras 3 did not write."""
    with h5py.File(path, "r+") as file:
        stripped = []
        file.visititems(lambda name, item: stripped.append(item) if "name" in item.attrs else None)
        for item in stripped:
            del item.attrs["name"]
        assert len(stripped) > 20


def test_without_names_a_config_tells_them(model, tmp_path):
    model.save(tmp_path / "named.keras")
    with zipfile.ZipFile(tmp_path / "named.keras") as archive:
        (tmp_path / "net.weights.h5").write_bytes(archive.read("model.weights.h5"))
        config = archive.read("config.json")
    strip_names(tmp_path / "net.weights.h5")
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as archive:
        archive.writestr("config.json", config)
        archive.write(tmp_path / "net.weights.h5", "model.weights.h5")
    file = readers.read(tmp_path / "net.keras")
    assert_same(file.tensors, weights(model))
    assert file.contents.guesses == ()


@pytest.mark.parametrize("include_top", [True, False])
def test_without_names_the_order_tells_them(include_top, tmp_path):
    model = network(peers.keras(), include_top=include_top)
    model.save_weights(tmp_path / "net.weights.h5")
    strip_names(tmp_path / "net.weights.h5")
    file = readers.read(tmp_path / "net.weights.h5")
    assert_same(file.tensors, weights(model))
    (guess,) = file.contents.guesses
    assert "order" in guess


def test_without_names_another_network_is_not_taken_for_this_one(tmp_path):
    keras = peers.keras()
    model = keras.applications.MobileNet(alpha=0.25, input_shape=(32, 32, 3), weights=None)
    model.save_weights(tmp_path / "net.weights.h5")
    strip_names(tmp_path / "net.weights.h5")
    tensors = readers.read(tmp_path / "net.weights.h5").tensors
    assert "conv2d/kernel" in tensors
    assert not any("expand" in name for name in tensors)


def test_half_precision(tmp_path):
    keras = peers.keras()
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="a", dtype="bfloat16"),
            keras.layers.Dense(3, name="b", dtype="float16"),
        ]
    )
    model.save_weights(tmp_path / "net.weights.h5")
    tensors = readers.read(tmp_path / "net.weights.h5").tensors
    for layer in model.layers:
        expected = layer.kernel.value.detach().float().numpy()
        np.testing.assert_array_equal(tensors[f"{layer.name}/kernel"], expected, strict=True)


def test_two_layers_of_a_name(tmp_path):
    keras = peers.keras()
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="same")], name="inner")
    model = keras.Sequential([inner, keras.layers.Dense(4, name="same")])
    model.save(tmp_path / "net.keras")
    tensors = readers.read(tmp_path / "net.keras").tensors
    kernels = {"same/kernel": model.layers[1], "inner/same/kernel": inner.layers[0]}
    for name, layer in kernels.items():
        expected = keras.ops.convert_to_numpy(layer.kernel)
        np.testing.assert_array_equal(tensors[name], expected, strict=True)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_cut_off(suffix, model, tmp_path):
    path = tmp_path / f"net{suffix}"
    (model.save_weights if suffix == ".weights.h5" else model.save)(path)
    whole = path.read_bytes()
    for length in (10, 1000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        assert "damaged or cut off" in refusal(path)


def test_flipped_bits_in_a_keras_file_are_noticed(model, tmp_path):
    model.save(tmp_path / "net.keras")
    whole = (tmp_path / "net.keras").read_bytes()
    for place in np.random.default_rng(0).integers(len(whole) // 4, len(whole) // 2, 5):
        content = bytearray(whole)
        content[place] ^= 1
        (tmp_path / "net.keras").write_bytes(content)
        assert "CRC" in refusal(tmp_path / "net.keras")


@pytest.mark.parametrize("number", ["7", "²"])
def test_a_variable_that_the_layer_does_not_have(number, model, tmp_path):
    path = tmp_path / "net.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        (layer,) = (g for g in file["layers"].values() if g["vars"].attrs["name"] == "Conv1")
        layer["vars"].move("0", number)
    assert f"Conv1/{number}" in readers.read(path).tensors
    with pytest.raises(UserError, match=rf"missing: Conv1/kernel; .*network: Conv1/{number}"):
        importer.load(path)


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_a_member_too_large_for_any_such_network_is_not_unpacked(member, model, tmp_path):
    path = tmp_path / "net.keras"
    model.save(path)
    content = bytearray(path.read_bytes())
    # The record of a member, with its size, begins 46 bytes before its name in the directory.
    record = content.rindex(member.encode()) - 46
    assert content[record : record + 4] == b"PK\1\2"
    content[record + 24 : record + 28] = (15 << 28).to_bytes(4, "little")
    path.write_bytes(content)
    assert f"it unpacks to 3.8 GiB, its {member} to 3.8" in refusal(path)
