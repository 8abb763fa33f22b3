"""The export of a model to another framework: a weight file, or a folder that opens by itself."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbv2_jax import spec as spec_lib
from mbv2_jax.errors import UserError, first_line, listed
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.spec import Backbone
from mbv2_jax.storage import atomic

from . import arrays as arrays_lib
from . import heads, hub_folder, mmdet_config, torch_file
from .layouts import OF_TASK, TARGETS, TORCH, Array, Layout

_FILES = (".pth", ".pt", ".bin", ".safetensors")
_WITH_META = ("mmpretrain", "mmdet")  # whose .pth has a state_dict, and class names beside it
_OTHERS = (".ckpt", ".h5", ".keras", ".npz", ".onnx", ".tflite")  # of files that nobody here writes


def check_output(to: str, output: pathlib.Path) -> None:
    """Raises UserError unless `output` is the name of a file or folder that `to` loads."""
    if is_folder(to, output):
        return
    suffixes = (".safetensors",) if to == "safetensors" else _FILES
    if output.suffix not in suffixes:
        or_folder = ", or a FOLDER" if to in hub_folder.TARGETS else ""
        files = " or FILE".join(suffixes)
        raise UserError(f"--output={output}: for --to={to} give FILE{files}{or_folder}")


def is_folder(to: str, output: pathlib.Path) -> bool:
    """Returns whether `output` is the name of a folder, and not of a file, that `to` opens."""
    return to in hub_folder.TARGETS and output.suffix not in (*_FILES, *_OTHERS)


def write(saved: SavedModel, to: str, output: pathlib.Path) -> dict[str, str]:
    """Writes a file or a folder that `to` loads, and that gives the same logits there.

    Args:
      saved: the model.
      to: a key of TARGETS.
      output: .pth (torch.save), or .safetensors, which also carries model.json; for
        hub_folder.TARGETS also a folder, with a .safetensors file and its config. What exists there
        is replaced.

    Returns:
      The facts about the output that a person should know, by name.

    Raises:
      UserError: the model is for another task or has conventions that `to` does not have, or the
        file cannot be written.
    """
    check_output(to, output)
    layout = _layout(saved, to)
    folder = is_folder(to, output)
    if to != "safetensors":
        _check_conventions(saved, to, layout, hub_folder.KEPT[to] if folder else ())
    tensors = _tensors(saved, layout)
    if folder:
        hub_folder.write(output, saved, to, _to_safetensors(tensors, saved, to))
        return _summary(saved, to, layout, output, len(tensors))
    output = pathlib.Path(os.path.realpath(output))  # the target of a link
    encode = _to_safetensors if output.suffix == ".safetensors" else _to_pytorch
    _write_file(output, encode(tensors, saved, to))
    return _summary(saved, to, layout, output, len(tensors))


def _layout(saved: SavedModel, to: str) -> Layout:
    """Returns the layout of a model's network in `to`.

    Raises:
      UserError: `to` has no network for the task.
    """
    layouts = OF_TASK.get(saved.spec.task, {})
    if TARGETS[to] in layouts:
        return layouts[TARGETS[to]]
    possible = [f"--to={name}" for name, layout in TARGETS.items() if layout in layouts]
    remedy = f"; it has {' and '.join(possible)}" if possible else ""
    raise UserError(
        f"{saved.path} is a model for {saved.spec.task}, which --to={to} does not write{remedy}"
    )


def _write_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all; replaces one that is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {first_line(error)}") from None


def _check_conventions(saved: SavedModel, to: str, layout: Layout, kept: Sequence[str]) -> None:
    """Raises UserError if the model would compute something else in `to`.

    The other frameworks' files do not hold the fields of a backbone, except those in `kept`.
    """
    backbone = saved.spec.backbone
    sizes = {name: getattr(backbone, name) for name in ("width", "depth", "fixed_ends")}
    ours = spec_lib.named("model", backbone)
    theirs = spec_lib.named("model", dataclasses.replace(layout.backbone, **sizes))
    faults = [
        f"{name} is {value}, there it is {theirs[name]}"
        for name, value in ours.items()
        if value != theirs[name] and name not in kept
    ]
    faults += heads.of(saved.spec.task).misfits(layout, saved.spec.head)
    if not layout.has_network(backbone):
        depth = f" and depth {backbone.depth}" if backbone.depth != 1 else ""
        faults.append(f"it has no network of width {backbone.width}{depth} with these channels")
    if faults:
        raise UserError(
            f"{saved.path} would not be the same in {to}: {'; '.join(faults)}. "
            "--to=safetensors keeps everything"
        )


def _tensors(saved: SavedModel, layout: Layout) -> dict[str, np.ndarray]:
    """Returns the arrays of a model with a layout's names and axes.

    Raises:
      UserError: the model has no layers after the last map that a head reads.
    """
    backbone, head = saved.spec.backbone, saved.spec.head
    if "last" not in saved.params:
        backbone = dataclasses.replace(backbone, last_convolution=False)
    wanted = {array.path[1] for array in layout.arrays(backbone).values()}
    if lacking := sorted(wanted - saved.params.keys()):
        raise UserError(
            f"{saved.path} has no {listed(lacking, 3, ', ')}, which its heads do not read; every "
            "file written here has them"
        )
    variables = saved.variables()
    arrays = layout.arrays(backbone) | heads.of(saved.spec.task).arrays(layout, head)
    if layout.unused:
        arrays, variables = _with_unused(arrays, variables, layout, backbone)
    tensors = {}
    for name, array in arrays.items():
        value: Any = variables
        for key in array.path:
            value = value[key]
        back = tuple(array.axes.index(axis) for axis in range(len(array.axes)))
        tensors[name] = np.ascontiguousarray(value.transpose(back))
        if layout.framework is TORCH and name.endswith(".running_var"):
            # load_state_dict(strict=True) needs it; torch continues the count in training.
            counter = name.removesuffix("running_var") + "num_batches_tracked"
            tensors[counter] = np.zeros((), np.int64)
    return tensors


def _with_unused(
    arrays: Mapping[str, Array], variables: dict[str, Any], layout: Layout, backbone: Backbone
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Adds the backbone's layers that the network there has and does not use, with zeros."""
    whole = dataclasses.replace(backbone, last_convolution=True)
    shapes = arrays_lib.shapes("classification", whole)
    variables = {collection: dict(layers) for collection, layers in variables.items()}
    added = {
        name: array
        for name, array in layout.arrays(whole).items()
        if array.path[1] in layout.unused
    }
    for array in added.values():
        branch = variables
        *parents, last = array.path
        for key in parents:
            branch = branch.setdefault(key, {})
        # A variance of 0 would be none of a trained network.
        branch[last] = np.full(shapes[array.path], float(last in ("scale", "var")), np.float32)
    return {**arrays, **added}, variables


def _to_safetensors(tensors: dict[str, np.ndarray], saved: SavedModel, to: str) -> bytes:
    from safetensors.numpy import save

    # Hugging Face's loaders look for "format".
    metadata = {"format": "flax" if to == "safetensors" else "pt"}
    return save(tensors, metadata | {"model.json": json.dumps(saved.description.to_json())})


def _to_pytorch(tensors: dict[str, np.ndarray], saved: SavedModel, to: str) -> bytes:
    if to not in _WITH_META:
        return torch_file.encode(tensors)
    meta = {"dataset_meta": {"classes": list(saved.classes)}} if saved.classes else {}
    return torch_file.encode({"meta": meta, "state_dict": tensors})


def _summary(
    saved: SavedModel, to: str, layout: Layout, output: pathlib.Path, count: int
) -> dict[str, str]:
    images = saved.spec.preprocessing
    spec_head = saved.spec.head
    head = "no head" if spec_head is None else heads.of(saved.spec.task).summarize(spec_head)
    lines = {
        "written": f"{output}: {count} arrays, width {saved.spec.backbone.width}, {head}",
        "layout": layout.owner,
        "load it with": _loading(saved, to, layout, output),
        "give it": f"RGB images after {images.eval_transforms} with size={images.image_size}, "
        f"then (pixel - {images.mean}) / {images.std}",
    }
    for name, there in layout.head.items():
        if getattr(spec_head, name, there) != there:
            lines["differs there"] = f"model.{name}, which is {there}; the logits are the same"
    in_file = output.suffix == ".safetensors" or to in _WITH_META or is_folder(to, output)
    if saved.classes and not in_file:
        lines["class names"] = f"not in this file; {saved.path} has them"
    return lines


def _loading(saved: SavedModel, to: str, layout: Layout, output: pathlib.Path) -> str:
    """Returns the Python code that loads the output."""
    if is_folder(to, output):
        return f"model = {hub_folder.loading(saved, to, output)}; model.eval()"
    if to == "safetensors":
        return f"mbv2_jax.init_model({str(output)!r})"
    if saved.features_only:
        return "load_state_dict(..., strict=False): there is no head in it"
    if to == "mmdet":
        return _loading_mmdet(saved, output)
    width = saved.spec.backbone.width
    network = layout.network.format(
        width=width,
        percent=round(100 * width),
        deeper="d" if saved.spec.backbone.depth != 1 else "",
        classes=len(saved.classes),
        last=saved.params["last"]["norm"]["scale"].size if "last" in saved.params else 0,
        output_stride=saved.spec.backbone.output_stride,
    )
    read = "safetensors.torch.load_file" if output.suffix == ".safetensors" else "torch.load"
    state = f"{read}({str(output)!r})"
    if to in _WITH_META and output.suffix != ".safetensors":
        state += "['state_dict']"
    return f"model = {network}; model.load_state_dict({state}); model.eval()"


def _loading_mmdet(saved: SavedModel, output: pathlib.Path) -> str:
    """Returns the Python code that loads the output in a clone of mmdet, which has the config."""
    arguments = [repr(mmdet_config.CONFIG)]
    if output.suffix != ".safetensors":
        arguments.append(repr(str(output)))
    arguments.append("device='cpu'")
    if options := mmdet_config.options(saved):
        arguments.append(f"cfg_options={options}")
    code = f"model = mmdet.apis.init_detector({', '.join(arguments)})"
    if output.suffix == ".safetensors":
        code += f"; model.load_state_dict(safetensors.torch.load_file({str(output)!r}))"
    return code
