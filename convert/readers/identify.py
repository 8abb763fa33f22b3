"""The container of a weight file, recognised by the file's content."""

import os
import pathlib
import re
import zipfile

from mbv2_jax.errors import UserError

from .archive import is_tar

READABLE = (
    "PyTorch (.pth, .pt), safetensors (.safetensors), Keras (.keras, .weights.h5, .h5), "
    "TensorFlow.js (model.json) and TensorFlow (a frozen graph's .pb or .tgz, .tflite)"
)

_HDF5 = b"\x89HDF\r\n\x1a\n"
_TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled

# Files that are mistaken for weights, by their first bytes (in lower case), and the remedy.
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
# The same by suffix, for formats that have no magic number.
_SUFFIXES = {
    ".onnx": "an ONNX model: convert the weights that it was made from",
    ".pb": "not a frozen graph of TensorFlow: load the model in Keras, and save it as .keras",
    ".ckpt": "a TensorFlow checkpoint: load it in Keras, and save the model as .keras",
    ".index": "a TensorFlow checkpoint: load it in Keras, and save the model as .keras",
    ".data-00000-of-00001": "a TensorFlow checkpoint: load it in Keras, and save it as .keras",
}


def container(path: pathlib.Path) -> str:
    """Returns the container of a weight file, a key of readers' table, such as "torch".

    Raises:
      UserError: it is none of them; the message names the kind that it seems to be.
    """
    if os.path.isdir(path):
        if os.path.isfile(path / "model.json"):
            raise UserError(f"{path} is a folder; give its {path / 'model.json'}")
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
    if head[4:8] == b"TFL3":
        return "tflite"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 100_000_000:
        return "safetensors"
    if _begins_graph(head) or is_tar(path):
        return "frozen graph"
    if head.lstrip().startswith(b"{") and _has_topology(path):
        return "tfjs"
    raise UserError(f"{path} {_other_kind(path, head)}; readable are {READABLE}")


def _has_topology(path: pathlib.Path) -> bool:
    """Returns whether a JSON file has the key of a TensorFlow.js model."""
    with open(path, "rb") as file:
        return b'"modelTopology"' in file.read(4 << 20)


def _begins_graph(head: bytes) -> bool:
    """Returns whether a file begins with a node of a GraphDef, which has no magic number.

    That is a message (0a, its length), and first in it a name (0a, its length, the name), then an
    operator (12, its length, the operator).
    """
    node = re.match(rb"\n[\x80-\xff]{0,4}[\x00-\x7f]\n([\x01-\x7f])", head)
    if not node:
        return False
    operator = head[node.end() + node[1][0] :]
    return re.match(rb"\x12[\x01-\x7f]\w", operator) is not None


def _other_kind(path: pathlib.Path, head: bytes) -> str:
    """Returns a clause on the kind of a file that cannot be read, such as "is a text file"."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, kind in _OTHERS:
        if start.startswith(mark):
            return f"is {kind}"
    for suffix, kind in _SUFFIXES.items():
        if path.name.endswith(suffix):
            return f"is {kind}"
    if head.startswith(b"\x80") and b"." in head:
        return "is a pickle, but not one of torch.save"
    if not any(byte < 9 for byte in head):
        return "is a text file"
    return "is not a weight file, or is damaged"


def _zip_container(path: pathlib.Path) -> str:
    """Returns the container of a zip archive: "torch", "keras" or "tfjs"."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # The type of error depends on the damage: BadZipFile, UnicodeDecodeError, ...
    except Exception as error:
        raise UserError(
            f"{path} is damaged or cut off; it begins like a file of torch.save or Keras: {error}"
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
    if "model.json" in members:
        return "tfjs"
    if all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is a numpy archive (.npz); readable are {READABLE}")
    raise UserError(
        f"{path} is a zip archive, but not one of torch.save, Keras or TensorFlow.js: unpack it "
        f"first; readable are {READABLE}"
    )
