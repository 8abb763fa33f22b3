"""A file that does not hold weights is refused by its kind."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.support.weight_files import refusal


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("net.pth", b"\n<!DOCTYPE html>\n<html><head><title>Log in</title>", "a web page"),
        ("net.pth", b"<html>\n<head><title>404 Not Found</title></head>", "a web page"),
        (
            "net.pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:3b2d\n",
            "git lfs pull",
        ),
        ("net.pth", b"not weights\n" * 10, "a text file"),
        ("net.pth.gz", b"\x1f\x8b\x08\x00" + bytes(100), "gzip"),
        ("net.onnx", b"\x08\x07\x12\x07pytorch" + bytes(100), "an ONNX model"),
        ("saved_model.pb", b"\x08\x01\x12\x10" + bytes(100), "not a frozen graph"),
        ("model.ckpt.data-00000-of-00001", bytes(100), "a TensorFlow checkpoint"),
        ("net.pth", bytes(100), "not a weight file"),
        ("net.pth", b"", "empty"),
    ],
)
def test_other_files_say_what_they_are(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


def test_other_files_of_other_programs(tmp_path):
    path = tmp_path / "net.pth"
    Image.new("RGB", (8, 8)).save(path, "JPEG")
    assert "JPEG" in refusal(path)
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(3))
    assert "npz" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/net.pth", b"")
    assert "unpack it first" in refusal(path)
    assert "a folder" in refusal(tmp_path)
    assert "there is no file" in refusal(tmp_path / "missing.pth")
