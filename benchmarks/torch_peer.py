"""torchvision's MobileNetV2 as its users run it, in channels-last memory."""

import contextlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.workload import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY


@cache  # the operators exist as long as the library object
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def torchvision() -> ModuleType:
    """Returns the module torchvision.

    pip's torchvision is built for CUDA. Beside a CPU-only torch its import fails, since operators
    are missing that nothing here runs. Where they exist, defining them would abort Python.
    """
    try:
        import torchvision
    except RuntimeError:
        _declare_operators()
        import torchvision

    return torchvision


def network(weights: Path | None = None) -> Any:
    """Returns the network without dropout, with the weights of a file or random ones."""
    # Only the layout in memory differs: callers see images as (N, 3, H, W).
    model = torchvision().models.mobilenet_v2(dropout=0.0).to(memory_format=torch.channels_last)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def images(pixels: Any) -> torch.Tensor:
    """Returns images (N, H, W, 3) as torch takes them: a view of shape (N, 3, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def random_weights(image_size: int) -> Any:
    """Returns the network with random weights and the running statistics of batches of noise.

    With fresh statistics, a normalisation that was folded wrongly would not show.
    """
    torch.manual_seed(0)
    model = network().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, image_size, image_size))
    return model.eval()


def save(folder: Path, image_size: int) -> None:
    """Writes random weights as torch.pth, and as torch.onnx where onnx is installed."""
    model = random_weights(image_size)
    torch.save(model.state_dict(), folder / "torch.pth")
    with contextlib.suppress(ImportError, torch.onnx.errors.OnnxExporterError):
        import onnx  # noqa: F401 # the exporter imports it only at its end

        torch.onnx.export(
            model,
            (torch.randn(1, 3, image_size, image_size),),
            folder / "torch.onnx",
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            dynamo=False,
        )


def inference(model: Any, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Returns a step of inference on x, which returns the logits."""

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return step


def training(model: Any, forward: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """Returns a step of training, which returns the loss before it.

    Args:
      model: the network that is trained.
      forward: the network, or its compiled form.
      x: images (N, 3, H, W).
      y: labels, (N,) int64.
    """
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
    )

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def fused(model: Any) -> Any:
    """Returns the network, in evaluation mode, with BatchNorm in the convolutions before it."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model).to(memory_format=torch.channels_last)


def compiled(model: Any) -> Any:
    """Returns the network compiled; raises ImportError where there is no C++ compiler for it."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise ImportError(f"torch.compile needs a C++ compiler, and there is no {compiler}")
    return torch.compile(model)
