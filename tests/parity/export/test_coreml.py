"""Core ML packages: the same results as JAX's, computed with torch from the package alone."""

import json
import pathlib
import re
from typing import Any

import coremltools as ct
import jax
import numpy as np
import pytest

from mbv2_jax import inference, tasks
from mbv2_jax.errors import UserError
from mbv2_jax.export import __main__ as command
from mbv2_jax.export import coreml
from mbv2_jax.export.formats import Options
from mbv2_jax.export.program import Program
from mbv2_jax.export.report import BOUNDS
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.classification import settings as classification
from mbv2_jax.tasks.detection import settings as detection
from mbv2_jax.tasks.segmentation import settings as segmentation
from tests.support import commands, mil, tiny_model

NAMES = ("cat", "dog", "eel")
SSDLITE = detection.Head(
    3, ("layer7", "last"), extra_channels=(16,), anchor_sizes=(0.2, 0.4, 0.6, 0.8)
)
WEIGHTS = {
    "classification": "weights/mm_mobilenet_v2.pth",
    "detection": "golden/ssdlite_tf/frozen_inference_graph.pb",
    "segmentation": "golden/deeplab_tf/deeplabv3_257_mv_gpu.tflite",
}


def program(
    head: Any, folder: pathlib.Path, batch: int = 1, input: str = "uint8", **backbone: Any
) -> Program:
    """Returns a random network of a task, which the head decides."""
    task = type(head).__module__.split(".")[-2]
    pixels = Preprocessing(33, "resize(size)", tiny_model.MEAN, tiny_model.STD)
    spec = ModelSpec(task, Backbone(**{"width": 0.1} | backbone), head, pixels)
    path = tiny_model.write_for(tasks.find(task).for_model(head, NAMES), spec, folder / "model")
    return Program(inference.open_model(path, seed=0), batch, input)


def furthest(made: Program, package: pathlib.Path, images: np.ndarray) -> float:
    """Returns the largest difference from JAX; relative where an array is above 1."""
    found = mil.run(package, images.transpose(0, 3, 1, 2))
    expected = jax.jit(made)(images)
    return max(
        float((abs(found[name] - array) / np.maximum(1, abs(array))).max())
        for name, array in expected.items()
    )


# Convolutions sum in another order: float32 rounds at 6e-8, in up to 60 layers.
EQUAL = 1e-4


@pytest.mark.parametrize(
    ("head", "backbone"),
    [
        (classification.Head(3, hidden=(20,)), {"width": 0.35}),
        (classification.Head(3), {"width": 1.4, "padding": "same"}),
        (segmentation.Head(3, (2, 4)), {"output_stride": 8, "last_convolution": False}),
        (segmentation.Head(3, (6,), align_corners=False), {"output_stride": 16}),
        (SSDLITE, {"padding": "same"}),
    ],
)
def test_a_package_agrees_with_jax(head, backbone, tmp_path, few_layers):
    made = program(head, tmp_path, **backbone)
    coreml.write(made, tmp_path / "m.mlpackage", Options())
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (1, 33, 33, 3), dtype=np.uint8)
    assert furthest(made, tmp_path / "m.mlpackage", images) < EQUAL
    (taken,) = (
        ct.models.MLModel(str(tmp_path / "m.mlpackage"), skip_model_load=True)
        .get_spec()
        .description.input
    )
    assert (taken.name, taken.type.imageType.width) == ("images", 33)


@pytest.mark.parametrize("input", ["float32", "normalised"])
def test_images_may_be_arrays_of_floats(input, tmp_path, few_layers):
    made = program(classification.Head(3), tmp_path, 2, input)
    coreml.write(made, tmp_path / "m.mlpackage", Options())
    images = np.random.default_rng(0).uniform(-2, 2, (2, 33, 33, 3)).astype(np.float32)
    assert furthest(made, tmp_path / "m.mlpackage", images) < EQUAL
    spec = ct.models.MLModel(str(tmp_path / "m.mlpackage"), skip_model_load=True).get_spec()
    assert [output.name for output in spec.description.output] == ["logits"]


@pytest.mark.parametrize("task", list(WEIGHTS))
def test_trained_networks(task, check_data, tmp_path):
    made = Program(inference.open_model(check_data / WEIGHTS[task], seed=0), 1)
    coreml.write(made, tmp_path / "m.mlpackage", Options())
    for photo in sorted((check_data / "data" / "imagenet_sample").glob("*/*.JPEG"))[::125]:
        images = made.prepare(photo)[None]
        assert furthest(made, tmp_path / "m.mlpackage", images) < 1e-3
    operators = coreml.open_file(tmp_path / "m.mlpackage").operators
    if task == "classification":
        kinds = ("conv", "relu6", "add", "reduce_mean", "linear")
        assert [operators[kind] for kind in kinds] == [52, 35, 10, 1, 1]
    else:
        assert operators["conv"] >= 52 and "transpose" in operators
    coreml.write(made, tmp_path / "half.mlpackage", Options("float16"))
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name).rglob("*") if file.is_file())
        for name in ("m.mlpackage", "half.mlpackage")
    ]
    assert sizes[1] < 0.55 * sizes[0]
    if task == "classification":  # computed in 16-bit floats, too
        assert furthest(made, tmp_path / "half.mlpackage", images) < BOUNDS["float16"]


def test_a_package_says_what_it_is(tmp_path, few_layers):
    coreml.write(program(classification.Head(3), tmp_path), tmp_path / "m.mlpackage", Options())
    spec = ct.models.MLModel(str(tmp_path / "m.mlpackage"), skip_model_load=True).get_spec()
    outputs = {output.name for output in spec.description.output}
    assert outputs == {"logits", "classLabel", "classLabel_probs"}
    (classify,) = (
        operation
        for block in spec.mlProgram.functions["main"].block_specializations.values()
        for operation in block.operations
        if operation.type == "classify"
    )
    (labels,) = classify.inputs["classes"].arguments
    texts = [item.immediateValue.tensor.strings for item in labels.value.immediateValue.list.values]
    assert tuple(text.values[0] for text in texts) == NAMES
    facts = json.loads(spec.description.metadata.userDefined["mbv2_jax"])
    assert facts["classes"] == list(NAMES) and facts["eval_transforms"] == "resize(size)"

    made = program(segmentation.Head(3), tmp_path / "more", last_convolution=False)
    coreml.write(made, tmp_path / "masks.mlpackage", Options())
    spec = ct.models.MLModel(str(tmp_path / "masks.mlpackage"), skip_model_load=True).get_spec()
    kept = spec.description.metadata.userDefined
    assert kept["com.apple.coreml.model.preview.type"] == "imageSegmenter"
    shown = json.loads(kept["com.apple.coreml.model.preview.params"])
    assert shown["labels"] == list(NAMES)
    assert shown["colors"] == [
        "#" + "".join(f"{part:02x}" for part in colour)
        for colour in made.task.decoding()["palette"]
    ]


def test_the_command_says_that_it_ran_nothing(tmp_path, cache):
    tiny_model.write(tmp_path / "model")
    where = {"module": "mbv2_jax.export", "cwd": tmp_path}
    export = ["model", "--to=coreml", "--output=m.mlpackage"]
    status, out, err = commands.run(cache, *export, "--precision=float16", **where)
    assert (status, err) == (0, "")  # coremltools' progress bars and warnings are hidden
    assert "not run      only macOS runs Core ML packages: nothing was compared" in out
    assert "52 conv" in out and "1 classify" in out
    status, out, err = commands.run(cache, *export, "--force", "--json", **where)
    assert status == 0, err
    report = json.loads(out)
    assert report["not_run"] == "only macOS runs Core ML packages"
    assert report["difference"] == {} and report["photos"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--output=m.bin"], "m.bin: the name of a Core ML package ends in .mlpackage"),
        (["--batch=dynamic"], "--to=coreml needs a number of images: give --batch=1"),
        (["--batch=2"], "takes one image of pixels at a time: give --input=float32 too"),
        (["--precision=int8"], "--to=coreml has no --precision=int8: give float32 or float16"),
    ],
)
def test_mistakes_leave_nothing(arguments, says, tmp_path, few_layers, monkeypatch):
    program(classification.Head(3), tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        "sys.argv", ["export", "model", "--to=coreml", "--output=m.mlpackage", *arguments]
    )
    with pytest.raises(UserError, match=re.escape(says)):
        command.main()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_package_is_one_line(tmp_path, few_layers):
    coreml.write(program(classification.Head(3), tmp_path), tmp_path / "m.mlpackage", Options())
    (tmp_path / "m.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(b"x")
    with pytest.raises(UserError, match=r"m\.mlpackage is no file of .* --to=coreml"):
        coreml.open_file(tmp_path / "m.mlpackage")
