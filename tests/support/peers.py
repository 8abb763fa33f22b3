"""The real peers, imported as they are: torchvision, timm, Keras, transformers and OpenMMLab's.

They are test requirements (requirements/peers.txt): a test that needs one fails where it is
missing.
"""

import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from benchmarks.torch_peer import torchvision as torchvision  # one of the peers, as those below
from mbv2_jax.models import mobilenet_v2

# Tests share the cores with other processes, and torch's threads spin while they wait for one
# another: two such processes on two cores take many times as long.
torch.set_num_threads(1)


def mmpretrain() -> ModuleType:
    """Returns the module mmpretrain, with `mmpretrain.models` loaded."""
    _prepare_openmmlab("mmpretrain")
    import mmpretrain
    import mmpretrain.models

    return mmpretrain


def mmseg() -> ModuleType:
    """Returns the module mmseg."""
    _prepare_openmmlab("mmseg")
    import mmseg

    return mmseg


def mmdet() -> ModuleType:
    """Returns the module mmdet, with `mmdet.models` and `mmdet.datasets` loaded.

    Of the operators that mmcv compiles, `nms` works on CPUs.
    """
    _prepare_openmmlab("mmdet")
    import mmdet
    import mmdet.datasets
    import mmdet.datasets.transforms
    import mmdet.models

    return mmdet


def _prepare_openmmlab(scope: str) -> None:
    """Makes mmpretrain, mmseg and mmdet importable, in any order, beside mmcv-lite.

    They import names of `mmcv.ops`, whose compiled module the wheel of mmcv-lite does not have.

    Args:
      scope: the package in which mmengine looks up names from now on, whatever a test before chose.
    """
    torchvision()
    if "mmcv._ext" not in sys.modules:
        compiled = _Operators("mmcv._ext")
        compiled.__spec__ = ModuleSpec("mmcv._ext", None)  # without a loader: mmcv-lite
        compiled.nms = _greedy_nms
        sys.modules["mmcv._ext"] = compiled
    from mmengine.registry import init_default_scope
    from mmpretrain.utils import dependency

    init_default_scope(scope)
    # Where pycocotools is installed, mmpretrain takes transformers for that of its own time, and
    # imports names that are gone.
    dependency.WITH_MULTIMODAL = False


class _Operators(ModuleType):
    """A module of which any name can be imported; what it has not been given cannot be called."""

    nms: Callable[..., torch.Tensor]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"mmcv's operator {name} is not here: mmcv-lite lacks it")

        return operator


def _greedy_nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int
) -> torch.Tensor:
    """Returns the indices of the boxes that mmcv's `nms` keeps, the highest score first.

    Args:
      boxes: (N, 4): x0, y0, x1, y1.
      scores: (N,).
      iou_threshold: a box is left out if its IoU with a better one that is kept is larger.
      offset: 1 where a box includes its last row and column, else 0.
    """
    corners = boxes.detach().numpy()
    sides = corners[:, 2:] - corners[:, :2] + corners.dtype.type(offset)
    areas = sides.prod(1)
    order = scores.sort(descending=True, stable=True).indices.numpy()
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(corners[best, :2], corners[order, :2])
        high = np.minimum(corners[best, 2:], corners[order, 2:])
        shared = (high - low + corners.dtype.type(offset)).clip(0).prod(1)
        order = order[~(shared / (areas[best] + areas[order] - shared) > iou_threshold)]
    return torch.tensor(kept, dtype=torch.long)


def timm() -> ModuleType:
    """Returns the module timm."""
    torchvision()
    import timm

    return timm


def transformers() -> ModuleType:
    """Returns the module transformers, which makes no request to a server."""
    torchvision()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers


def keras() -> ModuleType:
    """Returns the module keras, which computes with torch, and so independently of XLA.

    Images are channels last, whatever ~/.keras sets.
    """
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.config.set_image_data_format("channels_last")
    return keras


def recipe() -> Any:
    """Returns mmpretrain's recipe of its model page as an mmengine Config, read from its file."""
    from mmengine.config import Config

    root = pathlib.Path(mmpretrain().__path__[0])
    return Config.fromfile(root / ".mim/configs/mobilenet_v2/mobilenet-v2_8xb32_in1k.py")


def short_torchvision(num_classes: int, width: float) -> torch.nn.Module:
    """Returns torchvision's network of as few layers as tests.support.short_network's."""
    return torchvision().models.MobileNetV2(
        num_classes=num_classes,
        width_mult=width,
        # Expansion, channels, blocks, stride: the first and the last row of the paper's Table 2.
        inverted_residual_setting=[[1, 16, 1, 1], [6, 320, 1, 1]],
        dropout=0.0,
    )


def layer_names() -> list[str]:
    """Returns the paths of our convolutions with norm, in the order of every port's definition.

    They are those of the network in use, whole or short_network's: `_layers` pairs them strictly
    with a torch network's.
    """
    names = ["stem"]
    for i, stage in enumerate(mobilenet_v2.STAGES, start=1):
        for j in range(stage.blocks):
            parts = ("expand", "depthwise", "project") if i > 1 else ("depthwise", "project")
            names += [f"layer{i}_{j}/{part}" for part in parts]
    return [*names, "last"]


def parameters(
    model: torch.nn.Module, value: Callable[[torch.nn.Parameter], Any] = lambda p: p
) -> dict[str, Any]:
    """Returns a torch MobileNetV2's parameters as our tree of numpy arrays.

    The network may be torchvision's, timm's or mmpretrain's, which define the layers in one order.

    Args:
      model: the torch network.
      value: returns the array to take from each parameter, e.g. its gradient; None stays None.
    """
    tree: dict[str, Any] = {}
    for name, conv, norm in _layers(model):
        kernel = _array(value(conv.weight))
        # OIHW -> HWIO; a depthwise (C, 1, 3, 3) becomes (3, 3, 1, C).
        _set(tree, f"{name}/conv/kernel", None if kernel is None else kernel.transpose(2, 3, 1, 0))
        _set(tree, f"{name}/norm/scale", _array(value(norm.weight)))
        _set(tree, f"{name}/norm/bias", _array(value(norm.bias)))
    for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        kernel = _array(value(linear.weight))
        _set(tree, "classifier/kernel", None if kernel is None else kernel.T)
        _set(tree, "classifier/bias", _array(value(linear.bias)))
    return tree


def assign(model: torch.nn.Module, variables: dict[str, Any]) -> None:
    """Gives a torch MobileNetV2 our variables, {"params", "batch_stats"}: undoes `parameters`."""
    params, stats = (flatten_dict(variables[name], sep="/") for name in ("params", "batch_stats"))

    def copy(tensor: torch.Tensor, value: np.ndarray) -> None:
        tensor.data.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    for name, conv, norm in _layers(model):
        copy(conv.weight, params[f"{name}/conv/kernel"].transpose(3, 2, 0, 1))  # HWIO -> OIHW
        copy(norm.weight, params[f"{name}/norm/scale"])
        copy(norm.bias, params[f"{name}/norm/bias"])
        assert norm.running_mean is not None and norm.running_var is not None
        copy(norm.running_mean, stats[f"{name}/norm/mean"])
        copy(norm.running_var, stats[f"{name}/norm/var"])
    for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        copy(linear.weight, params["classifier/kernel"].T)
        copy(linear.bias, params["classifier/bias"])


def gradients(model: torch.nn.Module) -> dict[str, Any]:
    """Returns the gradients as our parameter tree, None where torch holds none."""
    return parameters(model, lambda p: p.grad)


def statistics(model: torch.nn.Module) -> dict[str, Any]:
    """Returns the running statistics as our batch_stats tree of numpy arrays."""
    tree: dict[str, Any] = {}
    for name, _, norm in _layers(model):
        _set(tree, f"{name}/norm/mean", _array(norm.running_mean))
        _set(tree, f"{name}/norm/var", _array(norm.running_var))
    return tree


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Sets weights and statistics to random values such as a trained network has.

    Initial ones and zeros would hide an exchanged scale, bias, mean or variance.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.data.uniform_(low, high, generator=generator)

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, -0.5, 0.5)
            assert module.running_mean is not None and module.running_var is not None
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 1.5)
        elif isinstance(module, torch.nn.Linear):
            uniform(module.weight, -0.5, 0.5)
            if module.bias is not None:
                uniform(module.bias, -0.5, 0.5)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)


def nchw(images: np.ndarray) -> torch.Tensor:
    """Returns (N, H, W, C) as a torch tensor (N, C, H, W) of the same dtype."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """Returns a torch tensor (N, C, H, W) as (N, H, W, C) of the same dtype."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def as_jax(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree with jax arrays for numpy's; float64 needs enable_x64."""
    return {
        key: as_jax(value) if isinstance(value, dict) else jnp.asarray(value)
        for key, value in tree.items()
    }


def _layers(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Conv2d, torch.nn.BatchNorm2d]]:
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    return zip(layer_names(), convs, norms, strict=True)


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().numpy().copy()


def _set(tree: dict[str, Any], path: str, value: np.ndarray | None) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
