"""LiteRT files of small random networks: the same results as JAX's, in LiteRT alone."""

import json
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from mbv2_jax import command_line, inference, tasks
from mbv2_jax.errors import UserError
from mbv2_jax.export import __main__ as command
from mbv2_jax.export import litert
from mbv2_jax.export.formats import Options
from mbv2_jax.export.program import Program, resized
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.classification import settings as classification
from mbv2_jax.tasks.detection import settings as detection
from mbv2_jax.tasks.segmentation import settings as segmentation
from tests.support import tiny_model
from tests.support.convert_command import make_run

NAMES = ("cat", "dog", "eel")
HEADS: dict[str, Any] = {
    "classification": classification.Head(3),
    "segmentation": segmentation.Head(3, (6,)),
    "detection": detection.Head(
        3, ("layer7", "last"), extra_channels=(16,), anchor_sizes=(0.2, 0.4, 0.6, 0.8)
    ),
}
CONVOLUTIONS = {"CONV_2D", "DEPTHWISE_CONV_2D"}
# Every operator of the three tasks, for a known number of images.
NATIVE = CONVOLUTIONS | {
    *("ADD", "BROADCAST_TO", "CAST", "CONCATENATION", "EXP", "FULLY_CONNECTED", "LOGISTIC"),
    *("MAXIMUM", "MEAN", "MINIMUM", "MUL", "PAD", "RESHAPE", "RESIZE_BILINEAR", "SLICE"),
    *("SOFTMAX", "SUB"),
}


def model(
    task: str,
    folder: pathlib.Path,
    head: Any = None,
    mean: tuple[float, ...] = tiny_model.MEAN,
    std: tuple[float, ...] = tiny_model.STD,
    **backbone: Any,
) -> SavedModel:
    """Returns a model with random weights."""
    if task == "segmentation":
        backbone = {"output_stride": 16, "last_convolution": False, **backbone}
    head = head or HEADS[task]
    pixels = Preprocessing(33, "resize(size)", mean, std)
    spec = ModelSpec(task, Backbone(**{"width": 0.1, **backbone}), head, pixels)
    tiny_model.write_for(tasks.find(task).for_model(head, NAMES), spec, folder / "model")
    return inference.open_model(folder / "model", seed=0)


def images(program: Program, count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    if program.input == "normalised":
        return generator.uniform(-2, 2, (count, *program.size, 3)).astype(np.float32)
    return generator.integers(0, 256, (count, *program.size, 3)).astype(program.dtype)


def furthest(found: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> float:
    """Returns the largest difference of the arrays; relative where they are above 1."""
    assert found.keys() == expected.keys()
    differences = []
    for name, theirs in expected.items():
        assert found[name].shape == theirs.shape
        differences.append((abs(found[name] - theirs) / np.maximum(1, abs(theirs))).max())
    return float(max(differences))


# Convolutions sum in another order: float32 rounds at 6e-8, in up to 60 layers, and exp and the
# softmax of a detector make more of it.
EQUAL = 1e-4


@pytest.mark.parametrize("batch", [1, 8, None])
@pytest.mark.parametrize("task", list(HEADS))
def test_every_task_takes_as_many_images_as_it_is_exported_for(task, batch, tmp_path, few_layers):
    program = Program(model(task, tmp_path, padding="same"), batch)
    litert.write(program, tmp_path / "m.tflite", Options())
    file = litert.open_file(tmp_path / "m.tflite")
    for count in [batch] if batch else [1, 3]:
        pixels = images(program, count)
        assert furthest(file(pixels), jax.jit(program)(pixels)) < EQUAL
    if batch:
        assert set(file.operators) <= NATIVE
    assert not {kind for kind in file.operators if kind.startswith(("STABLEHLO", "CUSTOM"))}


@pytest.mark.parametrize("size", [(32, 32), (33, 47)], ids=str)
@pytest.mark.parametrize(
    "backbone",
    [
        {"width": 0.35, "padding": "torch"},
        {"width": 1.4, "padding": "same"},
        {"width": 0.1, "depth": 1.2, "padding": "torch"},
        {"width": 0.1, "output_stride": 8, "padding": "same"},
    ],
    ids=str,
)
def test_every_kind_of_classifier(backbone, size, tmp_path):
    """The whole network; 35 convolutions with ReLU6 in them, where the depth is not changed."""
    program = Program(resized(model("classification", tmp_path, **backbone), size), 1)
    litert.write(program, tmp_path / "m.tflite", Options())
    file = litert.open_file(tmp_path / "m.tflite")
    pixels = images(program, 1)
    assert furthest(file(pixels), jax.jit(program)(pixels)) < EQUAL
    kinds = dict(file.operators)
    if "depth" not in backbone:
        assert (kinds["CONV_2D"], kinds["DEPTHWISE_CONV_2D"]) == (35, 17)
    assert not kinds.keys() & {"RELU6", "MINIMUM", "MAXIMUM", "TRANSPOSE", "RELU"}
    if backbone["padding"] == "same":  # as LiteRT's own convolutions pad
        assert "PAD" not in kinds


@pytest.mark.parametrize("kind", ["uint8", "float32", "normalised"])
@pytest.mark.parametrize("hidden", [(), (7,)], ids=["", "hidden layer"])
def test_every_input(kind, hidden, tmp_path, few_layers):
    head = classification.Head(3, hidden=hidden)
    program = Program(model("classification", tmp_path, head), 2, kind)
    litert.write(program, tmp_path / "m.tflite", Options())
    pixels = images(program, 2)
    found = litert.open_file(tmp_path / "m.tflite", threads=2)(pixels)
    assert furthest(found, jax.jit(program)(pixels)) < EQUAL


# What a person without this package writes.
ALONE = """
import json, sys, zipfile
import numpy as np
from ai_edge_litert.interpreter import Interpreter

assert "mbv2_jax" not in sys.modules and "jax" not in sys.modules
run = Interpreter(sys.argv[1]).get_signature_runner("serving_default")
with zipfile.ZipFile(sys.argv[1]) as archive:
    print(archive.read("labels.txt").decode().split())
    print(json.loads(archive.read("mbv2_jax.json"))["mean"])
np.savez(sys.argv[3], **run(images=np.load(sys.argv[2])))
assert "mbv2_jax" not in sys.modules and "jax" not in sys.modules
"""


@pytest.mark.parametrize("task", list(HEADS))
def test_litert_alone_runs_a_file(task, tmp_path, few_layers):
    program = Program(model(task, tmp_path), 1)
    litert.write(program, tmp_path / "m.tflite", Options())
    np.save(tmp_path / "images.npy", images(program, 1))
    arguments = [str(tmp_path / name) for name in ("m.tflite", "images.npy", "arrays.npz")]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(list(NAMES)), str(list(tiny_model.MEAN))]
    with np.load(tmp_path / "arrays.npz") as found:
        assert furthest(dict(found), jax.jit(program)(images(program, 1))) < EQUAL


@pytest.mark.parametrize("task", list(HEADS))
def test_8_bits_of_every_task(task, tmp_path, few_layers):
    """Every convolution is in 8 bits, with a scale for each channel of weights."""
    program = Program(model(task, tmp_path), 1)
    pixels = images(program, 16)
    litert.write(program, tmp_path / "m.tflite", Options("int8", calibration=pixels))
    layers = constants_of_layers(tmp_path / "m.tflite")
    assert all(weights["dtype"] == np.int8 for weights in layers.values())
    assert all(
        len(weights["quantization_parameters"]["scales"]) == max(weights["shape"][0], 1)
        for name, weights in layers.items()
        if "depthwise" not in name
    )
    file = litert.open_file(tmp_path / "m.tflite")
    expected = jax.jit(program)(pixels[:1])
    for name, array in file(pixels[:1]).items():
        assert array.dtype == np.float32
        # 8 bits have 256 steps for each tensor, errors add up over the layers, and exp makes more
        # of those of a detector's boxes.
        limit = 0.25 if task == "detection" else 0.1
        assert abs(array - expected[name]).max() < limit * np.ptp(expected[name])


def constants_of_layers(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the details of the weights of each convolution and dense layer by its result."""
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # which replace operators
    interpreter = Interpreter(str(path), experimental_op_resolver_type=plain)
    details = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    return {
        details[op["outputs"][0]]["name"]: details[op["inputs"][1]]
        for op in interpreter._get_ops_details()
        if op["op_name"] in CONVOLUTIONS | {"FULLY_CONNECTED"}
    }


def test_layers_that_are_kept_in_floats(tmp_path, few_layers):
    program = Program(model("classification", tmp_path), 1)
    options = Options(
        "int8", calibration=images(program, 4), keep_float=("layer7_0/expand", "classifier")
    )
    litert.write(program, tmp_path / "m.tflite", options)
    floats = {
        name
        for name, weights in constants_of_layers(tmp_path / "m.tflite").items()
        if weights["dtype"] == np.float32
    }
    assert len(floats) == 2
    assert any("layer7_0/expand/conv" in name for name in floats)
    assert "serving_default_logits_output" in floats  # the classifier is last


@pytest.mark.parametrize("kind", ["uint8", "float32", "normalised"])
@pytest.mark.parametrize("task", list(HEADS))
def test_8_bit_inputs_and_outputs(task, kind, tmp_path, few_layers):
    program = Program(model(task, tmp_path), 1, kind)
    pixels = images(program, 8)
    options = Options("int8", calibration=pixels, integer_io=True)
    litert.write(program, tmp_path / "m.tflite", options)
    run = Interpreter(str(tmp_path / "m.tflite")).get_signature_runner()
    details = run.get_input_details()["images"]
    assert details["dtype"] == (np.uint8 if kind == "uint8" else np.int8)
    if kind != "normalised":
        assert details["quantization"] == (1, 0 if kind == "uint8" else -128)  # pixels - 128
    assert all(output["dtype"] == np.int8 for output in run.get_output_details().values())
    file = litert.open_file(tmp_path / "m.tflite")
    if task != "detection":  # its boxes are decoded in floats
        assert not file.operators.keys() & {"CAST", "DEQUANTIZE"}
    expected = jax.jit(program)(pixels[:1])
    for name, array in file(pixels[:1]).items():
        # As with outputs in floats, and their own rounding; exp makes more of the boxes' errors.
        limit = 0.25 if task == "detection" else 0.1
        assert abs(array - expected[name]).max() < limit * np.ptp(expected[name])


def test_a_bias_without_weights_stays(tmp_path, few_layers):
    """Channels without weights, as trained networks have them, give their bias in 8 bits, too."""
    program = Program(model("classification", tmp_path), 1)
    layer = program.params["layer7_0"]["depthwise"]["conv"]
    kernel, bias = np.array(layer["kernel"]), np.array(layer["bias"])
    kernel[..., ::2], bias[::2] = 0, 3
    layer["kernel"], layer["bias"] = kernel, bias
    pixels = images(program, 4)
    litert.write(program, tmp_path / "m.tflite", Options("int8", calibration=pixels))
    found = litert.open_file(tmp_path / "m.tflite")(pixels[:1])["logits"]
    expected = jax.jit(program)(pixels[:1])["logits"]
    # A few steps of 8 bits; without its bias, the network's logits are far away.
    assert abs(found - expected).max() < 0.03 * abs(expected).max()


def test_16_bit_weights(tmp_path):
    """Those of large layers: the file is little more than half as large."""
    program = Program(model("classification", tmp_path, width=0.5, padding="torch"), 1)
    litert.write(program, tmp_path / "whole.tflite", Options())
    litert.write(program, tmp_path / "half.tflite", Options("float16"))
    whole, half = (litert.open_file(tmp_path / f"{name}.tflite") for name in ("whole", "half"))
    bytes_ = {name: (tmp_path / f"{name}.tflite").stat().st_size for name in ("whole", "half")}
    assert bytes_["half"] < 0.62 * bytes_["whole"]
    pixels = images(program, 1)
    difference = furthest(half(pixels), whole(pixels))
    assert 0 < difference < 0.02  # float16 rounds at 5e-4
    assert half.operators["CONV_2D"] == whole.operators["CONV_2D"] == 35


def run_command(monkeypatch: Any, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(command.main)
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_the_command_writes_and_checks_8_bits(tmp_path, monkeypatch, capsys, few_layers):
    model("classification", tmp_path)
    (tmp_path / "photos").mkdir()
    for seed in range(8):
        tiny_model.photo(seed).save(tmp_path / "photos" / f"{seed}.png")
    file = tmp_path / "m.tflite"
    arguments = [tmp_path / "model", "--to=litert", f"--output={file}", "--json"]
    eight = ["--precision=int8", "--calibrate", tmp_path / "photos"]
    code, out, err = run_command(monkeypatch, capsys, *arguments, *eight)
    assert code == 0, err
    report = json.loads(out)
    assert report["agreement"] >= 7 / 8 and report["photos"] == 8
    assert report["bytes"] == file.stat().st_size
    assert set(report["milliseconds"]) == {"file", "jax", "float32"}
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("mbv2_jax.json"))["precision"] == "int8"
    before = sorted(tmp_path.rglob("*"))
    for wrong, says in (
        (["--keep-float=clasifier"], "--keep-float=clasifier: no layer has such a name; did you"),
        (["--batch=dynamic"], "--precision=int8 needs a number of images: give --batch=1"),
    ):
        code, out, err = run_command(monkeypatch, capsys, *arguments, *eight, *wrong, "--force")
        assert code == 2 and says in err and "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    ("mean", "std"), [(tiny_model.MEAN, tiny_model.STD), ((127.5,) * 3, (127.5,) * 3)], ids=str
)
def test_the_converter_reads_a_classifier_back(mean, std, precision, tmp_path, monkeypatch, capsys):
    """Another reader of .tflite files than LiteRT: weights, padding, classes, normalisation.

    LiteRT's converter moves a standard deviation that is common to the colours into the weights.
    """
    saved = model("classification", tmp_path, width=0.35, padding="same", mean=mean, std=std)
    program = Program(resized(saved, (64, 64)), 1)
    litert.write(program, tmp_path / "m.tflite", Options(precision))
    code, _, err = make_run(monkeypatch, capsys)(
        tmp_path / "m.tflite", f"--output={tmp_path / 'again'}"
    )
    assert code == 0, err
    again = Program(inference.open_model(tmp_path / "again", seed=0), 1)
    assert again.task.classes == NAMES
    assert again.saved.spec.preprocessing.mean == mean
    pixels = images(program, 1)
    limit = EQUAL if precision == "float32" else 0.02  # as above
    assert furthest(jax.device_get(jax.jit(again)(pixels)), jax.jit(program)(pixels)) < limit


@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: b"no file"])
def test_a_damaged_file_is_refused(damage, tmp_path, few_layers):
    file = tmp_path / "m.tflite"
    litert.write(Program(model("classification", tmp_path), 1), file, Options())
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"m\.tflite is no file of .*--to=litert"):
        litert.open_file(file)
