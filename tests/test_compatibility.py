"""Files written by version 0.1: today's commands open, evaluate, resume and predict with them.

tests/fixtures/version_0_1/make.py wrote the files, with the commit that it names. The network is
whole, and the commands are the real ones.
"""

import json
import pathlib
import shutil
from typing import Any

import pytest

from tests.support import commands

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "version_0_1"
CONFIG = f"--config={FIXTURE / 'config.py'}"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())

# Relative tolerances. Another CPU orders float32 sums differently, which moves a loss or a
# probability by about 1e-6 of it.
FORWARD = 1e-4
# The first three steps after the checkpoint: measured 1e-7 off.
RESUMED = {"loss": 1e-5, "grad_norm": 1e-5, "learning_rate": 1e-6}
# The nine after them amplify that: on another kind of EPYC than the fixture's, a training loss was
# 3.1e-3 off, a gradient's norm 6.6e-2, the evaluation's loss 3.4e-4, and top-1 four images of 360.
TRAINED = {"loss": 1e-2, "grad_norm": 0.2, "learning_rate": 1e-6}
BOUNDARY = 2.1  # points: one image of a batch of 48, seven of 360


def assert_same_line(
    ours: dict[str, Any], theirs: dict[str, Any], tolerances: dict[str, float] = TRAINED
) -> None:
    """Asserts that a line of metrics.jsonl has the fields and values of another."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if tolerance := tolerances.get(name):
            value = pytest.approx(value, rel=tolerance)
        elif name in ("top1", "top5"):  # some examples on a boundary may fall on either side
            value = pytest.approx(value, abs=BOUNDARY)
        assert ours[name] == value, (name, ours, theirs)


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    return shutil.copytree(FIXTURE / "workdir", tmp_path / "workdir")


def last_line(cache: pathlib.Path, *arguments: str) -> dict[str, Any]:
    """Runs the main command with the fixture's config and returns its last line."""
    status, out, err = commands.run(cache, CONFIG, *arguments, module=commands.WHOLE)
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def test_checkpoint_evaluates_as_before(workdir, cache):
    ours = last_line(cache, "--mode=eval", f"--checkpoint={workdir}")
    theirs = EXPECTED["evaluation"]
    assert list(ours) == ["top1", "top5", "loss", "examples"]
    assert ours == theirs | {"loss": pytest.approx(theirs["loss"], rel=FORWARD)}


@pytest.mark.slow
def test_run_resumes_as_if_nothing_had_changed(workdir, cache):
    before = commands.metrics(workdir)
    result = last_line(cache, f"--workdir={workdir}")
    ours, theirs = commands.metrics(workdir), commands.timeless(EXPECTED["metrics"])
    assert ours[: len(before)] == theirs[: len(before)] == before
    assert len(ours) == len(theirs)
    for number, (line, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_line(line, expected, RESUMED if number == len(before) else TRAINED)
    assert_same_line(result, EXPECTED["result"])
    # Version 0.1 writes the same files.
    assert (workdir / "model" / "model.json").is_file()
    assert (workdir / "checkpoints" / "48" / "state").is_dir()


def test_model_directory_predicts_as_before(tmp_path, cache):
    model = shutil.copytree(FIXTURE / "model", tmp_path / "model")
    images = [str(path) for path in sorted((FIXTURE / "images").iterdir())]
    arguments = [*images, f"--checkpoint={model}", "--json", "--topk=10"]
    status, out, err = commands.run(cache, *arguments, module="mbv2_jax.predict")
    assert status == 0, err
    predicted = {
        pathlib.Path(entry["image"]).name: entry["predictions"]
        for entry in map(json.loads, out.splitlines())
    }
    assert predicted.keys() == EXPECTED["predictions"].keys()
    for name, theirs in EXPECTED["predictions"].items():
        for ours, entry in zip(predicted[name], theirs, strict=True):
            assert ours == entry | {"score": pytest.approx(entry["score"], rel=FORWARD)}
