"""SavedModels: written in .venv-tensorflow, and run there by TensorFlow alone."""

import json
import pathlib
import subprocess
from typing import Any

import jax
import numpy as np
import pytest

from mbv2_jax import inference
from mbv2_jax.export.program import Program
from tests.support import REPOSITORY, tiny_model

PYTHON = REPOSITORY / ".venv-tensorflow" / "bin" / "python"

# What a person without this package writes.
ALONE = """
import sys
sys.modules["mbv2_jax"] = sys.modules["jax"] = None
import numpy as np, tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
images = np.load(sys.argv[2])
np.savez(sys.argv[3], **model.signatures["serving_default"](images=tf.constant(images)))
"""


def run(folder: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [str(PYTHON), *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    if not PYTHON.exists():
        pytest.fail("no .venv-tensorflow here; make test-tensorflow makes it and runs this test")
    tiny_model.write(tmp_path / "model")
    return tmp_path


def expected(folder: pathlib.Path, images: np.ndarray) -> Any:
    program = Program(inference.open_model(folder / "model", seed=0))
    return jax.jit(program)(images)["logits"]


@pytest.mark.tensorflow
def test_tensorflow_alone_gives_jaxs_logits_for_any_number_of_images(folder):
    export = ["-m", "mbv2_jax.export", "model", "--to=savedmodel", "--output=saved"]
    status, out, err = run(folder, *export, "--json")
    assert status == 0, err
    assert err == ""
    report = json.loads(out)
    assert report["difference"]["logits"] < 1e-4 and report["agreement"] == 1
    assert report["operators"]["XlaCallModule"] == 1

    size = (tiny_model.SIZE, tiny_model.SIZE, 3)
    for count in (1, 3):
        images = np.random.default_rng(0).integers(0, 256, (count, *size), dtype=np.uint8)
        np.save(folder / "images.npy", images)
        status, _, err = run(folder, "-c", ALONE, "saved", "images.npy", "found.npz")
        assert status == 0, err
        with np.load(folder / "found.npz") as found:
            # Float32 rounds at 6e-8, in 60 layers, of logits up to 10.
            np.testing.assert_allclose(found["logits"], expected(folder, images), atol=1e-4)

    status, _, err = run(folder, *export)
    assert status == 2 and "saved exists: name another file, or give --force" in err
    assert run(folder, *export, "--force", "--batch=2")[0] == 0
    status, _, err = run(folder, "-c", ALONE, "saved", "images.npy", "found.npz")
    assert status == 1 and "(2, 32, 32, 3)" in err  # there are 3 images
    assert sorted(path.name for path in folder.iterdir()) == [
        "found.npz",
        "images.npy",
        "model",
        "saved",
    ]
