"""ONNX files of small random networks of every kind; and what is refused."""

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import torch
from jax import lax

from mbv2_jax import command_line, inference, tasks
from mbv2_jax.errors import UserError
from mbv2_jax.export import __main__ as command
from mbv2_jax.export import onnx as onnx_files
from mbv2_jax.export.formats import Options
from mbv2_jax.export.onnx import operations
from mbv2_jax.export.program import Program, resized
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.classification import settings as classification
from mbv2_jax.tasks.detection import settings as detection
from mbv2_jax.tasks.segmentation import settings as segmentation
from tests.support import tiny_model

NAMES = ("cat", "dog", "eel")
SIZES = (0.2, 0.4, 0.6, 0.8)  # of anchors
SSDLITE = detection.Head(
    3, ("layer7", "last"), extra_channels=(16,), anchor_sizes=SIZES, candidates=5000
)
# float32 rounds at 6e-8 of a map, and a network has 60 layers at most; scaled by the arrays' size.
ROUNDING = 1e-3


def program(
    folder: pathlib.Path,
    head: Any,
    size: int = 33,
    batch: int | None = None,
    input: str = "uint8",
    **backbone: Any,
) -> Program:
    """Returns a random network of a task, which the head decides."""
    task = type(head).__module__.split(".")[-2]
    pixels = Preprocessing(size, "resize(size)", tiny_model.MEAN, tiny_model.STD)
    spec = ModelSpec(task, Backbone(**{"width": 0.1} | backbone), head, pixels)
    path = tiny_model.write_for(tasks.find(task).for_model(head, NAMES), spec, folder / "model")
    return Program(inference.open_model(path, seed=0), batch, input)


def images(of: Program, count: int) -> np.ndarray:
    pixels = np.random.default_rng(0).uniform(0, 255, (count, *of.size, 3))
    return pixels.astype(of.dtype)


def exported(of: Program, folder: pathlib.Path, **options: Any) -> Any:
    onnx_files.write(of, folder / "m.onnx", Options(**options))
    return onnx_files.open_file(folder / "m.onnx", threads=1)


def assert_is_jaxs(of: Program, session: Any, counts: tuple[int, ...]) -> None:
    for count in counts:
        pixels = images(of, count)
        expected, found = jax.jit(of)(pixels), session(pixels)
        assert set(found) >= set(expected)
        for name, array in expected.items():
            # Boxes are sums and differences of numbers as large as the image.
            side = max(of.size) if name == "boxes" else 1
            assert np.ptp(array) > 0.1
            np.testing.assert_allclose(found[name], array, rtol=ROUNDING, atol=side * ROUNDING)


# Those of all layers take seconds to compile; the others have two blocks.
@pytest.mark.parametrize(
    ("head", "size", "batch", "whole", "backbone"),
    [
        (classification.Head(3), 64, None, True, {"width": 0.35}),
        (classification.Head(3), 45, 8, False, {"width": 1.4, "padding": "same"}),
        (classification.Head(3, hidden=(20,)), 33, 1, False, {"depth": 1.2}),
        (classification.Head(3), 33, 1, True, {"depth": 1.2, "padding": "same"}),
        (segmentation.Head(3), 33, 8, False, {"width": 1.4, "output_stride": 16}),
        (segmentation.Head(3, (2, 4)), 65, None, True, {"width": 0.35, "output_stride": 8}),
        (
            segmentation.Head(3, (6,), align_corners=False),
            47,
            None,
            False,
            {"padding": "same", "output_stride": 16, "depth": 1.2, "last_convolution": False},
        ),
        (SSDLITE, 49, 8, False, {"width": 1.4}),
        (SSDLITE, 65, None, True, {"width": 0.35, "depth": 1.2, "padding": "same"}),
        (dataclasses.replace(SSDLITE, scores="sigmoid"), 33, 1, False, {}),
    ],
)
def test_a_network_agrees_with_jax(head, size, batch, whole, backbone, tmp_path, request):
    if not whole:
        request.getfixturevalue("few_layers")
    made = program(tmp_path, head, size, batch, **backbone)
    session = exported(made, tmp_path)
    assert_is_jaxs(made, session, (batch,) if batch else (1, 8))
    assert session.operators["Transpose"] <= 2 + 6
    if head is SSDLITE:  # of three maps; its boxes take an Exp each
        assert (session.operators["Softmax"], session.operators["Exp"]) == (3, 3)
    assert not {"ReduceSum", "ReduceMax", "Max", "Min", "BatchNormalization", "MatMul"} & set(
        session.operators
    )


@pytest.mark.parametrize("input", ["uint8", "float32", "normalised"])
def test_images_may_have_channels_first(input, tmp_path, few_layers):
    made = program(tmp_path, classification.Head(3), batch=2, input=input)
    session = exported(made, tmp_path, nchw=True)
    assert_is_jaxs(made, session, (2,))
    assert "Transpose" not in session.operators
    assert ("Sub" in session.operators) == (input != "normalised")
    (taken,) = onnx.load(tmp_path / "m.onnx").graph.input
    assert [dim.dim_value for dim in taken.type.tensor_type.shape.dim] == [2, 3, 33, 33]


@pytest.mark.parametrize("clip_first", [True, False])
def test_nms_chooses_what_jax_does(clip_first, tmp_path, few_layers):
    head = dataclasses.replace(
        SSDLITE, clip_first=clip_first, score_threshold=0.5, max_detections=1000
    )
    square = program(tmp_path, head)
    made = Program(resized(square.saved, (21, 17)))
    session = exported(made, tmp_path, suppress=True)
    arrays = session(images(made, 2))
    found = jax.device_get(made.task.from_exported(arrays, made.size))
    image, label, anchor = arrays["selected"].T
    for k in range(2):
        there = found["labels"][k] >= 0
        mine = image == k
        scores = arrays["scores"][k, anchor[mine], label[mine]]
        boxes = arrays["boxes"][k, anchor[mine]].clip(0, [17, 21, 17, 21])
        order = np.argsort(-scores, kind="stable")
        assert 10 < there.sum() < 1000
        np.testing.assert_array_equal(label[mine][order], found["labels"][k][there])
        np.testing.assert_array_equal(boxes[order], found["boxes"][k][there])


def test_scales_name_the_size_that_is_meant():
    """ONNX rounds old * scale down, and torch has the same scale in float64."""
    for old in (1, 2, 3, 7, 17, 33, 49, 65):
        for new in range(1, 514):
            scale = operations._scale(old, new)
            assert int(np.float32(old) * scale) == int(old * float(scale)) == new
            assert abs(float(scale) * old / new - 1) < 2e-7  # float32 rounds at 6e-8


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [31, 33, 97])
def test_resize_is_torchs(align_corners, size, tmp_path, few_layers):
    """The file's Resize of its own coarse logits."""
    head = segmentation.Head(3, align_corners=align_corners)
    made = program(tmp_path, head, size, 1, output_stride=16)
    onnx_files.write(made, tmp_path / "m.onnx", Options())
    model = onnx.load(tmp_path / "m.onnx")
    (resize,) = (node for node in model.graph.node if node.op_type == "Resize")
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(resize.input[0], onnx.TensorProto.FLOAT, None)
    )
    onnx.save(model, tmp_path / "m.onnx")
    arrays = onnx_files.open_file(tmp_path / "m.onnx")(images(made, 1))
    coarse = torch.from_numpy(arrays[resize.input[0]])
    resized = torch.nn.functional.interpolate(
        coarse, (size, size), mode="bilinear", align_corners=align_corners
    )
    expected = resized.numpy().transpose(0, 2, 3, 1)
    # A few float32 roundings of numbers up to 10, and of positions up to 97.
    np.testing.assert_allclose(arrays["logits"], expected, rtol=0, atol=1e-4)


def test_an_array_that_does_not_depend_on_images_is_an_output(tmp_path, few_layers, monkeypatch):
    made = program(tmp_path, classification.Head(3), batch=1)
    monkeypatch.setattr(
        type(made.task),
        "exported",
        lambda self, y: {"logits": y, "same": y, "two": 2 * jnp.ones(2)},
    )
    arrays = exported(made, tmp_path)(images(made, 1))
    np.testing.assert_array_equal(arrays["same"], arrays["logits"])
    np.testing.assert_array_equal(arrays["two"], [2, 2])


@pytest.mark.parametrize(
    ("of", "batch", "says"),
    [
        (lax.cumsum, 2, "ONNX has no counterpart of cumsum as it is used in the program: export"),
        # A loop holds a program, as a call does.
        (lambda y: lax.scan(lambda c, x: (c, x + c), 0.0, y)[1], 2, "no counterpart of scan"),
        (lambda y: y @ y.T, 2, "ONNX has no counterpart of dot_general"),
        (lambda y: y.sum(0), None, "the program mixes images, and so .*: give --batch=1"),
        (jnp.zeros_like, None, "logits do not depend on the images, and so .*: give --batch=1"),
    ],
)
def test_what_has_no_counterpart_is_refused(of, batch, says, tmp_path, few_layers, monkeypatch):
    made = program(tmp_path, classification.Head(3), batch=batch)
    monkeypatch.setattr(type(made.task), "exported", lambda self, y: {"logits": of(y)})
    with pytest.raises(UserError, match=says):
        onnx_files.write(made, tmp_path / "m.onnx", Options())
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: b"no file"])
def test_a_damaged_file_is_refused(damage, tmp_path, few_layers):
    made = program(tmp_path, classification.Head(3), batch=1)
    exported(made, tmp_path)
    file = tmp_path / "m.onnx"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"m\.onnx is no file of .*--to=onnx"):
        onnx_files.open_file(file)
    with pytest.raises(UserError, match=r"cannot be read: .*No such file"):
        onnx_files.open_file(tmp_path / "none.onnx")


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(command.main)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(stopped.value.code or 0), captured.out, captured.err


def test_the_command(tmp_path, few_layers, monkeypatch, capsys):
    program(tmp_path, SSDLITE)
    output = tmp_path / "m.onnx"
    arguments = (tmp_path / "model", "--to=onnx", f"--output={output}")
    code, out, err = run(monkeypatch, capsys, *arguments, "--nms", "--layout=nchw")
    assert code == 0, err
    assert "1 NonMaxSuppression" in out
    assert onnx_files.open_file(output).metadata["layout"] == "nchw"
    output.unlink()

    wrong: Any = operations._elementwise("Sigmoid")
    monkeypatch.setattr(operations, "OPERATIONS", {**operations.OPERATIONS, "exp": wrong})
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 1 and "was deleted: its boxes are up to" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_nms_is_for_detectors(tmp_path, few_layers, monkeypatch, capsys):
    program(tmp_path, classification.Head(3))
    arguments = (tmp_path / "model", "--to=onnx", f"--output={tmp_path / 'm.onnx'}", "--nms")
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "--nms is for objects" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
