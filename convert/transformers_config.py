"""Hugging Face transformers' config and image processor, in JSON files beside the weights."""

import json
import pathlib
from typing import Any

from mbv2_jax.errors import UserError

from .layouts import LAYOUTS

_USUAL = LAYOUTS["transformers"]
_INTERPOLATIONS = {2: "", 3: ", interpolation='bicubic'"}  # Pillow's numbers


def read(weights: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the config and the image processor beside a weight file.

    Args:
      weights: a file that save_pretrained wrote.

    Returns:
      Values of settable fields by their names in a config, and the class names in order; both are
      empty where there is no config.json.

    Raises:
      UserError: the files cannot be read, or describe another network.
    """
    config = _json(weights.with_name("config.json"))
    if config is None:
        return {}, ()
    for key, ours in (("output_stride", 32), ("hidden_act", "relu6")):
        if config.get(key, ours) != ours:
            raise UserError(
                f"{weights.with_name('config.json')}: {key} is {config[key]!r}; the network here "
                f"has {ours!r}"
            )
    size = _side(weights, config.get("image_size", _USUAL.preprocessing.image_size))
    fields = {
        "model.padding": "same" if config.get("tf_padding", True) else "torch",
        "model.bn_epsilon": config.get("layer_norm_eps", _USUAL.backbone.bn_epsilon),
        "data.image_size": size,
        "data.eval_transforms": f"resize_edge({size + 32})|center_crop(size)",
    }
    dropout = config.get("classifier_dropout_prob", 0.8)
    if dropout != 0.8:  # the default, which means 0.2: see layouts/mobilenet_v2.py
        fields["model.dropout"] = dropout
    processor = _json(weights.with_name("preprocessor_config.json"))
    if processor is not None:
        fields |= _processor(weights, processor, size)
    return fields, _names(weights, config.get("id2label") or {})


def _names(weights: pathlib.Path, labels: Any) -> tuple[str, ...]:
    """Returns the class names in the order of their numbers."""
    try:
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
    except (AttributeError, TypeError, ValueError, LookupError):
        raise UserError(
            f"{weights.with_name('config.json')}: id2label is not {{number: name}}"
        ) from None


def _processor(weights: pathlib.Path, processor: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns the fields that a MobileNetV2ImageProcessor decides: resize, crop, normalise."""
    path = weights.with_name("preprocessor_config.json")
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    faults = [f"{step} false" for step in steps if processor.get(step) is False]
    # A list, since the value may not be hashable.
    if processor.get("resample", 2) not in list(_INTERPOLATIONS):
        faults.append(f"resample {processor['resample']}")
    if faults:
        raise UserError(
            f"{path} has {', '.join(faults)}, which evaluation here does not support: move the "
            "file away, and give the right values with --set"
        )
    wanted = processor.get("size", size + 32)
    exact = isinstance(wanted, dict) and "height" in wanted
    resize = "resize" if exact else "resize_edge"
    edge, interpolation = _side(weights, wanted), _INTERPOLATIONS[processor.get("resample", 2)]
    fields: dict[str, Any] = {
        "data.image_size": _side(weights, processor.get("crop_size", size)),
        "data.eval_transforms": f"{resize}({edge}{interpolation})|center_crop(size)",
    }
    factor = processor.get("rescale_factor", 1 / 255)
    for key, field in (("image_mean", "data.mean"), ("image_std", "data.std")):
        if key in processor:
            try:
                fields[field] = tuple(value / factor for value in processor[key])
            except (TypeError, ZeroDivisionError):
                raise UserError(f"{path}: {key} and rescale_factor must be numbers") from None
    return fields


def _side(weights: pathlib.Path, size: Any) -> int:
    """Returns the side of a square given as 224, [224, 224], {"height": 224, "width": 224} ..."""
    sides = size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size]
    if not all(isinstance(side, int) for side in sides) or len(set(sides)) != 1:
        raise UserError(f"beside {weights}: the size {size} is not a square")
    return next(iter(sides))


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    """Reads a JSON object; None where there is no file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
