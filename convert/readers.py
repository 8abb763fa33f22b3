"""A file of another framework -> named numpy arrays. Nothing in a file is executed."""

import dataclasses
import hashlib
import pathlib

import numpy as np

from mbv2_jax.errors import UserError

from . import torch_files

READABLE = "PyTorch (.pth, .pt), safetensors (.safetensors) and Keras (.keras, .weights.h5, .h5)"


@dataclasses.dataclass(frozen=True)
class ForeignFile:
    """The weights in a file, as numpy arrays.

    Attributes:
      path: the file.
      sha256: of the whole file, hex.
      container: "torch", "safetensors" or "keras".
      tensors: the chosen weights by the names that their layout gives them ("features.0.0.weight",
        "Conv1/kernel"), without wrapper and without `module.`; float16 and bfloat16 as float32,
        other types as they are; every number finite.
      weights: which of several sets of weights they are, e.g. "state_dict (averaged: EMA)".
      class_names: the file's own, in class order; () where it has none.
      metadata: what a safetensors file says of itself; {} elsewhere.
      guesses: what reading had to assume, a line each.
    """

    path: pathlib.Path
    sha256: str
    container: str
    tensors: dict[str, np.ndarray]
    weights: str = ""
    class_names: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    guesses: tuple[str, ...] = ()


def read(path: str | pathlib.Path, *, ema: bool | None = None) -> ForeignFile:
    """Reads the weights in a file; what kind of file it is, its content tells.

    Args:
      path: a file of torch.save (either serialisation).
      ema: where a file holds averaged weights beside the raw ones: True = the averaged ones, False
        = the raw ones, None = those that the program which wrote it would load for use.

    Returns:
      The weights.

    Raises:
      UserError: the file is missing, damaged, of another kind, would run code, or holds no weights
        of the kind asked for.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    checkpoint = torch_files.load(path)
    weights, chosen = torch_files.choose(path, checkpoint, ema)
    tensors = _bare_names(path, torch_files.arrays(path, chosen))
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ForeignFile(path, sha256, "torch", tensors, weights, torch_files.class_names(checkpoint))


def _bare_names(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes off what DistributedDataParallel, torch.compile and averaging put on."""
    bare: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name in ("n_averaged", "steps"):
            continue
        parts = [part for part in name.split(".") if part not in ("module", "_orig_mod")]
        short = ".".join(parts)
        if short in bare:
            raise UserError(f"{path} has {short} twice: with and without a 'module.' prefix")
        bare[short] = array
    return bare
