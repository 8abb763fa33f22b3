"""What kind of file something is, by its content; and what it is instead, if it cannot be read."""

import os
import pathlib
import zipfile

from mbv2_jax.errors import UserError

READABLE = "PyTorch (.pth, .pt), safetensors (.safetensors) and Keras (.keras, .weights.h5, .h5)"

_HDF5 = b"\x89HDF\r\n\x1a\n"
_TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled

# What is mistaken for weights, by its first bytes (in lower case), and what to do instead.
_OTHERS = (
    (b"<!doctype html", "a web page, not weights: a login or error page was saved in their place"),
    (b"<html", "a web page, not weights: a login or error page was saved in their place"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file: run `git lfs pull` in its clone",
    ),
    (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"\x89png", "an image (PNG)"),
    (b"\x1f\x8b", "compressed (gzip): unpack it first"),
    (b"bzh", "compressed (bzip2): unpack it first"),
    (b"\xfd7zxz", "compressed (xz): unpack it first"),
    (b"7z\xbc\xaf", "compressed (7z): unpack it first"),
    (b"rar!", "compressed (RAR): unpack it first"),
    (b"\x93numpy", "a numpy array without names"),
)
# The same by suffix, for formats without a mark of their own.
_SUFFIXES = {
    ".onnx": "an ONNX model: convert the weights that it was made from",
    ".pb": "a TensorFlow graph: load it in Keras, and save the model as .keras",
    ".ckpt": "a TensorFlow checkpoint: load it in Keras, and save the model as .keras",
    ".index": "a TensorFlow checkpoint: load it in Keras, and save the model as .keras",
    ".data-00000-of-00001": "a TensorFlow checkpoint: load it in Keras, and save it as .keras",
    ".tflite": "a TFLite model: convert the weights that it was made from",
}


def identify(path: pathlib.Path) -> str:
    """Returns "torch", "safetensors" or "keras".

    Raises:
      UserError: it is none of them; the message says what it seems to be.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the file of weights in it")
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty")
    if head.startswith(b"PK\x03\x04"):
        return _zip_container(path)
    if head.startswith(_HDF5):
        return "keras"
    if _TORCH_LEGACY in head[:32]:
        return "torch"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 100_000_000:
        return "safetensors"
    raise UserError(f"{path} {_what(path, head)}; readable are {READABLE}")


def _what(path: pathlib.Path, head: bytes) -> str:
    """Says what a file is that cannot be read."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, what in _OTHERS:
        if start.startswith(mark):
            return f"is {what}"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    if head[4:8] == b"TFL3":
        return f"is {_SUFFIXES['.tflite']}"
    for suffix, what in _SUFFIXES.items():
        if path.name.endswith(suffix):
            return f"is {what}"
    if head.startswith(b"\x80") and b"." in head:
        return "is a pickle, but not one of torch.save"
    if not any(byte < 9 for byte in head):
        return "is a text file"
    return "is not a file of weights, or a damaged one"


def _zip_container(path: pathlib.Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # By where the damage is: BadZipFile, UnicodeDecodeError, ... A file that was cut has no end.
    except Exception as error:
        raise UserError(
            f"{path} is damaged or cut off; it begins as a file of torch.save or Keras: {error}"
        ) from None
    members = {name.rpartition("/")[2] for name in names}
    if {"config.json", "model.weights.h5"} <= set(names):
        return "keras"
    if "constants.pkl" in members:
        raise UserError(
            f"{path} is a TorchScript archive, which holds code; in Python run"
            f" torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth'), and convert"
            " that file"
        )
    if "data.pkl" in members:
        return "torch"
    if all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is a numpy archive (.npz); readable are {READABLE}")
    raise UserError(
        f"{path} is a zip archive, and none of torch.save or Keras: unpack it first; readable are"
        f" {READABLE}"
    )
