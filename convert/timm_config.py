"""timm's config.json beside the weights, as on the Hugging Face Hub: read, and written."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from mbv2_jax import spec as spec_lib
from mbv2_jax.errors import UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.spec import Backbone, TrainingMode

from . import beside
from . import crop as crop_lib
from .crop import Crop
from .layouts import LAYOUTS

# timm.data.resolve_data_config takes these values where a config has none.
_DEFAULTS = {
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
_LARGEST = 10_000  # pixels of a side
# Arguments of timm's network that change nothing in evaluation, or change the shapes of arrays.
_HARMLESS = ("num_classes", "in_chans", "img_size", "drop_path_rate", "drop_block_rate")


def read(weights: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads timm's config beside a weight file.

    Args:
      weights: a file that timm.models.save_for_hf wrote, or one of its repositories.

    Returns:
      Values of settable fields by their names in a config, and the class names in order; both are
      empty where there is no config.json, or one of another framework.

    Raises:
      UserError: the file cannot be read, or describes another network or evaluation.
    """
    config = beside.read(weights, "config.json")
    if config is None or "architecture" not in config:
        return {}, ()
    path = weights.with_name("config.json")
    # Older files are one object, without "pretrained_cfg" in it.
    stated = config.get("pretrained_cfg", config)
    arguments = config.get("model_args") or {}
    if not isinstance(stated, dict) or not isinstance(arguments, dict):
        raise UserError(f"{path}: pretrained_cfg and model_args must be JSON objects")
    values = _DEFAULTS | {key: stated[key] for key in _DEFAULTS if stated.get(key) is not None}
    pool = {"global_pool": config.get("global_pool", "avg")}
    faults = _evaluation_faults(values) + _network_faults(pool | arguments)
    if faults:
        raise UserError(
            f"{path} has {', '.join(faults)}, which is not supported here: move the file away, and "
            "give the right values with --set"
        )
    return _network(arguments) | _preprocessing(values), _names(path, stated | config)


def _evaluation_faults(values: Mapping[str, Any]) -> list[str]:
    """Returns the values that no evaluation here has."""
    size, share = values["input_size"], values["crop_pct"]
    possible = {
        "input_size": isinstance(size, list)
        and len(size) == 3
        and all(map(spec_lib.is_integer, size))
        and size[0] == 3
        and 0 < size[1] == size[2] <= _LARGEST,
        "interpolation": values["interpolation"] in ["bilinear", "bicubic"],
        "crop_pct": spec_lib.is_number(share) and 0.1 <= share <= 1,
        "crop_mode": values["crop_mode"] in ["center", "squash"],
        **{
            key: isinstance(values[key], list)
            and len(values[key]) == 3
            and all(map(spec_lib.is_number, values[key]))
            for key in ("mean", "std")
        },
    }
    return [f"{key} {values[key]!r}" for key, is_possible in possible.items() if not is_possible]


def _network_faults(arguments: Mapping[str, Any]) -> list[str]:
    """Returns the arguments of timm's network that make it another one than those here."""
    possible = {
        "global_pool": lambda value: value == "avg",
        "pad_type": lambda value: value in [None, "", "same"],
        "output_stride": lambda value: value == 32,
        **dict.fromkeys(("bn_eps", "bn_momentum", "drop_rate"), spec_lib.is_number),
        **dict.fromkeys(_HARMLESS, lambda value: True),
    }
    return [
        f"{name} {value!r}"
        for name, value in arguments.items()
        if name not in possible or not possible[name](value)
    ]


def _network(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that the arguments of timm's network decide."""
    fields: dict[str, Any] = {
        "model.padding": "same" if arguments.get("pad_type") == "same" else "torch",
        "model.bn_epsilon": arguments.get("bn_eps", LAYOUTS["timm"].backbone.bn_epsilon),
    }
    if "drop_rate" in arguments:
        fields["model.dropout"] = arguments["drop_rate"]
    if "bn_momentum" in arguments:  # torch's is the share of the new statistics
        fields["model.bn_momentum"] = 1 - arguments["bn_momentum"]
    return fields


def _preprocessing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the evaluation that timm.data.create_transform makes by default."""
    size = values["input_size"][1]
    crop = Crop(
        math.floor(size / values["crop_pct"]),
        values["interpolation"],
        both=values["crop_mode"] == "squash",
    )
    return {
        "data.image_size": size,
        "data.eval_transforms": crop.transforms(),
        # Rounded, since 0.456 * 255 is not quite 116.28.
        **{
            f"data.{key}": tuple(round(255 * value, 9) for value in values[key])
            for key in ("mean", "std")
        },
    }


def _names(path: pathlib.Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the class names: the descriptions of the labels, or the labels themselves."""
    labels = config.get("label_names") or config.get("labels") or []
    descriptions = config.get("label_descriptions") or {}
    try:
        if isinstance(labels, dict):
            labels = [labels[key] for key in sorted(labels, key=int)]
        return tuple(str(descriptions.get(label, label)) for label in labels)
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{path}: label_names is neither a list nor {{number: name}}, or label_descriptions is "
            "not {name: text}"
        ) from None


def write(saved: SavedModel) -> dict[str, Any]:
    """Returns the config.json with which timm opens a model by itself.

    Raises:
      UserError: the model's evaluation is not a resize and a central crop.
    """
    spec, images = saved.spec, saved.spec.preprocessing
    crop, size = crop_lib.parse(images), images.image_size
    deeper = "d" if spec.backbone.depth != 1 else ""
    # timm rounds size / crop_pct down.
    share = size / crop.edge
    if math.floor(size / share) < crop.edge:
        share = math.nextafter(share, 0)
    names = {"label_names": list(saved.classes)} if saved.classes else {}
    return {
        "architecture": f"mobilenetv2_{round(100 * spec.backbone.width):03d}{deeper}",
        "num_classes": len(saved.classes),
        "num_features": saved.params["last"]["norm"]["scale"].size,
        "global_pool": "avg",
        **names,
        "model_args": _arguments(spec.backbone, spec.mode),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": crop.interpolation,
            "crop_pct": share,
            "crop_mode": "squash" if crop.both else "center",
            "mean": [round(value / 255, 12) for value in images.mean],
            "std": [round(value / 255, 12) for value in images.std],
            "num_classes": len(saved.classes),
            "pool_size": [math.ceil(size / 32)] * 2,
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
    }


def _arguments(backbone: Backbone, mode: TrainingMode) -> dict[str, Any]:
    """Returns the arguments of timm's network that are not its defaults."""
    arguments = {
        "drop_rate": mode.dropout,
        "bn_eps": backbone.bn_epsilon,
        "bn_momentum": round(1 - mode.bn_momentum, 12),
        "pad_type": "same" if backbone.padding == "same" else "",
    }
    usual = {"drop_rate": 0.0, "bn_eps": 1e-5, "bn_momentum": 0.1, "pad_type": ""}
    return {name: value for name, value in arguments.items() if value != usual[name]}
