"""The command: what it prints, and the one line that each mistake gets."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from mbv2_jax import model_dir
from mbv2_jax.model_json import Description
from tests.support import REPOSITORY, commands, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a model, one without a head, three photos, and a file that is no photo."""
    folder = tmp_path_factory.mktemp("export")
    tiny_model.write(folder / "model")
    (folder / "photos").mkdir()
    for seed in range(3):
        tiny_model.photo(seed).save(folder / "photos" / f"{seed}.png")
    (folder / "text.png").write_text("no photo")
    return folder


def export(cache: pathlib.Path, folder: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
    return commands.run(cache, *arguments, module="mbv2_jax.export", cwd=folder)


def test_a_report_says_what_the_caller_has_to_do(folder, cache):
    status, out, err = export(
        cache, folder, "model", "--to=stablehlo", "--output=m.stablehlo", "--check", "photos"
    )
    assert status == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line[0] != "b")
    assert lines["input"] == "uint8 RGB of 32x32; 0-255, normalised inside"
    assert "before it    resize_edge(36)|center_crop(size)" in out
    assert lines["agreement"] == "100.00% of classes"
    assert "on 3 images" in out and (folder / "m.stablehlo").is_file()

    status, out, err = export(
        cache,
        folder,
        "model",
        "--to=stablehlo",
        "--output=m.stablehlo",
        "--size=48,40",
        "--force",
        "--json",
        "--batch=2",
        "--input=float32",
    )
    assert status == 0, err
    report = json.loads(out)
    assert report["metadata"]["image_size"] == [48, 40]
    assert report["metadata"]["eval_transforms"] == "resize((48, 40))"
    assert report["difference"]["logits"] < 1e-4 and report["agreement"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to=onxx"], "--to=onxx: did you mean 'onnx'?"),
        (["--precision=int8"], "--to=stablehlo has no --precision=int8: give float32"),
        (["--nms"], "--nms has no meaning for --to=stablehlo"),
        (["--keep-float=stem"], "--keep-float has no meaning for --to=stablehlo"),
        (["--size=0,5"], "--size=0,5: give height and width in pixels, such as 192,256"),
        (["--batch=none"], "--batch=none: give a number of images, or dynamic"),
        (["--check", "text.png"], "text.png"),
        (["--check", "nowhere"], "nowhere"),
        (["--output=nowhere/m.bin"], "nowhere is no folder: create it, or name another --output"),
        (["--output=text.png"], "text.png exists: name another file, or give --force"),
    ],
)
def test_every_mistake_is_one_line_and_leaves_nothing(arguments, says, folder, cache):
    before = sorted(folder.rglob("*"))
    status, out, err = export(
        cache, folder, "model", "--to=stablehlo", "--output=m.bin", *arguments
    )
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and says in line
    assert sorted(folder.rglob("*")) == before


def test_a_backbone_alone_is_refused(folder, cache):
    spec = dataclasses.replace(tiny_model.SPEC, head=None)
    arrays = tiny_model.variables()
    del arrays["params"]["classifier"]
    model_dir.write(
        folder / "features", **arrays, description=Description(spec, (), {"kind": "test"})
    )
    status, _, err = export(cache, folder, "features", "--to=stablehlo", "--output=f.bin")
    assert status == 2 and err.startswith("error: features has no head, only features"), err
    assert not (folder / "f.bin").exists()


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    """A limit on the size of files stands for the disk."""
    command = [sys.executable, "-m", "mbv2_jax.export", str(folder / "model"), "--to=stablehlo"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *command, f"--output={tmp_path / 'm.bin'}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert f"failed: {tmp_path / 'm.bin'} cannot be written: File too large" in done.stderr
    assert not list(tmp_path.iterdir())
