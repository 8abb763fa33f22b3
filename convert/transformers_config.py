"""Hugging Face transformers' config and image processor beside the weights: read, and written."""

import pathlib
from collections.abc import Sequence
from typing import Any

from mbv2_jax.data.sample import IGNORED
from mbv2_jax.errors import UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.spec import Preprocessing

from . import beside
from . import crop as crop_lib
from .crop import Crop
from .layouts import LAYOUTS, Layout

_USUAL = LAYOUTS["transformers"]
_SEGMENTATION = "segmentation"
# What an image processor does, unless it says otherwise.
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read(weights: pathlib.Path, layout: Layout = _USUAL) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the config and the image processor beside a weight file.

    A processor that crops the centre is read as one that shows whole pictures where each pixel has
    a class; `notes` says so.

    Args:
      weights: a file that save_pretrained wrote.
      layout: transformers', for the task of the network.

    Returns:
      Values of settable fields by their names in a config, and the class names in order; both are
      empty where there is no config.json.

    Raises:
      UserError: the files cannot be read, or describe another network.
    """
    config = beside.read(weights, "config.json")
    if config is None:
        return {}, ()
    for key, ours in (("output_stride", (32, 16, 8)), ("hidden_act", ("relu6",))):
        if config.get(key, ours[0]) not in ours:
            raise UserError(
                f"{weights.with_name('config.json')}: {key} is {config[key]!r}; the network here "
                f"has {' or '.join(map(repr, ours))}"
            )
    size = _side(weights, config.get("image_size", _USUAL.preprocessing.image_size))
    fields = {
        "model.padding": "same" if config.get("tf_padding", True) else "torch",
        "model.bn_epsilon": config.get("layer_norm_eps", _USUAL.backbone.bn_epsilon),
        "model.output_stride": config.get("output_stride", 32),
        "data.image_size": size,
        "data.eval_transforms": Crop(size + 32).transforms(),
    }
    dropout = config.get("classifier_dropout_prob", 0.8)
    if dropout != 0.8:  # the default, which means 0.2: see layouts/mobilenet_v2.py
        fields["model.dropout"] = dropout
    processor = beside.read(weights, "preprocessor_config.json")
    segments = layout.task == _SEGMENTATION
    if processor is not None:
        # Pictures may keep their size there, if each pixel has a class.
        steps = _STEPS[2:] if segments else _STEPS
        fields |= _processor(weights, processor, size, steps)
    if segments:
        fields["data.eval_transforms"] = layout.preprocessing.eval_transforms
    return fields, _names(weights, config.get("id2label") or {})


def notes(weights: pathlib.Path, layout: Layout) -> tuple[str, ...]:
    """Returns a line for each statement of the files beside the weights that is not followed.

    Args:
      weights, layout: as `read` takes them.
    """
    config = beside.read(weights, "config.json")
    if config is None or layout.task != _SEGMENTATION:
        return ()
    found = []
    index = config.get("semantic_loss_ignore_index", IGNORED)
    if index != IGNORED:
        found.append(
            f"config.json: pixels of the label {index!r} do not count there; here those of "
            f"{IGNORED} do not"
        )
    processor = beside.read(weights, "preprocessor_config.json") or {}
    if processor and processor.get("do_center_crop", True):
        found.append(
            "preprocessor_config.json cuts out the centre of a picture; here whole pictures are "
            f"shown, by {layout.preprocessing.eval_transforms}, so that every pixel has a class"
        )
    return tuple(found)


def _names(weights: pathlib.Path, labels: Any) -> tuple[str, ...]:
    """Returns the class names in the order of their numbers."""
    try:
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
    except (AttributeError, TypeError, ValueError, LookupError):
        raise UserError(
            f"{weights.with_name('config.json')}: id2label is not {{number: name}}"
        ) from None


def _processor(
    weights: pathlib.Path, processor: dict[str, Any], size: int, steps: Sequence[str]
) -> dict[str, Any]:
    """Returns the fields that a MobileNetV2ImageProcessor decides: resize, crop, normalise.

    Args:
      weights, processor: the file of weights, and the contents of that beside it.
      size: of the images, where the processor does not say.
      steps: those of `_STEPS` that it has to have.
    """
    path = weights.with_name("preprocessor_config.json")
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
    crop = Crop(
        _side(weights, wanted),
        _INTERPOLATIONS[processor.get("resample", 2)],
        both=isinstance(wanted, dict) and "height" in wanted,
    )
    fields: dict[str, Any] = {
        "data.image_size": _side(weights, processor.get("crop_size", size)),
        "data.eval_transforms": crop.transforms(),
    }
    factor = processor.get("rescale_factor", 1 / 255)
    for key, field in (("image_mean", "data.mean"), ("image_std", "data.std")):
        if key in processor:
            try:
                # Rounded, since 0.456 * 255 is not quite 116.28.
                fields[field] = tuple(round(value / factor, 9) for value in processor[key])
            except (TypeError, ArithmeticError):
                raise UserError(f"{path}: {key} and rescale_factor must be numbers") from None
    return fields


def _side(weights: pathlib.Path, size: Any) -> int:
    """Returns the side of a square given as 224, [224, 224], {"height": 224, "width": 224} ..."""
    known = isinstance(size, dict) and set(size) in ({"height", "width"}, {"shortest_edge"})
    sides = size.values() if known else size if isinstance(size, list) else [size]
    if not all(isinstance(side, int) for side in sides) or len(set(sides)) != 1:
        raise UserError(f"beside {weights}: the size {size} is not a square")
    return next(iter(sides))


def write(saved: SavedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the files with which transformers opens a model by itself.

    Returns:
      config.json and preprocessor_config.json.

    Raises:
      UserError: the model is a classifier whose evaluation is not a resize and a central crop.
    """
    backbone = saved.spec.backbone
    names = {
        "id2label": {str(i): name for i, name in enumerate(saved.classes)},
        "label2id": {name: i for i, name in enumerate(saved.classes)},
    }
    config = {
        "architectures": [class_name(saved)],
        "model_type": "mobilenet_v2",
        "classifier_dropout_prob": saved.spec.mode.dropout,
        "depth_divisible_by": backbone.divisor,
        "depth_multiplier": backbone.width,
        "expand_ratio": 6.0,
        "finegrained_output": True,
        "first_layer_is_expansion": True,
        "hidden_act": "relu6",
        "image_size": saved.spec.preprocessing.image_size,
        "layer_norm_eps": backbone.bn_epsilon,
        "min_depth": backbone.divisor,
        "num_channels": 3,
        "output_stride": backbone.output_stride,
        "tf_padding": backbone.padding == "same",
        "torch_dtype": "float32",
        **({"semantic_loss_ignore_index": IGNORED} if saved.spec.task == _SEGMENTATION else {}),
        **(names if saved.classes else {}),
    }
    return config, _processor_config(saved)


def class_name(saved: SavedModel, family: str = "MobileNetV2") -> str:
    """Returns the name of the class there that opens a model, or with "Auto" any network's."""
    kinds = {"classification": "ForImageClassification", _SEGMENTATION: "ForSemanticSegmentation"}
    kind = "" if saved.features_only else kinds[saved.spec.task]
    return family + ("Model" if family == "Auto" or not kind else "") + kind


def _processor_config(saved: SavedModel) -> dict[str, Any]:
    """Returns the preprocessor_config.json of a model."""
    images = saved.spec.preprocessing
    # It cannot pad pictures: those to be segmented keep their size.
    steps = _keeping_size() if saved.spec.task == _SEGMENTATION else _cropping(images)
    return {
        "image_processor_type": "MobileNetV2ImageProcessor",
        **steps,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value / 255, 12) for value in images.mean],
        "image_std": [round(value / 255, 12) for value in images.std],
    }


def _keeping_size() -> dict[str, Any]:
    return {"do_resize": False, "do_center_crop": False}


def _cropping(images: Preprocessing) -> dict[str, Any]:
    """Returns the resize and the crop of a preprocessing."""
    crop = crop_lib.parse(images)
    numbers = {name: number for number, name in _INTERPOLATIONS.items()}
    sides = {"height": crop.edge, "width": crop.edge}
    return {
        "do_resize": True,
        "size": sides if crop.both else {"shortest_edge": crop.edge},
        "resample": numbers[crop.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": images.image_size, "width": images.image_size},
    }
