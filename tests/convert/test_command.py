"""The command `python -m convert`; tests/parity/convert/ gives it files of other frameworks."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from mbv2_jax import model_dir
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from tests.support import REPOSITORY, tiny_model
from tests.support.convert_command import make_run, refused


@pytest.fixture
def run(monkeypatch, capsys):
    return make_run(monkeypatch, capsys)


def test_help_needs_no_jax():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['convert', '--help']\n"
        "try: runpy.run_module('convert', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "sys.exit(bool({'jax', 'torch', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, "--help imported jax or torch, which takes seconds"
    for word in ("python -m convert mmpretrain", "--drop-background", "71.86", "--to"):
        assert word in done.stdout


def test_our_own_file_without_its_description_says_what_is_assumed(run, tmp_path):
    tiny_model.write(tmp_path / "m")
    file = tmp_path / "m.safetensors"
    assert run(tmp_path / "m", "--to=safetensors", f"--output={file}")[0] == 0
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file)  # without metadata
    code, _, err = run(file, f"--output={tmp_path / 'again'}")
    assert code == 0
    for field in ("model.padding", "model.bn_epsilon", "data.mean", "data.eval_transforms"):
        assert f"{field}=" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--to=torchvision", "--output=x.onnx"], "give FILE.pth"),
        (["--to=safetensors", "--output=x.pth"], "give FILE.safetensors"),
        (["--to=torchvision", "--output=x.pth"], "model.strides"),
        (["--to=timm", "--output=x.pth"], "no network of width 0.1"),
    ],
)
def test_a_model_that_would_compute_something_else_is_not_written(
    run, tmp_path, monkeypatch, arguments, named
):
    monkeypatch.chdir(tmp_path)
    tiny_model.write(tmp_path / "m")
    model = tmp_path / "m" / "model.json"
    info = json.loads(model.read_text())
    info["backbone"]["strides"][0] = 1
    model.write_text(json.dumps(info))
    assert named in refused(run("m", *arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_everything_survives_our_own_file(run, tmp_path):
    tiny_model.write(tmp_path / "m")
    file = tmp_path / "m.safetensors"
    assert run(tmp_path / "m", "--to=safetensors", f"--output={file}")[0] == 0
    code, _, err = run(file, f"--output={tmp_path / 'again'}")
    assert (code, err) == (0, "")
    before, after = (model_dir.read(tmp_path / name) for name in ("m", "again"))
    for ours, theirs in ((before.params, after.params), (before.batch_stats, after.batch_stats)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert after.description.origin["layout"] == "mbv2_jax"
    origin = before.description.origin
    assert dataclasses.replace(after.description, origin=origin) == before.description


def test_a_size_set_alone_keeps_the_share_that_the_file_states(run, tmp_path):
    tiny_model.write(tmp_path / "m")  # 32 pixels of 36
    file = tmp_path / "m.safetensors"
    assert run(tmp_path / "m", "--to=safetensors", f"--output={file}")[0] == 0
    assert run(file, f"--output={tmp_path / 'again'}", "--set=data.image_size=64")[0] == 0
    saved = model_dir.read(tmp_path / "again")
    assert saved.spec.preprocessing.eval_transforms == "resize_edge(72)|center_crop(size)"


def with_description(file: pathlib.Path, text: str) -> pathlib.Path:
    """Replaces the model.json of one of our .safetensors files."""
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(arrays, file, {"model.json": text})
    return file


def test_our_own_file_with_a_description_of_format_1_is_read(run, tmp_path):
    tiny_model.write(tmp_path / "m")
    file = tmp_path / "m.safetensors"
    assert run(tmp_path / "m", "--to=safetensors", f"--output={file}")[0] == 0
    info = {
        "format": 1,
        "task": "classification",
        "architecture": {
            "name": "mobilenet_v2",
            "width": 0.1,
            "strides": [2, 1, 2, 2, 2, 1, 2, 2],
            "num_classes": len(tiny_model.CLASSES),
        },
        "conventions": {
            "dropout": 0.3,
            "padding": "same",
            "bn_epsilon": 0.001,
            "bn_momentum": 0.99,
        },
        "preprocessing": {
            "image_size": 48,
            "eval_transforms": "resize(size)",
            "mean": [1.0, 2.0, 3.0],
            "std": [4.0, 5.0, 6.0],
        },
        "class_names": list(tiny_model.CLASSES),
        "origin": {"kind": "made by a test"},
    }
    with_description(file, json.dumps(info))
    code, _, err = run(file, f"--output={tmp_path / 'again'}")
    assert (code, err) == (0, "")
    saved = model_dir.read(tmp_path / "again")
    assert saved.classes == tiny_model.CLASSES
    assert saved.spec == ModelSpec(
        task="classification",
        backbone=Backbone(
            width=0.1, strides=(2, 1, 2, 2, 2, 1, 2, 2), padding="same", bn_epsilon=1e-3
        ),
        head=tiny_model.SPEC.head,
        preprocessing=Preprocessing(48, "resize(size)", (1, 2, 3), (4, 5, 6)),
        mode=TrainingMode(dropout=0.3, bn_momentum=0.99),
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "model.json in its metadata is not JSON"),
        ("[" * 100_000, "model.json in its metadata is not JSON"),  # Python's parser recurses
        ("[]", "model.json in its metadata has format None"),
        ('{"format": 3}', "model.json in its metadata has format 3; this version reads 1 and 2"),
        ('{"format": 2, "task": "classification"}', "backbone is missing"),
    ],
)
def test_a_damaged_description_is_refused(run, tmp_path, text, named):
    tiny_model.write(tmp_path / "m")
    file = tmp_path / "m.safetensors"
    assert run(tmp_path / "m", "--to=safetensors", f"--output={file}")[0] == 0
    with_description(file, text)
    assert named in refused(run(file, f"--output={tmp_path / 'again'}"))
    assert not (tmp_path / "again").exists()
