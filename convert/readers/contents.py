"""The weights in a file, as the reader of each container returns them."""

import dataclasses
import pathlib

import numpy as np

from mbv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Contents:
    """The weights in a file, as numpy arrays.

    Attributes:
      tensors: the chosen weights by their names in the file, without the prefixes of wrappers.
      selection: the part of the file that they are, such as "state_dict (averaged: EMA)"; "" where
        the file holds nothing else.
      class_names: the file's own, in class order; () where it has none.
      metadata: the metadata of a safetensors file; {} elsewhere.
      guesses: the assumptions of the reader, one line each.
    """

    tensors: dict[str, np.ndarray]
    selection: str = ""
    class_names: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    guesses: tuple[str, ...] = ()


def strip_wrappers(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the prefixes that PyTorch's wrapping modules add to the names of tensors.

    These are DistributedDataParallel, torch.compile and AveragedModel, in any nesting.

    Raises:
      UserError: two tensors of `path` have the same name without prefixes.
    """
    stripped: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name in ("n_averaged", "steps"):  # counters of averaging modules
            continue
        parts = [part for part in name.split(".") if part not in ("module", "_orig_mod")]
        short = ".".join(parts)
        if short in stripped:
            raise UserError(f"{path} has {short} twice: with and without a 'module.' prefix")
        stripped[short] = array
    return stripped


def no_averages(path: pathlib.Path) -> UserError:
    """Returns the error for --ema with a file that holds one set of weights."""
    return UserError(f"{path} holds one set of weights, none of them marked as averaged (EMA)")
