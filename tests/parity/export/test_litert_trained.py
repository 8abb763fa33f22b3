"""LiteRT files of trained networks: the results that their frameworks recorded, and 8 bits."""

import functools
import json
import pathlib
import tarfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from mbv2_jax import inference
from mbv2_jax.export import litert, photos
from mbv2_jax.export.formats import Options
from mbv2_jax.export.litert.runner import File
from mbv2_jax.export.program import Program
from tests.support import pycoco

WEIGHTS = {
    "classification": "weights/mm_mobilenet_v2.pth",
    "detection": "golden/ssdlite_tf/frozen_inference_graph.pb",
    "segmentation": "golden/deeplab_tf/deeplabv3_257_mv_gpu.tflite",
}
GOLDEN = {
    "detection": "golden/ssdlite_tf/golden.npz",
    "segmentation": "golden/deeplab_tf/golden.npz",
}
# The operators of the whole networks; ReLU and ReLU6 are in the convolutions.
OPERATORS = {
    "classification": {"CONV_2D": 35, "DEPTHWISE_CONV_2D": 17, "ADD": 10, "PAD": 5, "MEAN": 1},
    "detection": {"CONV_2D": 55, "DEPTHWISE_CONV_2D": 33, "LOGISTIC": 6, "EXP": 6},
    "segmentation": {"CONV_2D": 38, "DEPTHWISE_CONV_2D": 17, "ADD": 10, "RESIZE_BILINEAR": 1},
}
Files = Callable[..., tuple[Program, File]]


@pytest.fixture(scope="module")
def files(check_data, tmp_path_factory) -> Files:
    """Returns the program of a task's network and its file, of which each is written once."""
    folder = tmp_path_factory.mktemp("litert")

    @functools.cache
    def program(task: str) -> Program:
        return Program(inference.open_model(check_data / WEIGHTS[task], seed=0), 1)

    @functools.cache
    def write(task: str, precision: str) -> tuple[Program, File]:
        path, calibration = folder / f"{task}_{precision}.tflite", None
        if precision == "int8":
            chosen = calibration_photos(task, check_data, folder)
            calibration = photos.load(program(task), chosen, "--calibrate")
        litert.write(program(task), path, Options(precision, calibration))
        return program(task), litert.open_file(path, threads=2)

    return write


def sample(check_data: pathlib.Path) -> list[str]:
    """Returns the 500 photos, one of every second class of ImageNet."""
    return sorted(map(str, (check_data / "data" / "imagenet_sample").glob("*/*.JPEG")))


def extracted(name: str, check_data: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    with tarfile.open(check_data / "data" / name) as archive:
        archive.extractall(folder, filter="data")
    return folder


def calibration_photos(task: str, check_data: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Returns 100 photos of ImageNet, or for the detector 80 of COCO's training split."""
    if task != "detection":
        return sample(check_data)[::5]
    extracted("coco_mini.tar", check_data, folder)
    return sorted(map(str, (folder / "coco_mini" / "train2017").iterdir()))


def run(file: File, images: np.ndarray) -> dict[str, np.ndarray]:
    parts = [file(image[None]) for image in images]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("task", list(WEIGHTS))
def test_floats_agree_with_jax(task, files, check_data):
    """The largest differences on 20 photos; relative where a value is above 1."""
    program, _ = files(task, "float32")
    images = photos.load(program, sample(check_data)[::25], "--check")
    in_jax = jax.jit(program)
    expected = [jax.device_get(in_jax(image[None])) for image in images]
    # Both round at 6e-8 in 60 layers; 16-bit weights round at 5e-4.
    for precision, bound in (("float32", 1e-3), ("float16", 0.1)):
        _, file = files(task, precision)
        assert OPERATORS[task].items() <= dict(file.operators).items()
        assert not file.operators.keys() & {"RELU6", "RELU", "CUSTOM", "TRANSPOSE"}
        for image, arrays in zip(images, expected, strict=True):
            for name, found in file(image[None]).items():
                difference = abs(found - arrays[name]) / np.maximum(1, abs(arrays[name]))
                assert difference.max() < bound, (precision, name)


def test_the_classifiers_logits_are_mmpretrains(files, check_data):
    with np.load(check_data / "golden" / "mmpretrain_eval.npz") as golden:
        recorded = dict(golden)
    program, file = files("classification", "float32")
    for place in range(0, 500, 25):
        name = pathlib.PurePath(recorded["filename"][place])
        (path,) = (check_data / "data" / "imagenet_sample").rglob(name.name)
        found = file(program.prepare(path)[None])["logits"][0]
        # The bar of the format; logits are up to 20, and torch sums in another order.
        assert abs(found - recorded["logits"][place]).max() < 1e-3


def test_the_segmenters_classes_are_tflites(files, check_data):
    """The masks are the original .tflite file's; nearly equal logits may change places."""
    _, file = files("segmentation", "float32")
    with np.load(check_data / GOLDEN["segmentation"]) as golden:
        for k in range(10):
            logits = file(golden[f"image_{k}_u8"][None])["logits"][0]
            best = np.sort(logits, -1)
            clear = best[..., -1] - best[..., -2] > 1e-3
            assert clear.mean() > 0.999
            np.testing.assert_array_equal(logits.argmax(-1)[clear], golden[f"argmax257_{k}"][clear])


def test_the_detectors_boxes_are_tensorflows(files, check_data):
    """Each of the scores above 0.05 that TensorFlow recorded is that of an anchor there."""
    _, file = files("detection", "float32")
    compared = 0
    with np.load(check_data / GOLDEN["detection"]) as golden:
        for k in range(10):
            found = file(golden[f"image_{k}_u8"][None])
            boxes, scores = found["boxes"][0], found["scores"][0, :, 0]
            for box, score in zip(
                golden[f"det_boxes_{k}"], golden[f"det_scores_{k}"].ravel(), strict=True
            ):
                if score < 0.05:
                    continue
                corners = 300 * box[[1, 0, 3, 2]]  # from shares of the picture, y before x
                # Detections are clipped to the picture. A thousandth of its side: float32, and exp.
                distances = abs(boxes.clip(0, 300) - corners).max(-1)
                near = (distances < 0.3) & (abs(scores - score) < 1e-3)
                assert near.any()
                compared += 1
    assert compared > 30


def test_8_bits_find_the_same_classes(files, check_data):
    """At least 96 of 100 photos, none of which was among those for the ranges."""
    program, exact = files("classification", "float32")
    _, file = files("classification", "int8")
    images = photos.load(program, sample(check_data)[2::5], "--check")
    classes = [run(each, images)["logits"].argmax(-1) for each in (exact, file)]
    assert (classes[0] == classes[1]).sum() >= 96  # the bar of the format
    assert OPERATORS["classification"].items() <= dict(file.operators).items()
    # Nothing is in floats but the output: pixels become int8, and logits float32.
    assert (file.operators["QUANTIZE"], file.operators["DEQUANTIZE"]) == (1, 1)
    assert "CAST" not in file.operators


def test_8_bits_find_the_same_pixels(files, check_data, tmp_path):
    program, exact = files("segmentation", "float32")
    _, file = files("segmentation", "int8")
    folder = extracted("voc_seg.tar", check_data, tmp_path)
    paths = sorted(map(str, folder.rglob("JPEGImages/*.jpg")))
    assert len(paths) == 24
    images = photos.load(program, paths, "--check")
    classes = [run(each, images)["logits"].argmax(-1) for each in (exact, file)]
    assert (classes[0] == classes[1]).mean() >= 0.97  # the bar of the format


def test_8_bits_find_the_same_persons(files, check_data, tmp_path):
    """pycocotools' AP of the person class on COCO's 79 validation pictures."""
    folder = extracted("coco_mini.tar", check_data, tmp_path) / "coco_mini"
    truth = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    truth["annotations"] = [row for row in truth["annotations"] if row["category_id"] == 1]
    truth["categories"] = [row for row in truth["categories"] if row["id"] == 1]
    (tmp_path / "persons.json").write_text(json.dumps(truth))
    found = {}
    for precision in ("float32", "int8"):
        program, file = files("detection", precision)
        rows = detections(program, file, truth, folder / "val2017")
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        found[precision] = pycoco.evaluated(tmp_path / "persons.json", tmp_path / "rows.json")
    exact, quantised = (found[name].stats[0] for name in ("float32", "int8"))
    assert exact > 0.15
    assert quantised >= exact - 0.02  # the bar of the format


def detections(
    program: Program, file: File, truth: Mapping[str, Any], pictures: pathlib.Path
) -> list[dict[str, Any]]:
    """Returns COCO's rows of a file's detections."""
    predict = jax.jit(lambda arrays: program.task.from_exported(arrays, program.size))
    rows = []
    for picture in truth["images"]:
        pixels = program.prepare(str(pictures / picture["file_name"]))
        arrays = jax.device_get(predict(file(pixels[None])))
        scale = np.array([picture["width"], picture["height"]] * 2) / program.size[0]
        boxes, scores = arrays["boxes"][0] * scale, arrays["scores"][0]
        for (x0, y0, x1, y1), score in zip(boxes.tolist(), scores.tolist(), strict=True):
            if score > 0:
                row = {"image_id": picture["id"], "category_id": 1, "score": score}
                rows.append(row | {"bbox": [x0, y0, x1 - x0, y1 - y0]})
    return rows
