"""Runs of detection that are killed and continued, through the real command."""

import json
import pathlib

import pytest

from mbv2_jax.data import digits
from tests.support import commands, groups

# The short network has no stages but layer1 and layer7. All that is random in mmdet's recipe is in
# the transforms.
CONFIG = """
from mbv2_jax.configs import default

def get_config():
    config = default.get_config("detection")
    config.batch_size = 4
    config.num_epochs = 2.0
    config.model.width = 0.1
    config.model.last_convolution = False
    config.model.taps = ("layer1", "layer7")
    config.model.extra_channels = (16,)
    config.model.anchor_sizes = (0.3, 0.5, 0.7, 0.9)
    config.data.source = "yolo:SCENES"
    config.data.eval_split = "val"
    config.data.image_size = 24
    config.data.train_transforms = (
        "expand(high=2)|min_iou_crop()|resize(size)|random_flip(0.5)|ssd_distortion()"
    )
    config.data.eval_transforms = "resize(size)"
    config.schedule.base_lr = 0.02
    config.checkpoint.every_steps = 4
    config.log.every_steps = 2
    return config
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of 24 pictures to train on and as many others, and the config that names it."""
    folder = tmp_path_factory.mktemp("scenes")
    digits.main([f"--export={folder / 'pictures'}", "--scenes=yolo", "--count=24"])
    (folder / "scenes.py").write_text(CONFIG.replace("SCENES", str(folder / "pictures")))
    return folder


@pytest.mark.slow
def test_a_killed_and_continued_run_equals_the_unbroken_one(scenes, cache, tmp_path):
    config = f"--config={scenes / 'scenes.py'}"
    status, whole, err = commands.run(cache, config, f"--workdir={tmp_path / 'whole'}")
    assert status == 0, err
    assert json.loads(whole.splitlines()[-1])["examples"] == 24

    workdir = tmp_path / "run"
    process = commands.start(cache, config, f"--workdir={workdir}")
    groups.wait_for(
        lambda: (
            commands.checkpoints(workdir)
            and commands.logged_step(workdir) > max(commands.checkpoints(workdir))
        ),
        [process],
    )
    groups.kill([process])
    saved = max(commands.checkpoints(workdir))
    assert 0 < saved < 12
    status, again, err = commands.run(
        cache, config, f"--workdir={workdir}", "--config.data.workers=1"
    )
    assert status == 0, err
    assert f"continuing after step {saved}" in err
    assert again == whole
    commands.assert_equal_runs(workdir, tmp_path / "whole")
