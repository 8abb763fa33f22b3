"""The commands of docs/detection.md, from a folder in YOLO's layout to predictions."""

import json
import pathlib

import pytest

from mbv2_jax import model_dir
from mbv2_jax.data import digits
from tests.support import commands, short_network, tiny_model

# The short network has no layer5; the rest is the recipe's, with fewer and smaller pictures.
SMALL = [
    "--config.model.taps=('layer7', 'last')",
    "--config.model.extra_channels=(16,)",
    "--config.model.anchor_sizes=(0.3, 0.5, 0.7, 0.9)",
    "--config.data.image_size=32",
    "--config.batch_size=4",
    "--config.num_epochs=2",
    "--config.log.every_steps=1",
]


@pytest.mark.slow
def test_a_folder_of_yolo_is_trained_on_and_predicted(cache, tmp_path, few_layers):
    pictures = tmp_path / "pictures"
    digits.main([f"--export={pictures}", "--scenes=yolo", "--count=6"])
    with short_network.in_use():
        tiny_model.write(tmp_path / "classifier")
    data = ["--config=finetune_detection", f"--config.data.source=yolo:{pictures}"]

    status, text, err = commands.run(
        cache,
        *data,
        *SMALL,
        f"--workdir={tmp_path / 'run'}",
        f"--checkpoint={tmp_path / 'classifier'}",
    )
    assert status == 0, err
    assert "with new heads" in text + err
    result = json.loads(text.splitlines()[-1])
    assert set(result) == {"mAP", "mAP50", "mAP75", "loss", "examples"}
    assert result["examples"] == 6
    logged = [line for line in commands.metrics(tmp_path / "run") if line["split"] == "train"]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]  # two epochs of 6 pictures in fours
    assert logged[-1]["loss"] < logged[0]["loss"]
    spec = model_dir.read(tmp_path / "run").spec
    assert spec.backbone.width == 0.1 and spec.preprocessing.mean == tiny_model.MEAN

    status, text, err = commands.run(
        cache,
        *data,
        "--mode=eval",
        f"--checkpoint={tmp_path / 'run'}",
        f"--out={tmp_path / 'found.json'}",
    )
    assert status == 0, err
    assert json.loads(text.splitlines()[-1])["mAP"] == result["mAP"]
    boxes = json.loads((tmp_path / "found.json").read_text())

    status, text, err = commands.run(
        cache,
        *(str(pictures / "images" / "val"), f"--checkpoint={tmp_path / 'run'}", "--json"),
        *("--score=0", f"--show-dir={tmp_path / 'shown'}"),
        module="tests.support.short_predict",
    )
    assert status == 0, err
    lines = [json.loads(line) for line in text.splitlines()]
    assert sum(len(line["predictions"]) for line in lines) == len(boxes) > 0
    names = {pathlib.Path(line["image"]).name for line in lines}
    assert names == {file.name for file in (tmp_path / "shown").iterdir()}
    assert len(names) == 6
