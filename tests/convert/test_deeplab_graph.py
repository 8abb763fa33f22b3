"""A frozen graph of deeplab that TensorFlow writes gives TensorFlow's logits here."""

import pathlib
import subprocess
import tarfile

import numpy as np
import pytest

import mbv2_jax
from mbv2_jax import model_dir
from mbv2_jax.convert import download, importer
from mbv2_jax.data.classes import VOC_NAMES
from tests.support import REPOSITORY, run_deeplab
from tests.support.convert_command import make_run


def written_by_tensorflow(
    folder: pathlib.Path, images: np.ndarray, *arguments: object
) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """Returns a graph, and TensorFlow's results: see tests/support/write_deeplab_graph.py."""
    python = REPOSITORY / ".venv-tensorflow" / "bin" / "python"
    if not python.exists():
        pytest.fail("no .venv-tensorflow here; make test-tensorflow makes it and runs this test")
    graph, pictures, results = (folder / name for name in ("graph.pb", "x.npy", "results.npz"))
    np.save(pictures, images)
    script = REPOSITORY / "tests" / "support" / "write_deeplab_graph.py"
    command = [python, script, graph, pictures, results, *arguments]
    process = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return graph, dict(np.load(results))


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("size", "output_stride", "width", "dilations", "rates"),
    [
        (513, 16, 1.0, "", ()),  # those of the published network
        (513, 8, 0.5, "", ()),  # and of mobilenetv2_dm05, whose channels are not multiples of 8
        (129, 8, 0.5, "12 24 36", (6, 12, 18)),  # which TensorFlow doubles at output stride 8
        (129, 16, 0.75, "6 12 18", (6, 12, 18)),
        (97, 32, 0.25, "", ()),
    ],
)
def test_logits_and_classes(
    size, output_stride, width, dilations, rates, tmp_path, monkeypatch, capsys
):
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    graph, theirs = written_by_tensorflow(tmp_path, images, size, output_stride, width, dilations)
    code, out, err = make_run(monkeypatch, capsys)(graph, f"--output={tmp_path / 'm'}")
    assert code == 0, err
    assert "TensorFlow's deeplab" in out
    assert f"its image pooling is for {size} pixels" in err
    saved = model_dir.read(tmp_path / "m")
    backbone, head = saved.spec.backbone, saved.spec.head
    assert (backbone.output_stride, backbone.width, backbone.padding) == (
        output_stride,
        width,
        "same",
    )
    assert (head.num_classes, head.aspp_rates, head.align_corners) == (21, rates, True)
    assert saved.spec.preprocessing.image_size == size
    assert not saved.spec.mode.folded_norm

    ours = run_deeplab.coarse_logits(saved, images.astype(np.float32) / 127.5 - 1)
    logits = theirs["logits"]
    assert logits.std() > 1
    # float32 rounds at 6e-8 of the maps before ReLU6, of up to 1,000, and 54 layers enlarge that.
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-3 * abs(logits).max())
    predictions = mbv2_jax.init_model(tmp_path / "m").predict(list(images))
    masks = np.stack([prediction["mask"] for prediction in predictions])
    # Neighbouring pixels of two classes, whose logits are within that, may be exchanged.
    assert (masks != theirs["classes"]).mean() < 1e-3
    assert len(np.unique(masks)) > 1


@pytest.mark.tensorflow
def test_the_published_name_has_the_conventions_of_its_figure(tmp_path, monkeypatch):
    """The graph in the archive is for output stride 8, and 75.32 mIoU was measured at 16."""
    images = np.zeros((1, 129, 129, 3), np.uint8)
    graph, _ = written_by_tensorflow(tmp_path, images, 129, 8, 0.25, "")
    archive = tmp_path / "deeplabv3_mnv2_pascal_train_aug_2018_01_29.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(graph, "deeplabv3_mnv2_pascal_train_aug/frozen_inference_graph.pb")
    monkeypatch.setattr(download, "locate", lambda source: archive)
    imported = importer.load("deeplabv3_voc")
    spec = imported.saved.spec
    assert spec.backbone.output_stride == 16
    assert spec.preprocessing.image_size == 513
    assert imported.saved.classes == VOC_NAMES
    card = imported.saved.description.published
    assert card is not None
    assert (card["mIoU"], card["examples"]) == (75.32, 1449)
    assert "75.32 mIoU" in imported.summary["published"]
    note = "the graph in the file has model.output_stride=8, and the published figures are for 16"
    assert any(note in line for line in imported.warnings)
    given = importer.load("deeplabv3_voc", fields={"model.output_stride": 8}).saved
    assert given.spec.backbone.output_stride == 8
    assert given.description.published is None
