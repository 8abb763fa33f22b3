"""Files of TensorFlow.js that are no layers model, or lack a part, are refused by what they are.

Whole models are tested with the weights of live Keras, in tests/parity/convert.
"""

import json
import pathlib
import zipfile
from typing import Any

import numpy as np
import pytest

from mbv2_jax.convert import readers
from tests.support.weight_files import refusal

KERNEL = np.arange(6, dtype=np.float32).reshape(3, 2)


def description(paths: list[str], **spec: Any) -> dict[str, Any]:
    """Returns model.json of a model with one dense layer."""
    weight = {"name": "dense/kernel", "shape": [3, 2], "dtype": "float32", **spec}
    dense = {"class_name": "Dense", "config": {"name": "dense", "units": 2, "use_bias": False}}
    sequential = {"class_name": "Sequential", "config": {"name": "model", "layers": [dense]}}
    return {
        "format": "layers-model",
        "modelTopology": {"keras_version": "2.4.0", "model_config": sequential},
        "weightsManifest": [{"paths": paths, "weights": [weight]}],
    }


def write(folder: pathlib.Path, model: Any, content: bytes = KERNEL.tobytes()) -> pathlib.Path:
    (folder / "weights.bin").write_bytes(content)
    (folder / "model.json").write_text(json.dumps(model))
    return folder / "model.json"


def test_layers_model(tmp_path):
    path = write(tmp_path, description(["weights.bin"]))
    file = readers.read(path)
    assert file.container == "tfjs"
    np.testing.assert_array_equal(file.tensors["dense/kernel"], KERNEL, strict=True)


def test_a_folder_is_answered_with_its_file(tmp_path):
    write(tmp_path, description(["weights.bin"]))
    assert f"give its {tmp_path / 'model.json'}" in refusal(tmp_path)


def test_graph_model(tmp_path):
    model = {"format": "graph-model", "modelTopology": {"node": []}, "weightsManifest": []}
    assert "graph model" in refusal(write(tmp_path, model))


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["shard.bin"], "'shard.bin', which is not beside it"),
        (["../weights.bin"], "lie elsewhere"),
        (["/etc/hostname"], "lie elsewhere"),
        (["https://example.org/weights.bin"], "lie elsewhere"),
        (["weights.bin", "weights.bin"], "lists a file of weights twice"),
        (["weights.bin", "a/../weights.bin"], "lists a file of weights twice"),
    ],
)
def test_files_of_weights(paths, reason, tmp_path):
    assert reason in refusal(write(tmp_path, description(paths)))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"shape": [3, 3]}, "need more bytes than the 24"),
        ({"shape": [1 << 40, 1 << 40]}, "need more bytes"),
        ({"shape": [2, 2]}, "take 16 bytes, and weights.bin have 24"),
        ({"shape": [-3, -2]}, "has the shape [-3, -2]"),
        ({"shape": ["3", 2]}, "has the shape"),
        ({"name": "dense\n/kernel"}, "is named 'dense\\n/kernel'"),
        ({"dtype": "string"}, "is of type 'string'"),
        ({"dtype": None}, "is of type None"),
        ({"quantization": {"dtype": "uint8", "min": 0.0, "scale": 1.0}}, "take 6 bytes"),
        ({"shape": None}, "damaged"),
    ],
)
def test_arrays(spec, reason, tmp_path):
    assert reason in refusal(write(tmp_path, description(["weights.bin"], **spec)))


def test_two_arrays_of_a_name(tmp_path):
    model = description(["weights.bin"])
    (group,) = model["weightsManifest"]
    group["weights"] *= 2
    assert "two arrays named dense/kernel" in refusal(write(tmp_path, model, bytes(48)))


@pytest.mark.parametrize("text", ["", "{", '{"modelTopology": 3}', '{"modelTopology": {}}', "[1]"])
def test_other_json(text, tmp_path):
    (tmp_path / "model.json").write_text(text)
    refusal(tmp_path / "model.json")


def test_zip(tmp_path):
    write(tmp_path, description(["weights.bin"]))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name in ("model.json", "weights.bin"):
            archive.write(tmp_path / name, f"my model/{name}")
    tensors = readers.read(tmp_path / "model.zip").tensors
    np.testing.assert_array_equal(tensors["dense/kernel"], KERNEL, strict=True)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.write(tmp_path / "model.json", "model.json")
    assert "'weights.bin', which is not beside it" in refusal(tmp_path / "model.zip")
