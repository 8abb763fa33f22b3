"""The weights in a file, as the reader of each container returns them."""

import contextlib
import dataclasses
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mbv2_jax.errors import UserError, first_line

_MISFITS = (AttributeError, IndexError, OverflowError, TypeError, struct.error)


class Dense(NamedTuple):
    """A dense layer of a head, where the file describes its layers and not only their arrays.

    Attributes:
      name: the layer's, as in the names of its arrays.
      activation: "linear", "relu", "softmax", "sigmoid", or another one's name; "" where it is not
        known.
    """

    name: str
    activation: str


@dataclasses.dataclass(frozen=True)
class Contents:
    """The weights in a file, as numpy arrays, and what else it says about them.

    Attributes:
      tensors: the chosen weights by their names in the file, in its order, without the prefixes of
        wrappers. They may be read-only views that share memory, and of any type; the matching
        checks their shapes and values.
      selection: the part of the file that they are, such as "state_dict (averaged: EMA)"; "" where
        the file holds nothing else.
      class_names: the file's own, in class order; () where it has none.
      metadata: the metadata of a safetensors file; {} elsewhere.
      guesses: the assumptions of the reader, one line each.
      stated: the values of fields that the file itself gives, by their names in a config, such as
        "data.image_size".
      head: the dense layers after the backbone, from the first to the logits; None where the file
        does not describe its layers, and arrays alone have to tell.
      obstacles: the layers that change what the network computes and that no network here has, such
        as "a BatchNormalization layer 'norm' after the pooling"; the backbone may do without them.
      rates: the dilations of the 3x3 convolutions in a head with spatial pyramid pooling, in their
        order, as they are in the file.
      folded: whether BatchNorm was folded into the convolutions, so that its arrays were made up.
      beside: other files that hold the weights, in their order.
    """

    tensors: dict[str, np.ndarray]
    selection: str = ""
    class_names: tuple[str, ...] = ()
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    guesses: tuple[str, ...] = ()
    stated: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: tuple[Dense, ...] | None = None
    obstacles: tuple[str, ...] = ()
    rates: tuple[int, ...] = ()
    folded: bool = False
    beside: tuple[pathlib.Path, ...] = ()


def unwrapped(name: str) -> str:
    """Returns the name of a tensor or a module without the parts that `strip_wrappers` removes."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def strip_wrappers(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the parts that PyTorch's wrapping modules add to the names of tensors.

    These are DistributedDataParallel, torch.compile and AveragedModel, in any nesting.

    Raises:
      UserError: two tensors of `path` have the same name without them.
    """
    stripped: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name in ("n_averaged", "steps"):  # counters of averaging modules
            continue
        short = unwrapped(name)
        if short in stripped:
            raise UserError(f"{path} has {short} twice: with and without a 'module.' prefix")
        stripped[short] = array
    return stripped


def no_averages(path: pathlib.Path) -> UserError:
    """Returns the error for --ema with a file that holds one set of weights."""
    return UserError(f"{path} holds one set of weights, none of them marked as averaged (EMA)")


@contextlib.contextmanager
def damage_named(path: pathlib.Path) -> Iterator[None]:
    """Raises any error of the body as a UserError that names a damaged file.

    The type of error depends on the damage, and on the library that meets it: ValueError, KeyError,
    struct.error, BadZipFile, ...
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged or cut off: {fault(error)}") from None


def fault(error: Exception) -> str:
    """Returns what is wrong with a file whose reading ended with an error."""
    if isinstance(error, RecursionError):
        return "its parts are nested too deeply"
    if isinstance(error, _MISFITS):  # whose messages are about the code
        return "its parts do not fit together"
    reason = " ".join(first_line(error).split())[:200]
    if isinstance(error, KeyError) and " " not in reason:  # h5py's are sentences
        return f"it lacks {reason}"
    return reason
