"""An install with requirements/light.txt converts and predicts, and names what else is needed."""

import configparser
import json
import re
import subprocess
import sys

import pytest

from mbv2_jax import model_dir
from mbv2_jax.convert import writer
from tests.support import REPOSITORY, commands, tiny_model

LIGHT, LOCK = (REPOSITORY / "requirements" / name for name in ("light.txt", "lock.txt"))

# What only training and its data import.
BEYOND = {
    "array-record",
    "fsspec",
    "google-crc32c",
    "grain",
    "matplotlib",
    "pycocotools",
    "scipy",
    "tensorboardx",
    "tensorflow-datasets",
}

# Hides every installed distribution that is not named on the command line.
HIDE = """
import importlib.metadata, re, sys

light = set(sys.argv.pop(1).split(","))

def is_hidden(owners):
    return not light & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}

modules = importlib.metadata.packages_distributions().items()
hidden = {module for module, owners in modules if is_hidden(owners)}

class Hidden:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
assert {"grain", "scipy", "tensorflow_datasets"} <= hidden
"""

COMMAND = """
import importlib
from mbv2_jax import command_line

command_line.run(importlib.import_module(sys.argv.pop(1)).main)
"""

USE = """
import json, pathlib
import jax, mbv2_jax, numpy as np, optax
from mbv2_jax import drawing, model_dir
from mbv2_jax.convert import importer, writer
from mbv2_jax.training import optimizer, schedule, state, step

model, weights, photo = sys.argv[1:4]
predictor = mbv2_jax.init_model(model)
prediction = mbv2_jax.inference_model(predictor, photo)
predictor.task.draw(drawing.Image.open(photo), prediction, 3)
imported = importer.load(weights).saved
copy = pathlib.Path(model).with_name("copy")
model_dir.write(copy, imported.params, imported.batch_stats, imported.description)
torchs = copy.with_suffix(".pth")
writer.write(imported, "torchvision", torchs)
again = importer.load(torchs).saved
jax.tree.map(np.testing.assert_array_equal, again.variables(), imported.variables())
assert "torch" not in sys.modules
print(json.dumps({
    "scores": prediction["pred_scores"].tolist(),
    "features": predictor.extract_feat(photo).shape,
    "converted": mbv2_jax.inference_model(mbv2_jax.init_model(copy), photo)["pred_scores"].tolist(),
}))
"""


def normalised(requirement: str) -> str:
    """Returns the name in a line of requirements, as pip compares it."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def pins(path) -> dict[str, set[str]]:
    """Returns {"NAME==VERSION ; MARKER": hashes} of a lock file."""
    found: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        if re.match(r"\w", line):
            pin = line.removesuffix("\\").strip()
            found[pin] = set()
        elif line.strip().startswith("--hash="):
            found[pin].add(line.removesuffix("\\").strip())
    return found


@pytest.fixture
def run(cache, tmp_path):
    """Returns a function that runs code where the packages of light.txt alone are installed."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        light = ",".join(["mbv2-jax", *map(normalised, pins(LIGHT))])
        environment = commands.environment(cache) | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(
            [sys.executable, "-c", HIDE + code, light, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_light_is_a_part_of_the_lock():
    light, lock = pins(LIGHT), pins(LOCK)
    assert light
    assert light.items() <= lock.items()


def test_every_requirement_is_light_or_known_to_be_more():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = setup["options"]["install_requires"]
    needed = {normalised(line) for line in lines.splitlines() if re.match(r"\w", line)}
    assert needed - set(map(normalised, pins(LIGHT))) == BEYOND


def test_models_are_read_converted_used_and_written(run, tmp_path):
    model = tiny_model.write(tmp_path / "model")
    weights = tmp_path / "model.safetensors"
    writer.write(model_dir.read(model), "safetensors", weights)
    tiny_model.photo(0).save(tmp_path / "photo.png")
    done = run(USE, model, weights, tmp_path / "photo.png")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["scores"]) == len(tiny_model.CLASSES)
    assert found["features"] == [1, 1280]
    assert found["converted"] == found["scores"]  # the same arrays in the same program


def test_predict_writes_pictures(run, tmp_path):
    folder = tiny_model.write_images(tmp_path, ["0.png"])
    model, photo = folder / "model", folder / "0.png"
    shown = tmp_path / "shown"
    command = ("mbv2_jax.predict", photo, f"--checkpoint={model}", f"--show-dir={shown}")
    done = run(COMMAND, *command)
    assert done.returncode == 0, done.stderr
    assert (shown / "0.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["mbv2_jax.main", "--config=digits", "--workdir=run"],
            "training needs grain, matplotlib, tensorboardX, which are not installed: run pip "
            "install . in the clone of mbv2_jax",
        ),
        (
            ["mbv2_jax.analysis.data_commands", "verify", "--config=cifar10"],
            "dataset 'cifar10' needs tensorflow_datasets, array_record, google_crc32c, which are "
            "not installed: run pip install . in the clone of mbv2_jax",
        ),
    ],
)
def test_what_else_a_command_needs_is_named(run, tmp_path, arguments, line):
    done = run(COMMAND, *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {line}"
    assert not (tmp_path / "run").exists()
