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

from benchmarks.cpu_peers import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY


@cache  # with the library its operators would go
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def torchvision() -> ModuleType:
    """Returns the module torchvision.

    pip's torchvision is built for CUDA: beside a CPU-only torch the import fails for want of
    operators that nothing here runs. Where they are there, defining them would abort Python.
    """
    try:
        import torchvision
    except RuntimeError:
        _declare_operators()
        import torchvision

    return torchvision


def network(weights: Path | None = None) -> Any:
    """Returns the network without dropout, with the weights of a file or random ones."""
    # Only its layout of memory is another one: images are (N, 3, H, W) to those who call it.
    model = torchvision().models.mobilenet_v2(dropout=0.0).to(memory_format=torch.channels_last)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def images(pixels: Any) -> torch.Tensor:
    """Returns images (N, H, W, 3) as torch takes them: (N, 3, H, W), the memory as it was."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def random_weights(image_size: int) -> Any:
    """Returns the network with random weights and running statistics that are not those of birth.

    A few batches of noise make them, so that a normalisation that was folded wrongly would show.
    """
    torch.manual_seed(0)
    model = network().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, image_size, image_size))
    return model.eval()


def save(folder: Path, image_size: int) -> None:
    """Writes torch.pth, random weights, and torch.onnx, where onnx is installed."""
    model = random_weights(image_size)
    torch.save(model.state_dict(), folder / "torch.pth")
    with contextlib.suppress(ImportError, torch.onnx.errors.OnnxExporterError):
        import onnx  # noqa: F401 # the exporter asks for it only at its end

        torch.onnx.export(
            model,
            (torch.randn(1, 3, image_size, image_size),),
            folder / "torch.onnx",
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            dynamo=False,
        )


def inference(model: Any, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Returns a step of inference on x, which gives the logits."""

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return step


def training(model: Any, forward: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """Returns a step of training on x and its labels, which gives the loss before it.

    Args:
      model: whose parameters are trained.
      forward: the model, or what was compiled of it.
      x: images.
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
