"""SSDLite in mmdet's and in TensorFlow's files gives the results that these recorded."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tarfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mbv2_jax
from mbv2_jax import model_dir, tasks
from mbv2_jax.convert import importer, readers, writer
from mbv2_jax.data import classes
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.models.ssdlite import Outputs
from tests.support import REPOSITORY
from tests.support.convert_command import make_run

MAPS = 6
PICTURES = 10  # of TensorFlow's results


def outputs(saved: SavedModel, pixels: np.ndarray) -> tuple[Outputs, dict[str, np.ndarray]]:
    """Returns the outputs for (N, H, W, 3) RGB pixels, and the detections."""
    task = tasks.find("detection").for_model(saved.spec.head, saved.classes)
    network, images = task.network(saved.spec.backbone, saved.spec.mode), saved.spec.preprocessing
    mean, std = (np.array(values, np.float32) for values in (images.mean, images.std))
    x = (pixels.astype(np.float32) - mean) / std

    def run(variables: Any, x: Any) -> Any:
        found = network.apply(variables, x)
        return found, task.postprocess(found)

    return jax.tree.map(np.asarray, jax.jit(run)(saved.variables(), x))


@pytest.fixture
def run(monkeypatch, capsys):
    return make_run(monkeypatch, capsys)


def test_mmdets_file(run, check_data, tmp_path):
    """Its network has random weights; the raw heads of five COCO pictures are mmdet's."""
    folder = check_data / "golden" / "ssdlite_mmdet"
    golden = np.load(folder / "golden.npz")
    code, out, err = run(folder / "ssdlite_random.pth", f"--output={tmp_path / 'm'}")
    assert code == 0, err
    assert "SSDLite on layer5 and last, 6 maps, 80 classes of boxes, 4,228,788 parameters" in out
    assert "404 used, 76 ignored (BatchNorm's counters" in out
    saved = model_dir.read(tmp_path / "m")
    assert saved.classes == classes.COCO_NAMES
    found, _ = outputs(saved, golden["images_bgr_u8"][..., ::-1])
    np.testing.assert_array_equal(
        np.concatenate([part[0] for part in found.anchors]), golden["anchors_xyxy"]
    )
    for number in range(MAPS):
        for name, ours in (("cls", found.logits[number]), ("reg", found.codes[number])):
            theirs = golden[f"{name}_{number}"].transpose(0, 2, 3, 1).reshape(ours.shape)
            largest = abs(theirs).max()
            assert largest > 3
            # float32 rounds at 6e-8, and a map comes from the one before it: the last ones are up
            # to 9e-3 from float64, in mmdet and here alike.
            limit = 1e-3 if number < 2 else 1e-3 * largest
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)


@pytest.mark.parametrize("train", [False, True], ids=["running statistics", "batch statistics"])
def test_mmdets_losses_and_gradients(train, check_data, tmp_path):
    """The losses, and the norm of each parameter's gradient, are mmdet's for the same pictures."""
    folder = check_data / "golden" / "ssdlite_mmdet"
    golden = np.load(folder / "golden.npz")
    saved = model_dir.read(folder / "ssdlite_random.pth")
    task = tasks.find("detection").for_model(saved.spec.head, saved.classes)
    network, variables = task.network(saved.spec.backbone, saved.spec.mode), saved.variables()
    images = saved.spec.preprocessing.normalize(golden["images_bgr_u8"][..., ::-1])
    batch = recorded_objects(golden)

    def loss(params: Any) -> Any:
        found, _ = network.apply(
            variables | {"params": params}, images, train=train, mutable=["batch_stats"]
        )
        return task.loss(found, batch)

    (_, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    mode = "train" if train else "eval"
    # Float32 all through, and its rounding decides which of nearly equal negatives are mined.
    np.testing.assert_allclose(parts["class_loss"], golden[f"loss_cls_{mode}"].sum(), rtol=1e-5)
    np.testing.assert_allclose(parts["box_loss"], golden[f"loss_bbox_{mode}"].sum(), rtol=1e-5)
    theirs = dict(zip(golden["grad_names"].tolist(), golden[f"grad_l2_{mode}"], strict=True))
    # Gradients have the shapes of weights, and so get their names in mmdet.
    gradients = jax.tree.map(np.asarray, gradients)
    writer.write(dataclasses.replace(saved, params=gradients), "mmdet", tmp_path / "grads.pth")
    named = torch.load(tmp_path / "grads.pth", weights_only=False)["state_dict"]
    norms = {name: np.linalg.norm(part.numpy()) for name, part in named.items()}
    assert norms.keys() >= theirs.keys()
    for name, norm in ((name, norms[name]) for name in theirs):
        # With the recorded targets and in float64, norms are up to 0.8 % from mmdet's: 60 layers of
        # random weights enlarge the rounding of its float32. Where the batch's statistics take a
        # bias away again, its gradient is 0 but for rounding, up to 1e-4.
        assert abs(norm - theirs[name]) <= 1e-2 * theirs[name] + 1e-4, name


def recorded_objects(golden: Any) -> dict[str, jax.Array]:
    boxes, found = np.zeros((5, 40, 4), np.float32), np.full((5, 40), -1, np.int32)
    for k in range(5):
        count = len(golden[f"gt_{k}_bboxes"])
        boxes[k, :count], found[k, :count] = golden[f"gt_{k}_bboxes"], golden[f"gt_{k}_labels"]
    return {"boxes": jnp.asarray(boxes), "labels": jnp.asarray(found)}


@pytest.fixture
def graph(check_data) -> pathlib.Path:
    return check_data / "golden" / "ssdlite_tf" / "frozen_inference_graph.pb"


def test_tensorflows_graph(run, graph, tmp_path):
    """A trained network of one class: raw heads, anchors, and every detection of ten pictures."""
    (tmp_path / "names.txt").write_text("person\n")
    names = f"--class-names={tmp_path / 'names.txt'}"
    code, out, err = run(graph, names, f"--output={tmp_path / 'm'}")
    assert code == 0, err
    assert "SSDLite on layer6_0/expand and last, 6 maps, 1 class of boxes" in out
    assert "404 used, 0 ignored" in out
    saved = model_dir.read(tmp_path / "m")
    assert saved.classes == ("person",)
    trained = (a for n, a in readers.read(graph).tensors.items() if "/moving_" not in n)
    assert f"{sum(array.size for array in trained):,} parameters" in out
    golden = np.load(graph.with_name("golden.npz"))
    pixels = np.stack([golden[f"image_{picture}_u8"] for picture in range(PICTURES)])
    found, detected = outputs(saved, pixels)

    corners = np.concatenate([part[0] for part in found.anchors]) / 300
    low, high = corners[:, 1::-1], corners[:, :1:-1]  # of y and x
    anchors = np.concatenate([(low + high) / 2, high - low], 1)
    theirs = np.load(graph.with_name("anchors_yxhw_300.npy"))
    np.testing.assert_allclose(anchors, theirs, rtol=0, atol=1e-6)  # a few float32 roundings of 1

    for picture in range(PICTURES):
        for number in range(MAPS):
            logits = golden[f"cls_{number}_{picture}"].reshape(-1, 2)[:, ::-1]  # background first
            codes = golden[f"box_{number}_{picture}"].reshape(-1, 4)[:, [1, 0, 3, 2]]  # y, x, h, w
            # Up to 18; float32 rounds at 1e-7 of a map, which 60 layers enlarge.
            np.testing.assert_allclose(found.logits[number][picture], logits, rtol=0, atol=1e-3)
            np.testing.assert_allclose(found.codes[number][picture], codes, rtol=0, atol=1e-3)
        scores, boxes = golden[f"det_scores_{picture}"], golden[f"det_boxes_{picture}"]
        assert (detected["labels"][picture] == 0).all()  # all 100, of scores down to 0.001
        # The heads differ in the fifth digit, and so do scores and boxes, in shares of the side.
        np.testing.assert_allclose(detected["scores"][picture], scores, rtol=0, atol=1e-4)
        ours = detected["boxes"][picture][:, [1, 0, 3, 2]] / 300
        np.testing.assert_allclose(ours, boxes, rtol=0, atol=1e-4)


def test_the_graph_tells_its_fields(graph):
    """They are those of TensorFlow's config, of which the graph has the constants."""
    imported = importer.load(graph)
    head, spec = imported.saved.spec.head, imported.saved.spec
    assert head.taps == ("layer6_0/expand", "last")
    assert (head.anchors, head.scores) == ("tensorflow", "sigmoid")
    assert head.anchor_sizes == (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
    assert (head.score_threshold, head.nms_iou, head.max_detections) == (1e-8, 0.6, 100)
    assert (spec.backbone.padding, spec.backbone.bn_epsilon) == ("same", 1e-3)
    assert (spec.preprocessing.image_size, spec.preprocessing.mean) == (300, (127.5,) * 3)
    # All else is told; `resize` is TensorFlow's of the published network too.
    (assumed,) = (line for line in imported.warnings if "it is assumed" in line)
    assert "it is assumed: data.eval_transforms=resize(size) (" in assumed


# AP of persons with TensorFlow's own detections of the pictures, as pycocotools has it.
AP = {"train2017": 0.181, "val2017": 0.186}


@pytest.fixture(scope="module")
def persons(check_data, tmp_path_factory) -> pathlib.Path:
    """Returns COCO's pictures with their persons alone, the only class of the network."""
    folder = tmp_path_factory.mktemp("coco")
    with tarfile.open(check_data / "data" / "coco_mini.tar") as archive:
        archive.extractall(folder, filter="data")
    for split in AP:
        path = folder / "coco_mini" / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"] = [c for c in content["categories"] if c["name"] == "person"]
        (person,) = content["categories"]
        found = [a for a in content["annotations"] if a["category_id"] == person["id"]]
        path.write_text(json.dumps(content | {"annotations": found}))
    return folder / "coco_mini"


@pytest.mark.parametrize("split", AP)
def test_average_precision_on_coco(split, graph, persons):
    """The command evaluates the file itself, on pictures resized to 300."""
    command = [
        sys.executable,
        "-m",
        "mbv2_jax.main",
        "--config=ssdlite_mobilenet_v2_coco",
        "--mode=eval",
    ]
    command += [f"--checkpoint={graph}", f"--config.data.source=coco:{persons}"]
    command += [f"--config.data.eval_split={split}", "--config.batch_size=8"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # The recorded figures have three digits, and come from other decoders of JPEG.
    assert result["mAP"] / 100 == pytest.approx(AP[split], abs=0.003)


@pytest.mark.parametrize(
    ("file", "padding", "left_out"),
    [
        ("ssdlite_tf/frozen_inference_graph.pb", "same", "FeatureExtractor/MobilenetV2/layer_19_1"),
        ("ssdlite_mmdet/ssdlite_random.pth", "torch", "neck.extra_layers.0.0.conv.weight"),
    ],
)
def test_the_backbone_alone(file, padding, left_out, check_data):
    """The heads are left out, and the conventions of the whole network are kept."""
    imported = importer.load(check_data / "golden" / file, features_only=True)
    backbone = imported.saved.spec.backbone
    assert imported.saved.features_only
    assert (backbone.width, backbone.padding, backbone.bn_epsilon) == (1.0, padding, 1e-3)
    assert f"left out: {left_out}" in imported.summary["arrays"]


def test_starting_from_the_graph(graph):
    """A detector of other classes keeps all layers but those of the classes' logits."""
    _, variables = mbv2_jax.load(graph, num_classes=4)
    theirs = model_dir.read(graph).params
    ours = variables["params"]
    assert ours["class_logits0"]["kernel"].shape == (1, 1, 576, 3 * 5)
    new = {
        name
        for name in ours
        if model_dir.arrays_sha256(ours[name]) != model_dir.arrays_sha256(theirs[name])
    }
    assert new == {f"class_logits{number}" for number in range(MAPS)}


@pytest.mark.parametrize("taps", [("layer5", "last"), ("layer6_0/expand", "last")])
def test_starting_from_a_classifier(taps, check_data):
    """Both detectors take mmpretrain's whole backbone."""
    file = check_data / "weights" / "mm_mobilenet_v2.pth"
    _, variables = mbv2_jax.load(file, num_classes=80, task="detection", taps=taps)
    theirs = model_dir.read(file).variables()
    layers = theirs["params"].keys() - {"classifier"}
    assert len(layers) == 19  # the stem, 17 blocks, and the last convolution
    for collection in ("params", "batch_stats"):
        for layer in layers:
            expected = model_dir.arrays_sha256(theirs[collection][layer])
            assert model_dir.arrays_sha256(variables[collection][layer]) == expected
