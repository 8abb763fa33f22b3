"""Folders as on the Hugging Face Hub, which timm and transformers open by themselves.

FOLDER/model.safetensors            the weights, with model.json in their metadata
FOLDER/config.json                  the network and its classes; for timm also the evaluation
FOLDER/preprocessor_config.json     the evaluation, for transformers
"""

import json
import pathlib
from typing import TYPE_CHECKING

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.storage import atomic

if TYPE_CHECKING:
    from mbv2_jax.model_dir import SavedModel

# The frameworks with such folders, and the files in them.
TARGETS = {
    "timm": {"model.safetensors", "config.json"},
    "transformers": {"model.safetensors", "config.json", "preprocessor_config.json"},
}
# Fields that config.json holds, and that may therefore differ from the framework's defaults.
KEPT = {
    "timm": ("model.padding", "model.bn_epsilon"),
    "transformers": ("model.padding", "model.bn_epsilon", "model.output_stride", "model.divisor"),
}

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is used


def has_weights(path: pathlib.Path) -> bool:
    """Returns whether a folder holds weights for timm or transformers, and is no model of ours."""
    ours = any((path / name).exists() for name in ("model.json", "model", "checkpoints"))
    return not ours and any((path / name).is_file() for name in WEIGHTS)


def is_own(path: pathlib.Path) -> bool:
    """Returns whether a path is a folder that `write` wrote, and holds nothing else."""
    try:
        if {child.name for child in path.iterdir()} not in TARGETS.values():
            return False
        with open(path / "model.safetensors", "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return "model.json" in json.loads(file.read(min(length, 64 << 20)))["__metadata__"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def write(path: pathlib.Path, saved: "SavedModel", to: str, weights: bytes) -> None:
    """Writes a folder whole or not at all; replaces one that is there.

    Args:
      path: the folder.
      saved: the model.
      to: a key of TARGETS.
      weights: the content of a safetensors file with the names of `to`.

    Raises:
      UserError: the model's evaluation cannot be written there, or the folder cannot.
    """
    from . import timm_config, transformers_config  # here: they import jax, which takes seconds

    if to == "timm":
        configs = {"config.json": timm_config.write(saved)}
    else:
        config, processor = transformers_config.write(saved)
        configs = {"preprocessor_config.json": processor, "config.json": config}
    try:
        with atomic.replace_folder(path, mark="config.json") as folder:
            atomic.check_space(folder, len(weights))
            (folder / "model.safetensors").write_bytes(weights)
            for name, content in configs.items():
                atomic.write_json(folder / name, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {first_line(error)}") from None


def loading(saved: "SavedModel", to: str, path: pathlib.Path) -> str:
    """Returns the Python expression with which `to` opens a folder."""
    if to == "timm":
        return f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"
    from . import transformers_config  # here: it imports jax, which takes seconds

    kind = transformers_config.class_name(saved, "Auto")
    return f"transformers.{kind}.from_pretrained({str(path)!r})"
