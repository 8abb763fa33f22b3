"""Weight files of other frameworks as --checkpoint of the other commands."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from mbv2_jax import model_dir
from tests.support import REPOSITORY, commands, peers


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    net = peers.torchvision().models.mobilenet_v2(width_mult=0.1, num_classes=2).eval()
    peers.randomize(net, seed=0)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory, net) -> pathlib.Path:
    """Writes train/ and val/ of two classes, and the network's weights with and without head."""
    folder = tmp_path_factory.mktemp("use")
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    state = net.state_dict()
    torch.save(state, folder / "whole.pth")
    torch.save({k: v for k, v in state.items() if "classifier" not in k}, folder / "backbone.pth")
    return folder


def test_training_starts_from_a_backbone_of_another_framework(folder, net, tmp_path):
    workdir = tmp_path / "run"
    code, _, err = commands.run(
        tmp_path / "compiled",
        "--config=finetune_folder",
        f"--workdir={workdir}",
        f"--checkpoint={folder / 'backbone.pth'}",
        f"--config.data.source=folder:{folder}",
        "--config.data.image_size=32",
        "--config.batch_size=8",
        "--config.num_epochs=1",
        "--config.schedule.base_lr=0",  # nothing moves
        "--config.schedule.warmup_epochs=0",
        module=commands.WHOLE,
    )
    assert code == 0, err
    assert "with a new classifier: it has none" in err
    trained = model_dir.read(workdir)
    assert trained.classes == ("cat", "dog")
    assert trained.spec.mode.dropout == 0.2  # the recipe's
    ours, theirs = trained.params, peers.parameters(net)
    assert ours.pop("classifier")["kernel"].shape == theirs.pop("classifier")["kernel"].shape
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_prediction_takes_a_file_of_another_framework(folder, net, tmp_path):
    image = folder / "val" / "cat" / "0.png"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mbv2_jax.predict", image),
            *(f"--checkpoint={folder / 'whole.pth'}", "--json"),
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "data.image_size=224" in done.stderr  # the assumptions are printed here, too
    assert '"class": "0"' in done.stdout
