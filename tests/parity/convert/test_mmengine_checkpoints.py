"""Checkpoints of mmpretrain's own training, with logs, optimizer and averages."""

import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import mbv2_jax
from mbv2_jax.convert import readers
from mbv2_jax.errors import UserError
from tests.support import REPOSITORY, mmengine_training, peers

CHECKPOINTS = ["plain/epoch_1.pth", "plain/epoch_2.pth", "ema/epoch_1.pth", "ema/epoch_2.pth"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "tests.support.mmengine_training", str(folder)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


def assert_is(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    """Asserts the same names and the same bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name, strict=True)


def loaded(path: pathlib.Path, monkeypatch) -> torch.nn.Module:
    """Returns mmpretrain's classifier with the weights that mmengine loads from a checkpoint."""
    from mmengine.runner import load_checkpoint

    mmpretrain = peers.mmpretrain()
    model = mmpretrain.registry.MODELS.build(mmengine_training.MODEL)
    # mmengine relies on torch.load running code, which torch refuses by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    load_checkpoint(model, str(path), map_location="cpu", strict=True)
    return model.eval()


def test_the_files_are_of_the_kind_that_torch_refuses(trained):
    """The other tests rely on this."""
    for name in CHECKPOINTS:
        with zipfile.ZipFile(trained / name) as archive:
            (pickled,) = (member for member in archive.namelist() if member.endswith("data.pkl"))
            content = archive.read(pickled)
        assert b"mmengine.logging.history_buffer\nHistoryBuffer\n" in content
        assert b"__builtin__\ngetattr\n" in content  # Python 2's name of builtins
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(trained / name, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD:UserWarning:")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_weights_are_those_that_mmengine_loads(name, trained, monkeypatch):
    file = readers.read(trained / name)
    assert_is(file.tensors, loaded(trained / name, monkeypatch).state_dict())
    assert file.contents.class_names == mmengine_training.CLASSES
    assert file.contents.selection == "state_dict" + " (averaged: EMA)" * name.startswith("ema")


def test_averaged_and_raw_weights(trained):
    raw = torch.load(trained / "ema" / "raw.pth")
    averaged = torch.load(trained / "ema" / "averaged.pth")
    assert (raw["head.fc.weight"] != averaged["head.fc.weight"]).any()
    path = trained / "ema" / "epoch_2.pth"
    assert_is(readers.read(path, ema=True).tensors, averaged)
    assert_is(readers.read(path, ema=False).tensors, raw)
    assert (
        readers.read(path, ema=False).contents.selection == "ema_state_dict (not the averaged ones)"
    )


def test_without_averages(trained):
    path = trained / "plain" / "epoch_2.pth"
    assert_is(readers.read(path, ema=False).tensors, torch.load(trained / "plain" / "raw.pth"))
    with pytest.raises(UserError, match="no averaged"):
        readers.read(path, ema=True)


def test_without_mmengine(trained, tmp_path):
    code = """
import sys
sys.modules["mmengine"] = None  # as if it were not installed
import numpy as np
from mbv2_jax.convert import readers
np.savez(sys.argv[2], **readers.read(sys.argv[1]).tensors)
assert not [name for name in sys.modules if name.startswith("mmengine.")]
"""
    files = [str(trained / "ema" / "epoch_2.pth"), str(tmp_path / "read.npz")]
    command = [sys.executable, "-c", code, *files]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300)
    with np.load(tmp_path / "read.npz") as read:
        assert_is(dict(read), torch.load(trained / "ema" / "averaged.pth"))


@pytest.mark.filterwarnings("ignore:.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD:UserWarning:")
@pytest.mark.parametrize("name", ["plain/epoch_2.pth", "ema/epoch_2.pth"])
def test_pixels_give_the_same_logits(name, trained, monkeypatch):
    """Raw pixels go in, so that mean and std are compared, too."""
    theirs = loaded(trained / name, monkeypatch)
    ours = mbv2_jax.init_model(trained / name)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        # Its pipelines decode to BGR, and its preprocessor reverses the channels.
        batch = theirs.data_preprocessor({"inputs": peers.nchw(pixels[..., ::-1].copy())})
        expected = theirs(batch["inputs"], mode="tensor").numpy()
    assert ours.class_names == mmengine_training.CLASSES
    # Rounding to float32: measured, 2e-7 of the largest logit. A std wrong by 1 % gives 1e-4.
    np.testing.assert_allclose(ours(pixels), expected, rtol=0, atol=1e-5 * abs(expected).max())
