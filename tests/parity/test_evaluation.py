"""--out and --tta against mmpretrain's own test command, with the same weights and images."""

import importlib.util
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mbv2_jax import model_dir
from mbv2_jax.command_line import load_config
from mbv2_jax.convert import importer
from mbv2_jax.runtime import processes
from mbv2_jax.training import evaluation
from tests.support import peers

# There are fewer folders than classes of the model, and in another order.
CLASSES = ("hen", "dog", "gnu", "cat", "fox", "eel", "owl")
FOLDERS = {"cat": 9, "eel": 4, "gnu": 7, "hen": 11}
PAGE = "mobilenet-v2_8xb32_in1k.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """31 pictures that are not symmetric, not square, and not of the network's size."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, count in FOLDERS.items():
        (folder / name).mkdir()
        for i in range(count):
            coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((60 + i, 50), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{i}.png")
    return folder


def network_config() -> dict[str, Any]:
    """Returns the page's network, but narrow and with our classes."""
    return {
        "type": "ImageClassifier",
        "backbone": {"type": "MobileNetV2", "widen_factor": 0.1},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": len(CLASSES), "in_channels": 1280},
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
    """A file of weights in the form in which mmpretrain's training writes it."""
    peers.mmpretrain()
    import torch
    from mmpretrain.registry import MODELS

    network = MODELS.build(network_config())
    peers.randomize(network, seed=0)
    network.head.fc.weight.data /= 10  # otherwise softmax would hide differences
    file = tmp_path_factory.mktemp("weights") / "epoch_1.pth"
    meta = {"dataset_meta": {"classes": CLASSES}}
    torch.save({"meta": meta, "state_dict": network.state_dict()}, file)
    return file


def mmpretrains_test_command(
    images: pathlib.Path, weights: pathlib.Path, folder: pathlib.Path, *flags: str
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Runs mmpretrain's tools/test.py; returns its metrics, and the rows of its --out."""
    installed = pathlib.Path(peers.mmpretrain().__path__[0]) / ".mim"
    import mmengine
    from mmengine.config import Config
    from mmengine.runner import Runner

    config = Config.fromfile(installed / "configs" / "mobilenet_v2" / PAGE)
    config.model, config.log_level = network_config(), "ERROR"
    loader = config.test_dataloader
    loader.num_workers, loader.persistent_workers = 0, False
    pipeline = loader.dataset.pipeline
    pipeline[1].scale, pipeline[2].crop_size = 36, 32
    listed = [f"{file} {CLASSES.index(file.parent.name)}\n" for file in images.rglob("*.png")]
    folder.mkdir()
    (folder / "list.txt").write_text("".join(listed))
    loader.dataset = {
        "type": "CustomDataset",
        "ann_file": str(folder / "list.txt"),
        "classes": CLASSES,
        "pipeline": pipeline,
    }
    spec = importlib.util.spec_from_file_location("_tool", installed / "tools" / "test.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        flags = (f"--work-dir={folder}", "--no-pin-memory", *flags)
        patch.setattr(sys, "argv", ["test", PAGE, str(weights), *flags])
        config = tool.merge_args(config, tool.parse_args())
    runner = Runner.from_cfg(config)
    runner.test_evaluator.metrics.append(tool.DumpResults(str(folder / "results.pkl")))
    metrics = runner.test()
    return metrics, mmengine.load(folder / "results.pkl")


@pytest.mark.parametrize("tta", [False, True])
def test_each_prediction_is_that_of_mmpretrains_test_command(images, weights, tmp_path, tta):
    flags = ["--tta"] if tta else []
    metrics, theirs = mmpretrains_test_command(images, weights, tmp_path / "theirs", *flags)
    scores = np.stack([sample["pred_score"].numpy() for sample in theirs])
    labels = np.array([sample["gt_label"].item() for sample in theirs])

    fields = {"data.image_size": 32, "data.eval_transforms": "resize_edge(36)|center_crop(size)"}
    saved = importer.load(weights, fields=fields).saved
    model_dir.write(tmp_path / "model", saved.params, saved.batch_stats, saved.description)
    config = load_config("finetune_folder")
    config.data.source, config.data.eval_split = f"folder:{images}", "all"
    config.batch_size = 12
    result, _ = evaluation.evaluate(
        config,
        str(tmp_path / "model"),
        {},
        processes.single(),
        tta=tta,
        out=str(tmp_path / "ours"),
    )
    ours = [json.loads(line) for line in (tmp_path / "ours").read_text().splitlines()]

    assert result["examples"] == len(ours) == len(theirs) == 31
    # Their percentages are float32.
    assert result["top1"] == pytest.approx(metrics["accuracy/top1"], abs=1e-4)
    assert result["top5"] == pytest.approx(metrics["accuracy/top5"], abs=1e-4)
    by_image = {line["image"]: line for line in ours}
    ours = [by_image[sample["img_path"]] for sample in theirs]
    assert [line["label"] for line in ours] == labels.tolist()
    best = np.argsort(-scores, axis=1)[:, :5]
    found = [[p["label"] for p in line["predictions"]] for line in ours]
    np.testing.assert_array_equal(found, best)
    # float32 through 52 layers with other orders of sums: 1e-5 of logits of order one.
    ranked = [[p["score"] for p in line["predictions"]] for line in ours]
    np.testing.assert_allclose(ranked, np.take_along_axis(scores, best, 1), rtol=1e-4)
    # The loss of the averaged probabilities.
    losses = -np.log(scores[np.arange(31), labels])
    np.testing.assert_allclose([line["loss"] for line in ours], losses, rtol=1e-4)
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert scores.max() < 0.999 and len(set(best[:, 0])) > 2
