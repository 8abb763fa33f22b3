"""ONNX files of trained networks: in ONNX Runtime and OpenVINO, beside JAX and the frameworks."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import openvino
import pytest

from benchmarks import torch_peer
from mbv2_jax import inference
from mbv2_jax.export import formats, photos, report
from mbv2_jax.export import onnx as onnx_files
from mbv2_jax.export.formats import Options
from mbv2_jax.export.onnx.runtime import Session
from mbv2_jax.export.program import Program

FILES = {
    "classification": "weights/mm_mobilenet_v2.pth",
    "segmentation": "golden/deeplab_tf/deeplabv3_257_mv_gpu.tflite",
    "detection": "golden/ssdlite_tf/frozen_inference_graph.pb",
}
PHOTOS = 20
# float32 rounds at 6e-8 of a map, which 60 layers enlarge; logits and boxes are up to 300.
ROUNDING = 1e-3

# What a person without this package writes.
ALONE = """
import sys
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
names = [output.name for output in session.get_outputs()]
arrays = session.run(names, {"images": np.load(sys.argv[2])})
assert "mbv2_jax" not in sys.modules and "jax" not in sys.modules
np.savez(sys.argv[3], **dict(zip(names, arrays)))
"""


class Written:
    """A trained network's program, its file, and the file in ONNX Runtime."""

    def __init__(self, program: Program, path: pathlib.Path):
        self.program, self.path = program, path
        onnx_files.write(program, path, Options())
        self.session: Session = onnx_files.open_file(path, threads=1)


@pytest.fixture(scope="module")
def write(check_data, tmp_path_factory) -> Callable[[str], Written]:
    """Returns a function that writes a task's trained network, once."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def of_task(task: str) -> Written:
        saved = inference.open_model(check_data / FILES[task], seed=0)
        return Written(Program(saved), folder / f"{task}.onnx")

    return of_task


@pytest.fixture(params=list(FILES))
def written(request, write) -> Written:
    return write(request.param)


def test_a_file_agrees_with_jax_on_photos(written, check_data):
    images = photos.load(written.program, [str(check_data / "data" / "imagenet_val20")], "--check")
    assert len(images) == PHOTOS
    found = report.make(
        written.program, written.path, "onnx", formats.find("onnx"), "float32", images
    )
    assert max(found.difference.values()) < ROUNDING
    assert found.agreement is not None
    assert found.agreement > 0.999  # a pixel in a thousand may lie on an edge between two classes


def pictures(golden: np.lib.npyio.NpzFile) -> np.ndarray:
    return np.stack([golden[f"image_{k}_u8"] for k in range(10)])


def test_logits_are_mmpretrains(write, check_data):
    written = write("classification")
    golden = np.load(check_data / "golden" / "mmpretrain_eval.npz")
    paths = [
        str(next((check_data / "data" / "imagenet_sample").glob(f"*/{os.path.basename(name)}")))
        for name in golden["filename"][:PHOTOS]
    ]
    logits = written.session(photos.load(written.program, paths, "--check"))["logits"]
    np.testing.assert_allclose(logits, golden["logits"][:PHOTOS], rtol=0, atol=ROUNDING)


def test_classes_of_pixels_are_tensorflows(write, check_data):
    golden = np.load((check_data / FILES["segmentation"]).with_name("golden.npz"))
    found = write("segmentation").session(pictures(golden))["logits"].argmax(-1)
    theirs = np.stack([golden[f"argmax257_{k}"] for k in range(10)])
    # Their logits differ in the fifth digit, which decides on edges: 42 of 660,490 in JAX.
    assert (found != theirs).mean() < 3e-4


def test_detections_are_tensorflows(write, check_data):
    detector = write("detection")
    golden = np.load((check_data / FILES["detection"]).with_name("golden.npz"))
    program = detector.program
    found = program.task.from_exported(detector.session(pictures(golden)), program.size)
    for k in range(10):
        # As in JAX: the heads differ in the fifth digit, and so do scores and shares of the side.
        np.testing.assert_allclose(found["scores"][k], golden[f"det_scores_{k}"], rtol=0, atol=1e-4)
        ours = found["boxes"][k][:, [1, 0, 3, 2]] / 300
        np.testing.assert_allclose(ours, golden[f"det_boxes_{k}"], rtol=0, atol=1e-4)


def test_nms_in_the_file_chooses_tensorflows_detections(write, check_data, tmp_path):
    """The network's threshold is 1e-8: all of TensorFlow's 100 boxes are among the chosen."""
    path = tmp_path / "nms.onnx"
    onnx_files.write(write("detection").program, path, Options(suppress=True))
    session = onnx_files.open_file(path)
    assert session.operators["NonMaxSuppression"] == 1
    assert session.metadata["outputs"]["selected"] == [[3], "int64"]
    golden = np.load((check_data / FILES["detection"]).with_name("golden.npz"))
    arrays = session(pictures(golden))
    image, label, anchor = arrays["selected"].T
    for k in range(10):
        chosen = anchor[image == k]
        assert (label[image == k] == 0).all()
        scores = arrays["scores"][k, chosen, 0]
        best = np.argsort(-scores, kind="stable")[:100]
        boxes = arrays["boxes"][k, chosen[best]].clip(0, 300)[:, [1, 0, 3, 2]] / 300
        np.testing.assert_allclose(scores[best], golden[f"det_scores_{k}"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(boxes, golden[f"det_boxes_{k}"], rtol=0, atol=1e-4)


def test_openvino_reads_a_file(written):
    images = photos.synthetic(written.program)[:2]
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # where a CPU has bfloat16, OpenVINO takes that
    model = openvino.Core().compile_model(written.path, "CPU", exact)
    found = model({"images": images})
    for name, ours in written.session(images).items():
        np.testing.assert_allclose(found[name], ours, rtol=ROUNDING, atol=ROUNDING)


def test_onnx_runtime_alone_runs_a_file(written, tmp_path):
    images = photos.synthetic(written.program)
    np.save(tmp_path / "images.npy", images)
    arguments = [written.path, tmp_path / "images.npy", tmp_path / "arrays.npz"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = written.session(images)  # which is compared with JAX above
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert set(arrays) == set(expected)
        for name, ours in expected.items():
            np.testing.assert_allclose(arrays[name], ours, rtol=ROUNDING, atol=ROUNDING)


# Of the networks as their authors count layers: section 3.3 of the paper, DeepLab's head of four
# convolutions without ASPP, and SSDLite's six maps with two heads of two convolutions each.
OPERATORS = {
    "classification": {
        "Conv": 52,
        "Clip": 35,  # ReLU6 behind all but the projections
        "Add": 10,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    },
    "segmentation": {
        "Conv": 55,
        "Clip": 34,
        "Add": 10,
        "Relu": 3,
        "GlobalAveragePool": 1,
        "Expand": 1,
        "Concat": 1,
        "Resize": 1,
    },
    "detection": {"Conv": 88, "Sigmoid": 6, "Reshape": 12, "Exp": 6},
}
PIXELS = {"Cast": 1, "Sub": 1, "Div": 1, "Transpose": 1}


def test_a_graph_is_clean(written):
    task = written.program.saved.spec.task
    found = Counter(written.session.operators)
    if task == "detection":
        # Each of the twelve heads is (N, C, H, W), and its boxes are by position.
        assert found["Transpose"] == 13 and found["Clip"] == 59 + 6
        assert OPERATORS[task].items() <= found.items()
        return
    leaving = {"segmentation": 1}.get(task, 0)  # logits are (N, H, W, classes)
    assert found == Counter(OPERATORS[task] | PIXELS | {"Transpose": 1 + leaving})


def test_names_are_those_of_layers(written):
    model = onnx.load(written.path)
    nodes = {node.name: node for node in model.graph.node}
    assert nodes["layer4_1/depthwise/conv/Conv"].input[1] == "layer4_1/depthwise/conv/Conv/weight"
    assert len(nodes) == len(model.graph.node)
    (images,) = model.graph.input
    assert images.name == "images"
    assert images.type.tensor_type.shape.dim[0].dim_param == "N"


def test_the_graph_is_torchs_own(tmp_path):
    """torch's export of torchvision's network has the same operations, on floats."""
    torch_peer.save(tmp_path, 224)
    program = Program(
        inference.open_model(tmp_path / "torch.pth", seed=0), batch=1, input="normalised"
    )
    onnx_files.write(program, tmp_path / "ours.onnx", Options(nchw=True))
    ours, theirs = (onnx.load(tmp_path / name).graph.node for name in ("ours.onnx", "torch.onnx"))
    counts = Counter(node.op_type for node in theirs if node.op_type != "Constant")
    assert Counter(node.op_type for node in ours) == counts


def test_metadata(written):
    (prop,) = onnx.load(written.path).metadata_props
    facts = json.loads(prop.value)
    assert prop.key == "mbv2_jax" and facts == written.session.metadata
    assert facts["task"] == written.program.saved.spec.task
    assert facts["image_size"] == list(written.program.size)
    assert facts["layout"] == "nhwc" and facts["precision"] == "float32"
