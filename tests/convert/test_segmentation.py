"""Segmentation networks in files, those that do not fit, and backbones from other networks."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mbv2_jax
from mbv2_jax import model_dir, tasks
from mbv2_jax.convert import arrays, importer
from mbv2_jax.errors import UserError
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.segmentation.settings import Head
from tests.support import tiny_model
from tests.support.convert_command import make_run, refused
from tests.support.graph_def import GraphDef

CLASSES = ("sky", "road", "car")
SPEC = ModelSpec(
    "segmentation",
    Backbone(width=0.1, padding="same", output_stride=16, last_convolution=False),
    Head(num_classes=3, aspp_rates=(2, 4), align_corners=False),
    Preprocessing(33, "resize(33)", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),
    TrainingMode(dropout=0.1),
)


@pytest.fixture(autouse=True)
def short_network(few_layers):
    """The network has two blocks, also where the shapes of its arrays are remembered."""
    arrays.shapes.cache_clear()
    yield
    arrays.shapes.cache_clear()


def write(path: pathlib.Path, **head: object) -> pathlib.Path:
    """Writes a segmentation model with random arrays."""
    spec = dataclasses.replace(SPEC, head=dataclasses.replace(SPEC.head, **head))
    task = tasks.find(spec.task).for_model(spec.head, CLASSES)
    return tiny_model.write_for(task, spec, path)


@pytest.fixture
def run(monkeypatch, capsys):
    return make_run(monkeypatch, capsys)


def arrays_of(path: pathlib.Path) -> str:
    return model_dir.arrays_sha256(model_dir.read(path).variables())


def test_a_safetensors_file_keeps_everything(run, tmp_path):
    """Dilations, classes and preprocessing too, and every array to the bit."""
    ours, file = write(tmp_path / "m"), tmp_path / "m.safetensors"
    code, out, err = run(ours, "--to=safetensors", f"--output={file}")
    assert code == 0, err
    assert "with ASPP at rates 2, 4, 3 classes of a pixel" in out
    code, out, err = run(file, f"--output={tmp_path / 'again'}")
    assert (code, err) == (0, "")
    assert "width 0.1, output stride 16, Mobile DeepLabv3 with ASPP at rates 2, 4" in out
    again = model_dir.read(tmp_path / "again")
    assert (again.spec, again.classes) == (SPEC, CLASSES)
    assert arrays_of(tmp_path / "again") == arrays_of(ours)


def test_a_file_that_lost_its_description(tmp_path, run):
    """Without ASPP the arrays tell the head; the dilations of ASPP they do not tell."""
    for name, rates in (("plain", ()), ("aspp", (2, 4))):
        file = tmp_path / f"{name}.safetensors"
        run(write(tmp_path / name, aspp_rates=rates), "--to=safetensors", f"--output={file}")
        save_file(load_file(file), file)
    imported = importer.load(tmp_path / "plain.safetensors")
    assert imported.saved.spec.head == Head(num_classes=3)
    (assumed,) = (line for line in imported.warnings if "it is assumed" in line)
    assert "model.output_stride=16" in assumed and "model.align_corners=True" in assumed
    with pytest.raises(UserError, match=r"dilations of its 2 3x3 convolutions are not known.*"):
        importer.load(tmp_path / "aspp.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("aspp0/norm/bias"), r"missing: aspp0/norm/bias"),
        (
            lambda t: t.update({"decoder/kernel": t["logits/kernel"]}),
            r"not of this network: decoder/kernel",
        ),
        (
            lambda t: t.update({"logits/kernel": t["logits/kernel"][:, :, :9]}),
            r"unfit: logits/kernel is float32 \(1, 1, 9, 3\), not \(1, 1, 256, 3\)",
        ),
        (
            lambda t: t.update({"projection/norm/var": -t["projection/norm/var"]}),
            r"projection/norm/var, a variance, is negative",
        ),
        (
            lambda t: t.update({f"x/{n}": a for n, a in t.items() if "pro" in n or "log" in n}),
            r"there are several, behind the prefixes '', 'x/'",
        ),
    ],
)
def test_heads_that_do_not_fit(change, says, run, tmp_path):
    """They are refused with every fault, and --features-only converts the backbone."""
    file = tmp_path / "m.safetensors"
    run(write(tmp_path / "m", aspp_rates=()), "--to=safetensors", f"--output={file}")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=says) as caught:
        importer.load(file)
    assert "its head is not that of Mobile DeepLabv3" in str(caught.value)
    assert "--features-only converts the backbone alone" in str(caught.value)
    assert importer.load(file, features_only=True).saved.features_only


def test_what_other_frameworks_lack(run, tmp_path):
    """The dilations, the width or the network."""
    model = write(tmp_path / "m")
    outcome = run(model, "--to=torchvision", f"--output={tmp_path / 'm.pth'}")
    error = refused(outcome)
    assert "a model for segmentation, which --to=torchvision does not write" in error
    assert "it has --to=safetensors and --to=transformers" in error
    error = refused(run(model, "--to=transformers", f"--output={tmp_path / 'hf'}"))
    assert "model.aspp_rates is (2, 4), there it is ()" in error


def test_fields_of_the_head_are_set_by_name(run, tmp_path):
    """--set gives another convention; a classifier has none."""
    file = tmp_path / "m.safetensors"
    run(write(tmp_path / "m"), "--to=safetensors", f"--output={file}")
    saved = importer.load(file, fields={"model.align_corners": True}).saved
    assert saved.spec.head == dataclasses.replace(SPEC.head, align_corners=True)
    tiny_model.write(tmp_path / "classifier")
    run(tmp_path / "classifier", "--to=safetensors", f"--output={tmp_path / 'c.safetensors'}")
    with pytest.raises(UserError, match=r"model\.align_corners cannot be set"):
        importer.load(tmp_path / "c.safetensors", fields={"model.align_corners": True})


def test_a_segmentation_network_begins_with_a_classifiers_backbone(run, tmp_path):
    """A model directory and another framework's file both start it, without their last layer."""
    source = tiny_model.write(tmp_path / "m")
    run(source, "--to=mmpretrain", f"--output={tmp_path / 'torch.pth'}")
    slim = tmp_path / "slim.pb"
    slim.write_bytes(slim_graph())
    for path, padding in ((source, "torch"), (tmp_path / "torch.pth", "torch"), (slim, "same")):
        module, variables = mbv2_jax.load(path, num_classes=5, task="segmentation")
        assert module.architecture.padding == padding
        assert not module.architecture.last_convolution
        assert "last" not in variables["params"]
        theirs = model_dir.read(path).variables()
        for collection in ("params", "batch_stats"):
            for layer in ("stem", "layer1_0", "layer7_0"):
                ours = variables[collection][layer]
                expected = theirs[collection][layer]
                assert model_dir.arrays_sha256(ours) == model_dir.arrays_sha256(expected)
        assert variables["params"]["logits"]["kernel"].shape == (1, 1, 256, 5)


def slim_graph() -> bytes:
    """Returns a frozen graph of the tiny model, with a classifier, in TF-slim's names."""
    from mbv2_jax.convert.layouts import LAYOUTS

    layout, found = LAYOUTS["tf-slim"], GraphDef()
    variables = tiny_model.variables()
    positions = layout.arrays(tiny_model.SPEC.backbone) | layout.dense("classifier")
    for name, array in positions.items():
        value: Any = variables
        for key in array.path:
            value = value[key]
        back = [array.axes.index(axis) for axis in range(len(array.axes))]
        found.constant(name, np.ascontiguousarray(value.transpose(back)))
    return found.content()


def test_mmsegs_files_are_backbones(tmp_path, run):
    """Their decoders are named, and left out with --features-only; dilation has a remark."""
    source = tiny_model.write(tmp_path / "m")
    run(source, "--to=safetensors", f"--output={tmp_path / 'own.safetensors'}")
    file = tmp_path / "mmseg.safetensors"
    run(source, "--to=mmpretrain", f"--output={file}")
    tensors = load_file(file)
    # mmseg's backbone has no last convolution, and a file of its training has these beside it.
    kept = {n: a for n, a in tensors.items() if not n.startswith(("backbone.conv2.", "head."))}
    decoder = {
        "decode_head.conv_seg.weight": np.ones((19, 512, 1, 1), np.float32),
        "decode_head.conv_seg.bias": np.ones(19, np.float32),
        "decode_head.image_pool.1.conv.weight": np.ones((512, 320, 1, 1), np.float32),
        "decode_head.image_pool.1.bn.weight": np.ones(512, np.float32),
        "auxiliary_head.convs.0.conv.weight": np.ones((256, 96, 3, 3), np.float32),
    }
    save_file(kept | decoder, file)
    error = refused(run(file, f"--output={tmp_path / 'x'}"))
    assert "auxiliary_head.convs.0.conv.weight" in error
    assert "--features-only converts the backbone alone" in error
    code, out, err = run(file, "--features-only", f"--output={tmp_path / 'x'}")
    assert code == 0, err
    left_out = out.partition("left out: ")[2].partition("\n")[0].split(", ")
    assert set(left_out) == set(decoder)
    assert "mmseg's networks of output stride 8 dilate from the first block" in err
    saved = model_dir.read(tmp_path / "x")
    assert (saved.spec.backbone.output_stride, saved.spec.backbone.last_convolution) == (32, False)
    for layer in ("stem", "layer1_0", "layer7_0"):
        theirs = model_dir.read(source).params[layer]
        assert model_dir.arrays_sha256(saved.params[layer]) == model_dir.arrays_sha256(theirs)
