"""The command `python -m convert`; tests/parity/ compares the converted networks."""

import hashlib
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mbv2_jax import model_dir
from mbv2_jax.data import classes
from tests.support import REPOSITORY, peers, tiny_model
from tests.support.convert_command import make_run, refused


@pytest.fixture
def run(monkeypatch, capsys):
    return make_run(monkeypatch, capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Writes torchvision's files of a narrow network with 6, 1000, 1001 and no classes."""
    folder = tmp_path_factory.mktemp("convert")
    for count in (6, 1000, 1001):
        state = network(count).state_dict()
        torch.save(state, folder / f"{count}.pth")
    torch.save(
        {name: value for name, value in state.items() if not name.startswith("classifier")},
        folder / "backbone.pth",
    )
    return folder


def network(num_classes: int) -> torch.nn.Module:
    net = peers.torchvision().models.mobilenet_v2(width_mult=0.1, num_classes=num_classes).eval()
    peers.randomize(net, seed=num_classes)
    return net


def test_the_command_runs_from_the_clone_and_as_installed(folder, tmp_path):
    for name, cwd in (("convert", REPOSITORY), ("mbv2_jax.convert", tmp_path)):
        output = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-m", name, folder / "6.pth", f"--output={output}"],
            capture_output=True,
            text=True,
            cwd=cwd,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"written: {output}"
        assert model_dir.read(output).spec.head.num_classes == 6


def test_the_summary_and_the_assumptions_are_printed(run, folder, tmp_path):
    code, out, err = run(folder / "6.pth", f"--output={tmp_path / 'm'}")
    assert code == 0
    net = network(6)
    count = sum(parameter.numel() for parameter in net.parameters())
    for piece in ("torchvision", "width 0.1, 6 classes", f"{count:,} parameters", "262 used"):
        assert piece in out
    assert hashlib.sha256((folder / "6.pth").read_bytes()).hexdigest() in out
    assert "data.image_size=224" in err
    assert "the file names no classes: they are numbered" in err
    info = json.loads((tmp_path / "m" / "model.json").read_text())
    assert info["classes"] == list("012345")
    assert (info["backbone"]["padding"], info["backbone"]["bn_epsilon"]) == ("torch", 1e-5)
    kept = {"bn_momentum": 0.9, "dropout": 0.2, "folded_norm": False, "quantize": "none"}
    assert info["training"] == kept
    assert info["origin"]["layout"] == "torchvision"


def test_fields_and_names_can_be_set(run, folder, tmp_path):
    # With a byte order mark, as Notepad writes it.
    (tmp_path / "names.txt").write_text("\n".join(tiny_model.CLASSES) + "\n", "utf-8-sig")
    code, _, err = run(
        folder / "6.pth",
        f"--output={tmp_path / 'm'}",
        f"--class-names={tmp_path / 'names.txt'}",
        "--set=data.image_size=64",
        "--set=data.eval_transforms=resize_edge(72)|center_crop(size)",
        "--set=data.mean=(1, 2, 3)",
        "--set=data.std=(4, 5, 6)",
        "--set=model.strides=(1, 1, 1, 2, 2, 1, 2, 1)",
    )
    assert (code, err) == (0, "")  # no assumption is left
    saved = model_dir.read(tmp_path / "m")
    assert saved.classes == tiny_model.CLASSES
    assert saved.spec.preprocessing.image_size == 64
    assert saved.spec.preprocessing.eval_transforms == "resize_edge(72)|center_crop(size)"
    assert saved.spec.preprocessing.mean == (1, 2, 3)
    assert saved.spec.backbone.strides == (1, 1, 1, 2, 2, 1, 2, 1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["--set=model.width=0.5"], "model.width cannot be set"),
        (["--set=data.imagesize=64"], "did you mean 'data.image_size'?"),
        (["--set=data.image_size"], "write it FIELD=VALUE"),
        (["--set=data.image_size=big"], "a whole number, 1 or more"),
        (["--set=model.padding=valid"], "known are 'torch', 'same'"),
        (["--set=model.bn_epsilon=0"], "above 0"),
        (["--set=model.dropout=2"], "0 or more, at most 1"),
        (["--set=model.strides=(2, 2)"], "8 numbers"),
        (["--set=data.std=(1, 0, 1)"], "three numbers"),
        (["--set=data.mean=(1e999, 0, 1)"], "three numbers"),
        (["--set=model.padding={1: 2}"], "known are 'torch', 'same'"),
        (["--set=model.padding={[1]: 2}"], "known are 'torch', 'same'"),
        (["--set=data.eval_transforms=center_corp(size)"], "did you mean 'center_crop'?"),
        (["--set=data.eval_transforms=random_crop(size)"], "random"),
        (["--class-names=missing.txt"], "missing.txt cannot be read"),
        (["--drop-background"], "1001"),
        (["--ema"], "6.pth"),
        (["--layout=timm"], "leave out --layout"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_impossible_settings_are_refused_and_nothing_is_written(
    run, folder, tmp_path, settings, named
):
    assert named in refused(run(folder / "6.pth", f"--output={tmp_path / 'm'}", *settings))
    assert list(tmp_path.iterdir()) == []


def test_check_prints_the_best_classes(run, folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    output = f"--output={tmp_path / 'm'}"
    missing = run(folder / "6.pth", output, "--check", tmp_path / "photo.jpg")
    assert "there is no" in refused(missing)
    code, out, _ = run(folder / "6.pth", output, "--check", tmp_path / "photo.png")
    assert code == 0
    transforms = peers.torchvision().transforms
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
    with torch.no_grad():
        logits = network(6)(transforms.Compose(steps)(Image.fromarray(pixels))[None])[0]
    best = logits.argsort(descending=True)[:5].tolist()
    rows = [line.split() for line in out.splitlines()[-5:]]
    assert [int(row[-2]) for row in rows] == best
    shares = [f"{share:.2%}" for share in torch.softmax(logits, 0)[best].tolist()]
    assert [row[-3] for row in rows] == shares


def test_a_size_set_alone_scales_the_edge(run, folder, tmp_path):
    # The edges of d-li14 and timm: int(size / 0.875).
    for size, edge in ((96, 109), (160, 182), (192, 219)):
        output = f"--output={tmp_path / str(size)}"
        assert run(folder / "6.pth", output, f"--set=data.image_size={size}")[0] == 0
        saved = model_dir.read(tmp_path / str(size))
        assert saved.spec.preprocessing.eval_transforms == f"resize_edge({edge})|center_crop(size)"


def test_too_few_names_are_not_used(run, tmp_path):
    checkpoint = {"meta": {"CLASSES": ("cat", "dog")}, "state_dict": network(1000).state_dict()}
    torch.save(checkpoint, tmp_path / "file.pth")
    code, _, err = run(tmp_path / "file.pth", f"--output={tmp_path / 'm'}")
    assert code == 0
    assert "names 2 classes and has 1000: they are numbered" in err
    assert model_dir.read(tmp_path / "m").classes[:3] == ("0", "1", "2")


def test_names_in_a_file_do_not_steer_the_terminal(run, tmp_path):
    state = network(6).state_dict() | {"\x1b[31mred\n": torch.zeros(1)}
    torch.save(state, tmp_path / "file.pth")
    assert "\\x1b[31mred" in refused(run(tmp_path / "file.pth", f"--output={tmp_path / 'm'}"))
    checkpoint = {"meta": {"CLASSES": ("cat\n", *"abcde")}, "state_dict": network(6).state_dict()}
    torch.save(checkpoint, tmp_path / "file.pth")
    assert "not printable: 'cat\\n'" in refused(run(tmp_path / "file.pth", "--output=m"))


def test_negative_variances_are_refused(run, tmp_path):
    state = network(6).state_dict()
    state["features.0.1.running_var"][3] = -1
    torch.save(state, tmp_path / "file.pth")
    message = refused(run(tmp_path / "file.pth", f"--output={tmp_path / 'm'}"))
    assert "features.0.1.running_var, a variance, is negative" in message


def test_a_background_class_is_kept_or_dropped(run, folder, tmp_path):
    assert run(folder / "1001.pth", f"--output={tmp_path / 'kept'}")[0] == 0
    code, _, err = run(folder / "1001.pth", f"--output={tmp_path / 'm'}", "--drop-background")
    assert code == 0
    assert "ImageNet's names are used" in err
    kept, dropped = model_dir.read(tmp_path / "kept"), model_dir.read(tmp_path / "m")
    assert kept.classes == ("background", *classes.IMAGENET_NAMES)
    assert dropped.classes == classes.IMAGENET_NAMES
    weight = network(1001).state_dict()["classifier.1.weight"].numpy()
    bias = network(1001).state_dict()["classifier.1.bias"].numpy()
    np.testing.assert_array_equal(kept.params["classifier"]["kernel"], weight.T)
    np.testing.assert_array_equal(dropped.params["classifier"]["kernel"], weight[1:].T)
    np.testing.assert_array_equal(dropped.params["classifier"]["bias"], bias[1:])


def test_a_backbone_cannot_be_checked(run, folder, tmp_path):
    outcome = run(folder / "backbone.pth", f"--output={tmp_path / 'm'}", f"--check={folder}")
    assert "leave out --check" in refused(outcome)
    assert not (tmp_path / "m").exists()


def test_a_backbone_alone_gives_features_only_and_says_so(run, folder, tmp_path):
    code, out, err = run(folder / "backbone.pth", f"--output={tmp_path / 'm'}")
    assert code == 0
    assert "no head" in out
    assert "features only" in err
    saved = model_dir.read(tmp_path / "m")
    assert saved.features_only
    assert saved.classes == ()
    # The export lacks the head as well.
    assert run(tmp_path / "m", "--to=torchvision", f"--output={tmp_path / 'out.pth'}")[0] == 0
    incompatible = network(6).load_state_dict(torch.load(tmp_path / "out.pth"), strict=False)
    assert incompatible.missing_keys == ["classifier.1.weight", "classifier.1.bias"]
    assert not incompatible.unexpected_keys


def test_nothing_is_overwritten_without_force(run, folder, tmp_path):
    output = tmp_path / "m"
    assert run(folder / "6.pth", f"--output={output}")[0] == 0
    before = (output / "model.json").read_bytes()
    again = (folder / "1000.pth", f"--output={output}")
    assert "--force" in refused(run(*again))
    assert (output / "model.json").read_bytes() == before
    assert run(*again, "--force")[0] == 0
    assert model_dir.read(output).spec.head.num_classes == 1000

    file = tmp_path / "out.pth"
    out = (output, "--to=torchvision", f"--output={file}")
    assert run(*out)[0] == 0
    before = file.read_bytes()
    assert "--force" in refused(run(*out))
    assert file.read_bytes() == before
    assert run(*out, "--force")[0] == 0


def test_force_replaces_only_models_and_weights(run, folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"precious")
    tiny_model.write(tmp_path / "run" / "model")
    tiny_model.write(tmp_path / "annotated")
    (tmp_path / "annotated" / "notes.txt").write_text("precious")
    (tmp_path / "dangling").symlink_to("nothing")
    photo = run(tmp_path / "annotated", "--to=torchvision", f"--output={tmp_path / 'photo.pth'}")
    assert photo[0] == 0
    (tmp_path / "photo.pth").write_bytes(b"\xff\xd8\xff a photo")
    photo = (tmp_path / "annotated", "--to=torchvision", f"--output={tmp_path / 'photo.pth'}")
    assert "this command did not write all of it" in refused(run(*photo, "--force"))
    for output in ("photos", "photos/cat.jpg", "run", "annotated", "dangling"):
        outcome = run(folder / "6.pth", f"--output={tmp_path / output}", "--force")
        assert "this command did not write all of it" in refused(outcome)
    assert (tmp_path / "annotated" / "notes.txt").read_text() == "precious"
    outcome = run(
        tmp_path / "run", "--to=timm", f"--output={tmp_path / 'photos'}.pth", "--layout=timm"
    )
    assert "--layout is for reading" in refused(outcome)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"precious"


def test_an_empty_folder_is_filled(run, folder, tmp_path):
    (tmp_path / "m").mkdir()
    assert run(folder / "6.pth", f"--output={tmp_path / 'm'}")[0] == 0
    assert model_dir.read(tmp_path / "m").spec.head.num_classes == 6


def test_a_failed_write_leaves_the_old_file(run, folder, tmp_path, monkeypatch):
    file = tmp_path / "out.pth"
    assert run(folder / "6.pth", "--to=torchvision", f"--output={file}")[0] == 0
    before = file.read_bytes()

    class FullDisk(io.FileIO):
        def write(self, content) -> int:
            super().write(content[:1000])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", lambda path, mode, **_: FullDisk(path, mode[0]))
        outcome = run(folder / "6.pth", "--to=torchvision", f"--output={file}", "--force")
    assert (outcome[0], outcome[1]) == (2, "")
    assert outcome[2].splitlines()[-1].endswith("cannot be written: No space left on device")
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]
