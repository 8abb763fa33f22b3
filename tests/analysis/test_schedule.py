"""`python -m mbv2_jax.analysis schedule`: its figures and its picture."""

import sys

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.analysis import model_commands, schedule
from mbv2_jax.command_line import load_config
from mbv2_jax.errors import UserError
from mbv2_jax.training import config as config_lib


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns its lines."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["analysis", "schedule", *arguments])
        model_commands.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_fine_tuning_is_described_and_drawn(run, tmp_path):
    rules = "(('classifier', 1.0), ('layer7_0/expand', 0.5), ('', 0.1))"
    lines = run(
        "--config=finetune_folder",
        "--examples=320",
        "--config.model.num_classes=3",
        "--config.model.frozen_stages=2",
        f"--config.optimizer.lr_multipliers={rules}",
        "--config.schedule.base_lr=0.05",
        "--config.schedule.warmup_epochs=1.0",
        "--config.num_epochs=20",
    )
    assert lines[0].startswith("schedule.png: 200 steps, 10 in an epoch")
    assert "at most 0.05 (step 11)" in lines[0] and "the warm-up takes 10 steps" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "1 times the rate: classifier",
        "0.5 times the rate: layer7_0/expand",
        "0.1 times the rate: layer3 to layer6, layer7_0/depthwise, layer7_0/project, last",
        "frozen: stem, layer1, layer2",
    ]
    assert Image.open(tmp_path / "schedule.png").width > 1000  # two panels


def test_hidden_layers_are_a_part_of_their_own(run):
    lines = run(
        "--config=finetune_folder",
        "--examples=320",
        "--config.model.num_classes=3",
        "--config.model.hidden=(8,4)",
        "--config.model.depth=1.2",
        "--config.optimizer.lr_multipliers=(('hidden_1', 2.0), ('layer', 0.1), ('stem', 0.1))",
    )
    assert [line.strip() for line in lines[1:]] == [
        "2 times the rate: hidden_1",
        "1 times the rate: last, hidden_0, classifier",
        "0.1 times the rate: stem, layer1 to layer7",
    ]


def test_curve_is_the_schedule_worked_out_by_hand():
    config = load_config("finetune_folder").copy_and_resolve_references()
    config.batch_size, config.num_epochs, config.model.num_classes = 10, 3.0, 2
    config.schedule.update({"name": "step", "base_lr": 1.0, "milestones": (2.0,), "factor": 0.1})
    config.schedule.warmup_epochs = 0.5
    config.schedule.warmup_steps = None
    found = schedule.curve(config_lib.read(config), None, 40)
    assert (found.steps_per_epoch, found.warmup, len(found.rate)) == (4, 2, 12)
    np.testing.assert_allclose(found.rate, [0, 0.5] + [1] * 6 + [0.1] * 4, rtol=1e-6)


def test_a_run_that_never_leaves_its_warm_up_is_noticed(run):
    lines = run("--config=finetune_folder", "--examples=64", "--config.schedule.warmup_steps=4000")
    assert "The run ends within its warm-up, which takes 4,000 steps" in lines[0]


def test_recipe_whose_groups_are_devices(run):
    assert "steps" in run("--config=mobilenet_v2_tpu_4096", "--examples=1281167")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples=0"], "--examples=0: give the number"),
        (["--out=lr.txt", "--examples=9"], "give lr.png"),
        (["--out=no/lr.png", "--examples=9"], "there is no folder no"),
        (["--config.data.source=folder:gone"], "gone"),
        (["--config.num_epochs=0", "--examples=9"], "num_epochs is 0"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run("--config=finetune_folder", *arguments)
    assert not list(tmp_path.iterdir())
