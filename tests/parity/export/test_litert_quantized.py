"""Networks that were trained in 8 bits: JAX's roundings are those of LiteRT's 8-bit files."""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from flax.traverse_util import flatten_dict

from mbv2_jax import model_dir, tasks
from mbv2_jax.data import sources
from mbv2_jax.errors import UserError
from mbv2_jax.export import litert
from mbv2_jax.export.formats import Options
from mbv2_jax.export.litert import flatbuffer, layers, precision
from mbv2_jax.export.program import Program
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.models.layers import Rounding
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.classification import settings as classification
from mbv2_jax.tasks.detection import settings as detection
from mbv2_jax.tasks.segmentation import settings as segmentation
from tests.support import commands, tiny_model

NAMES = ("cat", "dog", "eel")
HEADS: dict[str, Any] = {
    "classification": classification.Head(3, hidden=(20,)),
    "segmentation": segmentation.Head(3, (6,)),
    "detection": detection.Head(
        3, ("layer7", "last"), extra_channels=(16,), anchor_sizes=(0.2, 0.4, 0.6, 0.8)
    ),
}


# Some of the layers of each head; the file's output is in floats, and not among its 8-bit tensors.
OF_HEAD = {
    "classification": {"last", "hidden_0"},
    "segmentation": {"projection"},
    "detection": {"last", "class_logits0", "box_depthwise1", "box_codes2"},
}


def model(task: str, folder: pathlib.Path, *, seen: bool = True) -> SavedModel:
    """Returns a random model whose ranges are those of one batch, if it has seen one."""
    made_for = tasks.find(task).for_model(HEADS[task], NAMES)
    backbone = Backbone(width=0.35)
    if task == "segmentation":
        backbone = Backbone(width=0.35, output_stride=16, last_convolution=False)
    spec = ModelSpec(
        task,
        backbone,
        HEADS[task],
        Preprocessing(33, "resize(size)", tiny_model.MEAN, tiny_model.STD),
        TrainingMode(quantize="int8"),
    )
    saved = model_dir.read(tiny_model.write_for(made_for, spec, folder / "model"))
    batch_stats = jax.tree_util.tree_map_with_path(
        lambda path, array: array * (path[-1].key not in ("low", "high")), saved.batch_stats
    )
    saved = dataclasses.replace(saved, batch_stats=batch_stats)
    if seen:
        _, updated = saved.module().apply(
            saved.variables(), normalised(saved), mutable=["batch_stats"]
        )
        saved = dataclasses.replace(saved, batch_stats=jax.device_get(updated["batch_stats"]))
    return saved


def pixels() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (20, 5, 5, 3), dtype=np.uint8)
    return coarse.repeat(7, 1).repeat(7, 2)[:, :33, :33]


def normalised(saved: SavedModel) -> np.ndarray:
    return np.asarray(saved.spec.preprocessing.normalize(pixels()))


def written(saved: SavedModel, folder: pathlib.Path, input: str = "uint8", **options: Any) -> Any:
    program = Program(saved, 1, input)
    litert.write(program, folder / "m.tflite", Options("int8", **options))
    return program, litert.open_file(folder / "m.tflite")


def of_file(file: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    rows = [file(image[None]) for image in images]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def steps_of_file(path: pathlib.Path, image: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    """Returns the 8-bit activations of a file by the names of its tensors, and their steps."""
    run = Interpreter(str(path), experimental_preserve_all_tensors=True)
    run.allocate_tensors()
    run.set_tensor(run.get_input_details()[0]["index"], image)
    run.invoke()
    found = {}
    for tensor in run.get_tensor_details():
        step, zero = tensor["quantization"]
        if tensor["dtype"] == np.int8 and step:
            numbers = run.get_tensor(tensor["index"])
            found[tensor["name"]] = ((numbers.astype(np.float32) - zero) * step, step)
    return found


@pytest.mark.parametrize("task", list(HEADS))
def test_the_file_computes_what_the_network_rounds(task, tmp_path, few_layers):
    saved = model(task, tmp_path)
    program, _ = written(saved, tmp_path, "normalised")
    # Training does not round its images, and so this is one that the file takes as it is.
    ends = precision.input_range(program)
    scale = (ends["max"] - ends["min"]) / 255
    zero = np.round(-128 - ends["min"] / scale)
    image = ((pixels()[:1].astype(np.float32) - 128 - zero) * scale).astype(np.float32)
    in_file = steps_of_file(tmp_path / "m.tflite", image)
    _, state = saved.module().apply(
        saved.variables(),
        image,
        capture_intermediates=lambda module, _: isinstance(module, Rounding),
        mutable=["intermediates"],
    )
    rounded = flatten_dict(state["intermediates"], sep="/")
    operators = flatbuffer.operators(flatbuffer.convert(precision.for_8_bits(program)))
    compared = set()
    for operator, layer in layers.by_operator(operators, program).items():
        place = layer.removesuffix("/conv")
        for name in (f"{place}/range/__call__", f"{place}_range/__call__"):
            if name in rounded and operator.name in in_file:
                values, step = in_file[operator.name]
                difference = abs(values - rounded[name][0].reshape(values.shape)).mean()
                # Sums half-way between two steps are rounded up or down, and every layer makes more
                # of that. With random numbers, these would be a third of 256 steps apart.
                most = 0.05 if place.startswith(("stem", "layer")) else 1
                assert difference < most * step, (layer, difference / step)
                compared.add(place)
    assert {"stem", "layer1_0/depthwise", "layer7_0/project"} <= compared
    assert OF_HEAD[task] <= compared


def test_ranges_are_those_of_training_and_not_of_photos(tmp_path, few_layers):
    saved = model("classification", tmp_path)
    ends = saved.batch_stats["classifier_range"]
    _, file = written(saved, tmp_path, integer_io=True)
    scale, zero = file._outputs["logits"]["quantization"]
    np.testing.assert_allclose(scale, (ends["high"] - ends["low"]) / 255, rtol=1e-6)
    assert zero == round(-128 - ends["low"] / scale)
    (tmp_path / "m.tflite").unlink()
    black = np.zeros((1, 33, 33, 3), np.uint8)
    _, same = written(saved, tmp_path, integer_io=True, calibration=black)
    assert same._outputs["logits"]["quantization"] == (scale, zero)


def test_ranges_that_training_did_not_give_come_from_photos(tmp_path, few_layers):
    unseen = model("classification", tmp_path, seen=False)
    with pytest.raises(UserError, match=r"has seen no batch: give --calibrate=PHOTOS"):
        written(unseen, tmp_path)
    assert not (tmp_path / "m.tflite").exists()
    program, file = written(unseen, tmp_path, calibration=pixels())
    floats = jax.jit(program)(pixels())["logits"]
    assert abs(of_file(file, pixels())["logits"] - floats).mean() < 0.1 * abs(floats).max()

    boxes = model("detection", tmp_path / "boxes")
    with pytest.raises(UserError, match=r"did not round all of these activations in training"):
        written(boxes, tmp_path / "boxes", integer_io=True)
    _, file = written(boxes, tmp_path / "boxes", integer_io=True, calibration=pixels())
    assert file.metadata["integer_io"] and file.metadata["outputs"]["boxes"][1] == "int8"


def test_some_layers_in_floats_and_several_images(tmp_path, few_layers):
    saved = model("classification", tmp_path)
    program = Program(saved, 2)
    litert.write(program, tmp_path / "m.tflite", Options("int8", keep_float=("classifier",)))
    file = litert.open_file(tmp_path / "m.tflite")
    assert file.operators["FULLY_CONNECTED"] == 2 and file.operators["DEQUANTIZE"] == 1
    floats = jax.jit(program)(pixels())["logits"]
    parts = [file(pixels()[start : start + 2])["logits"] for start in range(0, 20, 2)]
    assert abs(np.concatenate(parts) - floats).mean() < 0.1 * abs(floats).max()


def test_a_model_is_fine_tuned_and_exported_by_two_commands(tmp_path, cache):
    tiny_model.write(tmp_path / "float")
    numbers = itertools.count()
    for name in tiny_model.CLASSES:
        for part in ("train", "val"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for _ in range(2):
                number = next(numbers)
                tiny_model.photo(number).save(tmp_path / "photos" / part / name / f"{number}.png")
    train = ["--config=finetune_int8", "--workdir=run", "--checkpoint=float"]
    train += ["--config.data.source=folder:photos", "--config.num_epochs=2"]
    train += ["--config.batch_size=4"]
    refused = ["--config.model.norm_eval=false"]
    whole = {"module": commands.WHOLE, "cwd": tmp_path}
    status, _, err = commands.run(cache, *train, *refused, **whole)
    assert status == 2 and "Give --config.model.norm_eval=true" in err
    status, out, err = commands.run(cache, *train, **whole)
    assert status == 0, err
    assert "classifier included" in err
    export = ["run", "--to=litert", "--precision=int8", "--output=m.tflite", "--json"]
    where = {"module": "mbv2_jax.export", "cwd": tmp_path}
    status, _, err = commands.run(cache, *export, **where)
    assert status == 2 and "--precision=int8 needs --check=PHOTOS" in err
    status, out, err = commands.run(cache, *export, "--check", "photos", **where)
    assert (status, err) == (0, ""), err
    report = json.loads(out)
    assert report["operators"]["CONV_2D"] == 35
    assert report["operators"]["ADD"] == 11  # as narrow a network adds in layer1, too
    assert report["operators"]["DEQUANTIZE"] == 1  # the logits


@pytest.mark.slow
def test_digits_are_named_as_well_in_8_bits(tmp_path):
    """The demo, its fine-tuning in 8 bits, and 8 bits without that, on the 360 held-out digits."""
    # With XLA's optimizations, as a user runs it.
    where = {"module": commands.WHOLE, "cwd": tmp_path, "env": {"XLA_FLAGS": ""}}
    assert commands.run(None, "--config=digits", "--workdir=float", **where)[0] == 0
    tune = ["--config=finetune_int8", "--checkpoint=float", "--workdir=tuned"]
    tune += ["--config.data.source=digits", "--config.data.eval_split=test"]
    tune += ["--config.data.train_transforms=resize(size)|random_crop(size, padding=3)"]
    assert commands.run(None, *tune, **where)[0] == 0

    split = sources.open_source("digits", "test")
    examples = [split[place] for place in range(len(split))]
    labels = np.array([example.targets["label"] for example in examples])
    right = {}
    for name, calibrate in (("float", ["--calibrate", "config:digits"]), ("tuned", [])):
        saved = model_dir.read(tmp_path / name)
        prepared = np.stack([saved.spec.preprocessing.prepare(e.image) for e in examples])
        right[f"{name} in floats"] = (
            jax.jit(Program(saved))(prepared)["logits"].argmax(-1) == labels
        ).mean()
        export = [name, "--to=litert", "--precision=int8", f"--output={name}.tflite", *calibrate]
        export += ["--check", "config:digits"]
        status, _, err = commands.run(None, *export, module="mbv2_jax.export", cwd=tmp_path)
        assert status == 0, err
        logits = of_file(litert.open_file(tmp_path / f"{name}.tflite"), prepared)["logits"]
        right[f"{name} in 8 bits"] = (logits.argmax(-1) == labels).mean()
    assert len(labels) == 360 and right["float in floats"] > 0.97
    assert right["tuned in 8 bits"] >= right["float in floats"] - 0.01, right
    assert right["tuned in 8 bits"] >= right["float in 8 bits"], right
