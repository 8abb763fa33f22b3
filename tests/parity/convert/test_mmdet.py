"""A detector written for mmdet is mmdet's own network there, and detects the same."""

import dataclasses
import importlib
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

import mbv2_jax
from mbv2_jax import model_dir, tasks
from mbv2_jax.convert import importer
from mbv2_jax.model_json import Description
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.detection.settings import Head
from tests.support import peers, tiny_model
from tests.support.convert_command import make_run

SPECS = {
    "mmdet's config": ModelSpec(
        "detection",
        Backbone(bn_epsilon=1e-3),
        Head(num_classes=80),
        Preprocessing(320, "resize(size)"),
        TrainingMode(bn_momentum=0.97),
    ),
    "another": ModelSpec(
        "detection",
        Backbone(width=0.5, bn_epsilon=1e-3),
        Head(
            num_classes=3,
            taps=("layer3", "layer5", "last"),
            extra_channels=(256, 128),
            anchor_sizes=(0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
            score_threshold=0.3,
            nms_iou=0.6,
            max_detections=30,
        ),
        Preprocessing(200, "resize(size)", (100.0, 110, 120), (50.0, 60, 70)),
        TrainingMode(bn_momentum=0.97),
    ),
}


def write(path: pathlib.Path, spec: ModelSpec) -> model_dir.SavedModel:
    """Writes a detector with random arrays, whose logits and codes are as large as trained ones."""
    names = tuple(f"class {i}" for i in range(spec.head.num_classes))
    network = tasks.find(spec.task).for_model(spec.head, names).network(spec.backbone, spec.mode)
    variables = tiny_model.filled(model_dir.shapes_of(network))
    for name, layer in variables["params"].items():
        if name.startswith(("class_logits", "box_codes")):
            layer["kernel"] *= 0.5
    model_dir.write(path, variables["params"], variables["batch_stats"], Description(spec, names))
    return model_dir.read(path)


@pytest.mark.parametrize("name", SPECS)
def test_it_detects_the_same(name, tmp_path, monkeypatch, capsys):
    """The printed code loads the file; its weights fit mmdet's network strictly."""
    mmdet = peers.mmdet()
    importlib.import_module("mmdet.apis")
    spec, file = SPECS[name], tmp_path / "m.pth"
    saved = write(tmp_path / "m", spec)
    code, out, err = make_run(monkeypatch, capsys)(tmp_path / "m", "--to=mmdet", f"--output={file}")
    assert code == 0, err
    (printed,) = (line for line in out.splitlines() if line.startswith("load it with"))
    monkeypatch.chdir(pathlib.Path(mmdet.__path__[0]) / ".mim")  # where configs/ is
    found: dict[str, Any] = {"mmdet": mmdet}
    exec(printed.removeprefix("load it with").strip(), found)
    model = found["model"]
    assert tuple(model.dataset_meta["classes"]) == saved.classes
    content = torch.load(file, weights_only=True)
    model.load_state_dict(content["state_dict"], strict=True)

    size = spec.preprocessing.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    theirs = predictions(model, pixels)
    ours = mbv2_jax.init_model(tmp_path / "m").predict(list(pixels))
    for mine, other in zip(ours, theirs, strict=True):
        count = len(other["scores"])
        assert len(mine["scores"]) == count > 5
        np.testing.assert_allclose(mine["scores"][0], other["scores"][0], rtol=0, atol=1e-3)
        # Two boxes whose overlap is the threshold, up to rounding, may be one detection or two.
        alone = max(unmatched(mine, other), unmatched(other, mine))
        assert alone <= 0.02 * count


def unmatched(found: dict[str, Any], others: dict[str, Any]) -> int:
    """Counts the detections that are not among others."""
    count = 0
    for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
        # Logits differ by up to 4e-3 and codes by 1e-3, as float32 rounds 60 layers.
        same = (others["labels"] == label) & (abs(others["scores"] - score) < 2e-3)
        count += not (abs(others["boxes"] - box).max(1)[same] < 0.5).any()  # of a pixel
    return count


def predictions(model: Any, pixels: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Returns mmdet's detections of RGB pictures that have the network's size."""
    from mmdet.structures import DetDataSample

    # mmdet 3.3.0 asks a head for a loss that this one does not have.
    model.bbox_head.loss_cls = None
    samples = []
    for picture in pixels:
        shape = picture.shape[:2]
        meta = {"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)}
        samples.append(DetDataSample(metainfo=meta))
    inputs = [torch.from_numpy(picture[..., ::-1].transpose(2, 0, 1).copy()) for picture in pixels]
    data = model.data_preprocessor({"inputs": inputs, "data_samples": samples})
    with torch.no_grad():
        found = model.predict(data["inputs"], data["data_samples"])
    names = {"boxes": "bboxes", "scores": "scores", "labels": "labels"}
    return [
        {ours: sample.pred_instances[theirs].numpy() for ours, theirs in names.items()}
        for sample in found
    ]


def test_mmdets_checkpoint_is_read(tmp_path):
    """The checkpoint is of mmdet's own network with 3 classes, as its runner saves it."""
    mmdet = peers.mmdet()
    from mmengine.config import Config

    root = pathlib.Path(mmdet.__path__[0]) / ".mim"
    config = Config.fromfile(root / "configs/ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py")
    config.model.bbox_head.num_classes = 3
    model = mmdet.registry.MODELS.build(config.model)
    peers.randomize(model, seed=0)
    meta = {"dataset_meta": {"classes": ("a", "b", "c")}}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, tmp_path / "epoch_1.pth")
    saved = importer.load(tmp_path / "epoch_1.pth").saved
    images = Preprocessing(320, "resize(size)")
    assert saved.spec.head == dataclasses.replace(SPECS["mmdet's config"].head, num_classes=3)
    assert (saved.spec.preprocessing, saved.classes) == (images, ("a", "b", "c"))
    assert sum(leaf.size for leaf in flat(saved.params)) == sum(
        p.numel() for p in model.parameters()
    )


def flat(tree: Any) -> list[np.ndarray]:
    return [
        leaf
        for part in tree.values()
        for leaf in (flat(part) if isinstance(part, dict) else [part])
    ]
