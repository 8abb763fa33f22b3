"""Assertions about weight files, for the tests of convert/readers."""

import contextlib
import pathlib
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mbv2_jax.convert import readers
from mbv2_jax.errors import UserError

if TYPE_CHECKING:
    import torch


def assert_is(found: dict[str, np.ndarray], expected: dict[str, "torch.Tensor"]) -> None:
    """Asserts that names and their order, types and bits are equal."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        wanted = tensor.detach().numpy()
        assert found[name].dtype == wanted.dtype, name
        np.testing.assert_array_equal(found[name], wanted, err_msg=name, strict=True)


def refusal(path: pathlib.Path, ema: bool | None = None) -> str:
    """Returns the error line for an unreadable file, after asserting that it names the file."""
    with pytest.raises(UserError) as caught:
        readers.read(path, ema=ema)
    line = str(caught.value)
    assert str(path) in line
    assert "\n" not in line
    return line


def flipped(whole: bytes, tries: int) -> Iterator[bytes]:
    """Yields copies of the bytes, each with one bit flipped at a random place."""
    chosen = random.Random(0)
    for _ in range(tries):
        content = bytearray(whole)
        content[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        yield bytes(content)


@contextlib.contextmanager
def forbidden(*modules: str) -> Iterator[None]:
    """Makes each import of some modules an ImportError in the body."""
    hidden = {name: sys.modules.pop(name, None) for name in modules}
    sys.modules.update(dict.fromkeys(modules))  # type: ignore[arg-type] # None forbids it
    try:
        yield
    finally:
        for name, module in hidden.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
