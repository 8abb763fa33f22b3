"""JSON files that lie beside a weight file and describe it."""

import json
import pathlib
from typing import Any

from mbv2_jax.errors import UserError, first_line

_LARGEST = 8 << 20  # bytes; a config with 20,000 class names has one million


def read(weights: pathlib.Path, name: str) -> dict[str, Any] | None:
    """Reads a JSON object beside a weight file; None where there is no such file.

    Raises:
      UserError: it cannot be read, is no JSON object, or is far too large for one.
    """
    path = weights.with_name(name)
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} is too large for a config: more than {_LARGEST:,} bytes")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
