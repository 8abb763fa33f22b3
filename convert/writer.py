"""A model of ours -> a weight file of another framework."""

import io
import json
import os
import pathlib
from typing import Any

import numpy as np

from mbv2_jax.errors import UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.storage import atomic

from .layouts import LAYOUTS, TARGETS, TORCH, Layout

# Fields that change the logits, and that none of the other frameworks keeps in its files.
_FIXED = ("model.padding", "model.bn_epsilon", "model.strides")


def check_output(to: str, output: pathlib.Path) -> None:
    """Raises UserError unless `output` has a suffix by which `to`'s users load it."""
    suffixes = (".safetensors",) if to == "safetensors" else (".pth", ".pt", ".bin", ".safetensors")
    if output.suffix not in suffixes:
        raise UserError(f"--output={output}: for --to={to} give FILE{' or FILE'.join(suffixes)}")


def write(saved: SavedModel, to: str, output: pathlib.Path) -> dict[str, str]:
    """Writes a file that `to` loads, and that gives the same logits there.

    Args:
      saved: the model.
      to: a key of TARGETS.
      output: .pth (torch.save), or .safetensors, which also carries model.json; replaced if there.

    Returns:
      What a person should know of it, by its name.

    Raises:
      UserError: the model has conventions that `to` does not know, or the file cannot be written.
    """
    check_output(to, output)
    layout = LAYOUTS[TARGETS[to]]
    if to != "safetensors":
        _check_conventions(saved, to, layout)
    tensors = _tensors(saved, layout)
    encode = _safetensors if output.suffix == ".safetensors" else _torch_file
    content = encode(tensors, saved, to)
    output = pathlib.Path(os.path.realpath(output))  # of a link, the file it points to
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(output, content)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from None
    return _summary(saved, to, layout, output, len(tensors))


def _check_conventions(saved: SavedModel, to: str, layout: Layout) -> None:
    usual = {"model.strides": tuple(MobileNetV2.strides), **layout.conventions}
    faults = [
        f"{name} is {saved.field(name)}, there it is {usual[name]}"
        for name in _FIXED
        if saved.field(name) != usual[name]
    ]
    width = saved.field("model.width")
    if not layout.has_width(width):
        faults.append(f"it has no network of width {width} with these channels")
    if faults:
        raise UserError(
            f"{saved.path} would not be the same in {to}: {'; '.join(faults)}. "
            "--to=safetensors keeps everything"
        )


def _tensors(saved: SavedModel, layout: Layout) -> dict[str, np.ndarray]:
    tree: dict[str, Any] = {"params": saved.params, "batch_stats": saved.batch_stats}
    tensors = {}
    for name, array in layout.arrays().items():
        if "classifier" in array.path and saved.features_only:
            continue
        value: Any = tree
        for key in array.path:
            value = value[key]
        back = tuple(array.axes.index(axis) for axis in range(len(array.axes)))
        tensors[name] = np.ascontiguousarray(value.transpose(back))
        if layout.framework is TORCH and name.endswith(".running_var"):
            # Loading strictly asks for it. torch counts on from here if it trains.
            counter = name.removesuffix("running_var") + "num_batches_tracked"
            tensors[counter] = np.zeros((), np.int64)
    return tensors


def _safetensors(tensors: dict[str, np.ndarray], saved: SavedModel, to: str) -> bytes:
    try:
        from safetensors.numpy import save
    except ImportError:
        raise _missing("safetensors") from None
    # "format" is what Hugging Face's loaders look for.
    metadata = {"format": "flax" if to == "safetensors" else "pt"}
    return save(tensors, metadata | {"model.json": json.dumps(saved.info)})


def _torch_file(tensors: dict[str, np.ndarray], saved: SavedModel, to: str) -> bytes:
    try:
        import torch
    except ImportError:
        raise _missing("torch") from None
    checkpoint: dict[str, Any] = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if to == "mmpretrain":
        meta = {"dataset_meta": {"classes": list(saved.class_names)}} if saved.class_names else {}
        checkpoint = {"meta": meta, "state_dict": checkpoint}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def _missing(package: str) -> UserError:
    return UserError(f"writing this file needs {package}: pip install 'mbv2_jax[convert]'")


def _summary(
    saved: SavedModel, to: str, layout: Layout, output: pathlib.Path, count: int
) -> dict[str, str]:
    width, classes = saved.field("model.width"), len(saved.class_names)
    last = saved.params["last"]["norm"]["scale"].size
    if to == "safetensors":
        loading = f"mbv2_jax.init_model({str(output)!r})"
    elif saved.features_only:
        loading = "load_state_dict(..., strict=False): there is no classifier in it"
    else:
        network = layout.network.format(
            width=width, percent=round(100 * width), classes=classes, last=last
        )
        read = "safetensors.torch.load_file" if output.suffix == ".safetensors" else "torch.load"
        state = f"{read}({str(output)!r})"
        if to == "mmpretrain" and output.suffix != ".safetensors":
            state += "['state_dict']"
        loading = f"model = {network}; model.load_state_dict({state}); model.eval()"
    mean, std = saved.field("data.mean"), saved.field("data.std")
    head = f"{classes} classes" if classes else "no classifier"
    lines = {
        "written": f"{output}: {count} arrays, width {width}, {head}",
        "layout": layout.owner,
        "load it with": loading,
        "give it": f"RGB images after {saved.field('data.eval_transforms')} with "
        f"size={saved.field('data.image_size')}, then (pixel - {mean}) / {std}",
    }
    if classes and output.suffix != ".safetensors" and to != "mmpretrain":
        lines["class names"] = f"not in this file; {saved.path} has them"
    return lines
