"""Folders for timm and transformers: what is replaced, and what is refused.

tests/parity/convert/test_hub_folders.py opens them in timm and transformers.
"""

import dataclasses
import json
import pathlib

import pytest
import safetensors.numpy

from mbv2_jax import model_dir
from mbv2_jax.model_json import Description
from mbv2_jax.spec import Backbone, Preprocessing
from mbv2_jax.storage import atomic
from tests.support import tiny_model
from tests.support.convert_command import make_run, refused

FILES = {
    "timm": {"config.json", "model.safetensors"},
    "transformers": {"config.json", "model.safetensors", "preprocessor_config.json"},
}


@pytest.fixture
def run(monkeypatch, capsys):
    return make_run(monkeypatch, capsys)


def write(folder: pathlib.Path, width: float = 0.35, transforms: str = "") -> pathlib.Path:
    """Writes the model directory of a network of a width that both frameworks have."""
    backbone = Backbone(width)
    images = Preprocessing(eval_transforms=transforms) if transforms else Preprocessing()
    spec = dataclasses.replace(tiny_model.SPEC, backbone=backbone, preprocessing=images)
    network = model_dir.SavedModel({}, {}, Description(spec, tiny_model.CLASSES), folder).module()
    arrays = tiny_model.filled(model_dir.shapes_of(network))
    description = Description(spec, tiny_model.CLASSES)
    model_dir.write(folder, arrays["params"], arrays["batch_stats"], description)
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("to", FILES)
def test_a_folder_is_replaced_only_with_force_and_only_if_all_of_it_is_ours(to, run, tmp_path):
    model, hub = write(tmp_path / "m"), tmp_path / "mobilenetv2_035.mine"
    command = (model, f"--to={to}", f"--output={hub}")
    hub.mkdir()  # an empty folder is filled
    assert run(*command)[0] == 0
    before = contents(hub)
    assert before.keys() == FILES[to]
    assert "exists already: give another, or --force" in refused(run(*command))
    (hub / "config.json").write_text("{}")
    assert run(*command, "--force")[0] == 0
    assert contents(hub)["config.json"] == before["config.json"]
    assert contents(hub).keys() == FILES[to]
    (hub / "README.md").write_text("precious")
    assert "did not write all of it" in refused(run(*command, "--force"))
    (hub / "README.md").unlink()
    theirs = safetensors.numpy.load(before["model.safetensors"])
    safetensors.numpy.save_file(theirs, hub / "model.safetensors", {"format": "pt"})
    before = contents(hub)
    assert "did not write all of it" in refused(run(*command, "--force"))
    assert contents(hub) == before


def test_a_failed_write_leaves_the_old_folder(run, tmp_path, monkeypatch):
    model, hub = write(tmp_path / "m"), tmp_path / "hub"
    command = (model, "--to=transformers", f"--output={hub}")
    assert run(*command)[0] == 0
    before = contents(hub)

    def full(path: pathlib.Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_json", full)
    assert "No space left on device" in refused(run(*command, "--force"))
    assert contents(hub) == before
    assert {path.name for path in tmp_path.iterdir()} == {"m", "hub"}


def test_a_name_with_a_suffix_of_weights_is_a_file(run, tmp_path):
    file = tmp_path / "model.safetensors"
    assert run(write(tmp_path / "m"), "--to=timm", f"--output={file}")[0] == 0
    assert file.is_file()
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("to", "output"), [("timm", "m.onnx"), ("torchvision", "m")])
def test_other_outputs_are_refused(to, output, run, tmp_path):
    line = refused(run(tmp_path / "m", f"--to={to}", f"--output={tmp_path / output}"))
    assert ("or a FOLDER" in line) == (to == "timm")


@pytest.mark.parametrize(
    ("to", "transforms"),
    [("timm", "center_crop(size)"), ("transformers", "resize_edge(256)|center_crop(200)")],
)
def test_an_evaluation_that_no_config_holds_is_refused(to, transforms, run, tmp_path):
    model = write(tmp_path / "m", transforms=transforms)
    line = refused(run(model, f"--to={to}", f"--output={tmp_path / 'hub'}"))
    assert transforms in line
    assert "give a FILE" in line
    assert not (tmp_path / "hub").exists()


def test_a_width_that_timm_lacks_is_refused(run, tmp_path):
    model = write(tmp_path / "m", width=0.25)
    line = refused(run(model, "--to=timm", f"--output={tmp_path / 'hub'}"))
    assert "no network of width 0.25" in line
    assert not (tmp_path / "hub").exists()


def test_the_config_names_what_a_person_looks_for(run, tmp_path):
    assert run(write(tmp_path / "m"), "--to=timm", f"--output={tmp_path / 'hub'}")[0] == 0
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architecture"] == "mobilenetv2_035"
    assert config["label_names"] == list(tiny_model.CLASSES)
    # 224 / 0.875 = 256, and ImageNet's mean and standard deviation as everyone writes them.
    assert config["pretrained_cfg"]["crop_pct"] == 0.875
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    assert config["pretrained_cfg"]["std"] == [0.229, 0.224, 0.225]
