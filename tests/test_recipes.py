"""The ImageNet recipes: their hyperparameters against the originals', and a few steps of each."""

import importlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from mbv2_jax import main, model_dir
from mbv2_jax.command_line import flatten
from mbv2_jax.errors import UserError
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import info
from tests.support.recipes import rates, recipe, steps_per_epoch

RECIPES = [
    "mobilenet_v2_8xb32_in1k",
    "mobilenet_v2_dli14_150",
    "mobilenet_v2_small",
    "mobilenet_v2_timm_ra",
    "mobilenet_v2_torchvision_v2",
    "mobilenet_v2_tpu_4096",
]
CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def test_every_imagenet_recipe_is_tested_here():
    assert sorted(path.stem for path in CONFIGS.glob("mobilenet_v2_*.py")) == RECIPES


# Copied by hand from the sources that the files name. A value that the command leaves to a default
# of its script is marked so.
ORIGINALS: dict[str, dict[str, Any]] = {
    # torchvision pull request 5560: torchrun --nproc_per_node=8 train.py --model mobilenet_v2 ...
    "mobilenet_v2_torchvision_v2": {
        "batch_size": 8 * 128,
        "num_epochs": 600,
        "schedule.name": "cosine",
        "schedule.base_lr": 0.5,
        "schedule.min_lr": 0,
        "schedule.warmup_epochs": 5,
        "schedule.warmup_start": 0.01,  # default of --lr-warmup-decay
        "label_smoothing": 0.1,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 2e-5,
        "optimizer.decay_norm": False,  # --norm-weight-decay 0.0
        "optimizer.decay_bias": True,
        "ema.every_steps": 32,  # default of --model-ema-steps
        # Its train.py: 1 - (1 - 0.99998) * world_size * batch_size * steps / epochs.
        "ema.decay": pytest.approx(1 - 0.00002 * 8 * 128 * 32 / 600, rel=1e-12),
        "data.image_size": 224,
        "data.train_transforms": "random_resized_crop(176)|random_flip(0.5)"
        "|trivial_augment_wide(interpolation='bilinear')|random_erasing(0.1)",
        "data.eval_transforms": "resize_edge(232)|center_crop(size)",
        "data.repeats": 4,
        "model.dropout": 0.2,
        "model.bn_group_size": 128,
        "steps_per_epoch": 1251,  # 1,281,167 // 256 * 256 // 8 // 128
    },
    # README: --epochs 150 --lr-decay cos --lr 0.05 --wd 4e-5, on 4 GPUs.
    "mobilenet_v2_dli14_150": {
        "batch_size": 256,
        "num_epochs": 150,
        "schedule.name": "cosine",
        "schedule.base_lr": 0.05,
        "schedule.min_lr": 0,
        "schedule.warmup_epochs": 0,
        "label_smoothing": 0,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 4e-5,
        "optimizer.decay_norm": True,
        "optimizer.decay_bias": True,
        "ema.decay": None,
        "data.train_transforms": "random_resized_crop(size)|random_flip(0.5)",
        "data.eval_transforms": "resize_edge(256)|center_crop(size)",
        "model.bn_group_size": 64,
        "steps_per_epoch": 5005,
    },
    # imagenet_mobilenetv2_tpu.yaml, and mobilenet_imagenet in image_classification.py.
    "mobilenet_v2_tpu_4096": {
        "batch_size": 4096,
        "num_epochs": 500,
        "schedule.name": "exponential",
        "schedule.base_lr": 0.256,
        "schedule.factor": 0.96,
        "label_smoothing": 0.1,
        "optimizer.name": "rmsprop",
        "optimizer.rms_decay": 0.9,
        "optimizer.momentum": 0.9,
        "optimizer.epsilon": 0.002,
        "optimizer.weight_decay": 1e-5,
        "optimizer.decay_norm": False,
        "optimizer.decay_bias": False,
        "ema.decay": None,
        "data.image_size": 224,
        "model.dropout": 0.2,
        "model.padding": "same",
        "model.bn_epsilon": 1e-3,
        "model.bn_momentum": 0.997,
        "model.dtype": "bfloat16",
        "steps_per_epoch": 312,
    },
    # EfficientNet-B0's command in hfdocs/source/training_script.mdx.
    "mobilenet_v2_timm_ra": {
        "batch_size": 2 * 384,
        "num_epochs": 450,
        "schedule.name": "exponential",
        "schedule.base_lr": 0.048,
        "schedule.factor": 0.97,
        "schedule.decay_epochs": 2.4,
        "schedule.warmup_epochs": 3,  # default of --warmup-epochs in April 2020
        "label_smoothing": 0.1,  # default of --smoothing
        "optimizer.name": "rmsprop",
        "optimizer.rms_decay": 0.9,
        "optimizer.momentum": 0.9,
        "optimizer.epsilon": 1e-3,
        "optimizer.weight_decay": 1e-5,
        "optimizer.decay_norm": False,
        "optimizer.decay_bias": False,
        "ema.decay": 0.9999,
        "ema.every_steps": 1,
        "data.image_size": 224,
        "model.dropout": 0.2,
        "model.bn_group_size": 384,
        "steps_per_epoch": 1668,  # its loader drops the last batch
    },
    # MobileNetV2_x0_25.yaml
    "mobilenet_v2_small": {
        "batch_size": 4 * 64,
        "num_epochs": 240,
        "schedule.name": "cosine",
        "schedule.base_lr": 0.045,
        "schedule.warmup_epochs": 0,
        "label_smoothing": 0,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 3e-5,
        "optimizer.decay_norm": True,
        "optimizer.decay_bias": True,
        "data.train_transforms": "random_resized_crop(size, crop_ratio_range=(0.2, 1.0))"
        "|random_flip(0.5)",
        "data.eval_transforms": "resize_edge(256)|center_crop(size)",
        "model.width": 0.25,
        "model.bn_group_size": 64,
        "steps_per_epoch": 5005,
    },
}


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_hyperparameters_are_the_originals(name):
    config = recipe(name)
    found = flatten(config.to_dict()) | {"steps_per_epoch": steps_per_epoch(config)}
    original = ORIGINALS[name]
    assert {field: found[field] for field in original} == original
    for field in ("mixup_alpha", "cutmix_alpha"):
        assert found[field] == original.get(field, 0)
    assert found["data.repeats"] == original.get("data.repeats", 1)
    # ImageNet's, times 255, as all of them write.
    mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    np.testing.assert_allclose(found["data.mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(found["data.std"], std, rtol=1e-12)


def test_tensorflows_schedule_is_theirs_from_the_end_of_the_warm_up():
    config = recipe("mobilenet_v2_tpu_4096")
    steps = np.concatenate([np.arange(0, 8_000, 13), [155_220, 155_999]])
    ours = rates(config, steps)
    # decay_steps: 780, decay_rate: 0.96, staircase; warmup_steps: 1560, to the rate of step 1560.
    staircase = 0.256 * 0.96 ** (steps // 780)
    theirs = np.where(steps < 1560, steps / 1560 * 0.256 * 0.96**2, staircase)
    after = steps >= 1560
    np.testing.assert_allclose(ours[after], theirs[after], rtol=1e-12)
    ratio = ours[~after][1:] / theirs[~after][1:]
    assert ratio.min() >= 1 and ratio.max() == pytest.approx(1 / 0.96**2, rel=1e-9)


@pytest.mark.parametrize(("name", "epochs"), [("dli14_150", 150), ("small", 240)])
def test_cosines_are_by_step_from_the_first_to_the_last(name, epochs):
    config = recipe(f"mobilenet_v2_{name}")
    total = epochs * 5005
    steps = np.linspace(0, total - 1, 500).astype(int)
    # adjust_learning_rate of imagenet.py, and Paddle's CosineAnnealingDecay.
    theirs = config.schedule.base_lr * (1 + np.cos(np.pi * steps / total)) / 2
    np.testing.assert_allclose(rates(config, steps), theirs, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "width", "params", "multiply_adds"),
    [
        ("mobilenet_v2_small:0.25", 0.25, 1_519_112, 37_201_312),
        ("mobilenet_v2_small:0.35", 0.35, 1_677_128, 59_285_808),
        ("mobilenet_v2_small:0.5", 0.5, 1_968_680, 97_131_840),
        ("mobilenet_v2_small:0.75", 0.75, 2_636_424, 209_069_792),
        *((name, 1.0, 3_504_872, 300_774_272) for name in RECIPES if "small" not in name),
    ],
)
def test_networks_are_of_the_published_sizes(name, width, params, multiply_adds):
    config = recipe(*name.split(":"))
    spec, _ = config_lib.resolve(config_lib.read(config), None)
    assert spec.backbone.width == width
    lines = info.describe(config).splitlines()
    assert f"parameters     {params:,}" in lines
    assert f"multiply-adds  {multiply_adds:,}" in lines


def test_small_widths_decay_as_paddles_files_say():
    decay = {w: recipe("mobilenet_v2_small", w).optimizer.weight_decay for w in ("0.5", "0.75")}
    assert decay == {"0.5": 3e-5, "0.75": 4e-5}
    with pytest.raises(UserError, match=r"no '0.3': did you mean '0.3?5'"):
        recipe("mobilenet_v2_small", "0.3")


@pytest.mark.parametrize("name", RECIPES)
def test_docstrings_say_what_a_reader_needs(name):
    module = importlib.import_module(f"mbv2_jax.configs.{name}")
    text = module.__doc__ or ""
    assert f"python -m mbv2_jax.main --config=configs/{name}.py" in text
    for part in ("hardware of the ", "steps: ", "expected: ", "measured: not run."):
        assert part in text
    config = recipe(name)
    steps = f"{config.num_epochs:.0f} epochs of {steps_per_epoch(config):,} at batch"
    assert steps in " ".join(text.split())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of photos of noise, of several shapes, in three classes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bee", "cat"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 256, (6, 8 - i % 3, 3), np.uint8)
                photo = Image.fromarray(coarse).resize((300, 260))
                photo.save(folder / split / name / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled programs, since some recipes differ in the training step only."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 1.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in options}
    _configure(options)
    yield
    _configure(before)


def _configure(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def command(
    photos, compiled, few_layers, tmp_path, monkeypatch, capsys
) -> Callable[..., dict[str, float]]:
    """Returns a function that runs `main` on the photos in this process.

    It returns the JSON of the last line.
    """

    def run(name: str, mode: str, **fields: Any) -> dict[str, float]:
        fields = {"data.source": f"folder:{photos}", "data.eval_split": "val"} | fields
        arguments = [f"--config={CONFIGS / name}.py", f"--workdir={tmp_path / 'run'}"]
        arguments += [f"--config.{field}={value}" for field, value in fields.items()]
        monkeypatch.setattr(sys, "argv", ["main", f"--mode={mode}", *arguments])
        importlib.reload(main).main()  # reloading resets its flags
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


FEW: dict[str, Any] = {
    "data.workers": 0,
    "model.num_classes": 3,
    "model.strides": (2, 2, 1, 1, 1, 1, 1, 2),  # the two blocks' strides alone make maps small
    "batch_size": 8,
    "log.every_steps": 1,
}


# Networks are narrow, except for timm's, and have fewer layers; all else is as in the recipe.
# Recipes that differ from these in constants and transforms only are left to the slow tests.
STEPS_OF_EACH = [
    ("mobilenet_v2_8xb32_in1k", 0.25),
    pytest.param("mobilenet_v2_dli14_150", 0.25, marks=pytest.mark.slow),
    pytest.param("mobilenet_v2_small", 0.25, marks=pytest.mark.slow),
    pytest.param("mobilenet_v2_timm_ra", 1.0, marks=pytest.mark.slow),
    pytest.param("mobilenet_v2_torchvision_v2", 0.25, marks=pytest.mark.slow),
    pytest.param("mobilenet_v2_tpu_4096", 0.25, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "width"), STEPS_OF_EACH)
def test_a_few_steps_of_each(command, tmp_path, name, width):
    config = recipe(name)
    group = config.model.bn_group_size
    group = group if group == "device" else min(group, 4)
    fields = FEW | {"model.width": width, "model.bn_group_size": group, "num_epochs": 1.0}
    result = command(name, "train", **fields)
    assert result["examples"] == 9

    # 18 photos in batches of 8, the last one filled or dropped.
    steps = 3 if config.data.last_batch == "fill" else 2
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, steps + 1))
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in trained)
    # The classifier's weights are small at first: log(3) nats for three classes.
    assert trained[0]["loss"] == pytest.approx(np.log(3), abs=0.2)

    saved = model_dir.read(str(tmp_path / "run"))
    assert saved.spec.preprocessing.image_size == 224
    assert saved.spec.preprocessing.eval_transforms == config.data.eval_transforms
    assert saved.spec.backbone.padding == (config.model.padding or "torch")
    if "176" in config.data.train_transforms:
        # It is trained and evaluated at two sizes: a later evaluation takes the second one, too.
        assert command("mobilenet_v2_8xb32_in1k", "eval", batch_size=8) == result
