"""The description of a model in a .safetensors file of this package."""

import json

from mbv2_jax import model_json
from mbv2_jax.errors import UserError
from mbv2_jax.model_json import Description

from .readers import ForeignFile

KEY = "model.json"  # in the file's metadata


def description(file: ForeignFile) -> Description | None:
    """Returns the description of the model in a file; None in a file of another program.

    Raises:
      UserError: it is damaged.
    """
    text = file.contents.metadata.get(KEY)
    if text is None:
        return None
    try:
        return model_json.parse(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.path}: {KEY} in its metadata is not JSON: {error}") from None
    except UserError as error:
        raise UserError(f"{file.path}: {KEY} in its metadata {error}") from None
