"""One way of running MobileNetV2, or a part of it, on a GPU, as a process that measures and ends.

    python -m benchmarks.gpu_peers WAY --task=training --batch=256 --dtype=bfloat16
    python -m benchmarks.gpu_peers convolution --task=forward --layer=3 --batch=128

benchmarks/gpu.py runs these one after another. Each prints a line of JSON:

    {"seconds": the duration of one step, a number for each round,
     "peak_mib": the peak of the GPU's memory, "device": the GPU's name,
     "versions": the versions of the packages}

or {"missing": the reason} where its packages or the GPU are missing, or the memory is too small.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.workload import CLASSES, Batch

DTYPES = ("bfloat16", "float32")
DIRECTIONS = ("forward", "input-gradient", "kernel-gradient")
COPIED = {"gpu": 1 << 30, "cpu": 1 << 26}  # bytes


@dataclasses.dataclass(frozen=True)
class Job(Batch):
    """The task of a process, on a batch.

    Attributes:
      device: "gpu" or "cpu".
      task: "training" or "inference", or the direction of a depthwise layer.
      dtype: "bfloat16" or "float32".
      layer: the number of the depthwise layer, 0 to 16.
    """

    device: str
    task: str
    dtype: str
    layer: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A way that is ready.

    Attributes:
      step: starts one step on the device, and may return before it is done.
      wait: returns when all steps are done.
      peak: returns the device's peak memory so far, in bytes; None where it is not counted.
      device: the device's name.
      alone: whether each step is waited for before the next one starts, as in interactive use.
    """

    step: Callable[[], Any]
    wait: Callable[[], Any]
    peak: Callable[[], int | None]
    device: str
    alone: bool = False


@dataclasses.dataclass(frozen=True)
class Layer:
    """A depthwise convolution of the network: (N, size, size, channels), 3x3."""

    channels: int
    size: int
    stride: int


def depthwise_layers(image_size: int) -> list[Layer]:
    """Returns the network's 17 depthwise convolutions, in order."""
    from mbv2_jax.models.mobilenet_v2 import STAGES, STEM_CHANNELS

    layers = []
    size, channels = -(-image_size // 2), STEM_CHANNELS
    for stage in STAGES:
        for block in range(stage.blocks):
            stride = stage.stride if block == 0 else 1
            layers.append(Layer(stage.expansion * channels, size, stride))
            size, channels = -(-size // stride), stage.channels
    return layers


def _with_jax(job: Job, step: Callable[[], Any]) -> Prepared:
    """Wraps a step in JAX, which returns arrays that exist once it is done."""
    import jax

    newest: Any = None

    def start() -> None:
        nonlocal newest
        newest = step()

    device = jax.devices()[0]
    return Prepared(
        start,
        lambda: jax.block_until_ready(newest),
        lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"),
        device.device_kind,
        alone=job.task == "inference",
    )


def _jax_devices(job: Job) -> Any:
    """Returns JAX's devices of the requested kind; raises ImportError where there is none."""
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda", "cpu": "cpu"}[job.device]
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError):  # no such device, or no plugin for it
        raise ImportError(
            "jax finds no NVIDIA GPU: pip install '.[cuda]' where there is one; "
            "--device=cpu tries the benchmark itself"
        ) from None


def ours(job: Job) -> Prepared:
    """Prepares this package: its folded network, or its training step; float32 is TF32."""
    device = _jax_devices(job)[0]
    import jax
    import jax.numpy as jnp

    from benchmarks.trainer import training_step
    from mbv2_jax.models.folding import fold
    from mbv2_jax.models.mobilenet_v2 import MobileNetV2

    model = MobileNetV2(num_classes=CLASSES, dtype=jnp.dtype(job.dtype))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    if job.task == "inference":
        params = fold(variables["params"], variables["batch_stats"], model.bn_epsilon)
        given = jax.device_put(({"params": params}, job.images()), device)
        apply = jax.jit(model.clone(folded=True).apply)
        return _with_jax(job, lambda: apply(*given))
    return _with_jax(job, training_step(job, variables, job.dtype, [device]))


def torch(job: Job, source: str = "torchvision", compiled: bool = False) -> Prepared:
    """Prepares torchvision's or timm's network, channels last; autocast bfloat16, or TF32."""
    import torch

    from benchmarks import torch_peer

    device = {"gpu": "cuda", "cpu": "cpu"}[job.device]
    if device == "cuda" and not torch.cuda.is_available():
        raise ImportError("this torch finds no NVIDIA GPU")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    model = torch_peer.network() if source == "torchvision" else _timm()
    model = model.to(device, memory_format=torch.channels_last)
    images = torch_peer.images(job.images()).to(device)
    network = torch.compile(model, mode="max-autotune") if compiled else model
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=job.dtype == "bfloat16")

    def forward(x: torch.Tensor) -> torch.Tensor:
        with autocast():
            return network(x)

    if job.task == "inference":
        model.eval()
        step = torch_peer.inference(forward, images)
    else:
        labels = torch.from_numpy(job.labels()).long().to(device)
        step = torch_peer.training(model, forward, images, labels)
    alone = job.task == "inference"
    if device == "cpu":
        return Prepared(step, lambda: None, lambda: None, "cpu", alone)
    name = torch.cuda.get_device_name()
    return Prepared(step, torch.cuda.synchronize, torch.cuda.max_memory_allocated, name, alone)


def _timm() -> Any:
    from benchmarks import torch_peer

    torch_peer.torchvision()  # timm imports it, and it may lack operators
    import timm

    return timm.create_model("mobilenetv2_100", num_classes=CLASSES)


def depthwise(job: Job, lowering: Callable[..., Any]) -> Prepared:
    """Prepares one depthwise layer by `lowering`: forward, or one of the two gradients."""
    _jax_devices(job)
    import jax
    import jax.numpy as jnp

    layer, dtype = depthwise_layers(job.image_size)[job.layer], jnp.dtype(job.dtype)
    shape = (job.batch, layer.size, layer.size, layer.channels)
    side = -(-layer.size // layer.stride)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape, dtype)
    kernel = jax.random.normal(keys[1], (3, 3, 1, layer.channels), dtype)
    gradient = jax.random.normal(keys[2], (job.batch, side, side, layer.channels), dtype)
    convolve = partial(lowering, stride=layer.stride)

    def task(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Any:
        y, gradients = jax.vjp(convolve, x, kernel)
        # XLA does not compute the gradient that is not returned.
        return y if job.task == "forward" else gradients(gradient)[job.task == "kernel-gradient"]

    compiled = jax.jit(task)
    return _with_jax(job, lambda: compiled(x, kernel, gradient))


def _grouped(x: Any, kernel: Any, stride: int) -> Any:
    from jax import lax

    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _shifted_sums(x: Any, kernel: Any, stride: int) -> Any:
    from mbv2_jax.ops.cpu import depthwise

    return depthwise.convolve(x, kernel, stride=stride, pads=((1, 1), (1, 1)), dilation=1)


def _triton(x: Any, kernel: Any, stride: int) -> Any:
    import jax

    from benchmarks import triton_depthwise

    return triton_depthwise.depthwise_conv(x, kernel, stride, jax.default_backend() == "cpu")


def copy(job: Job) -> Prepared:
    """Prepares an operation that reads COPIED bytes and writes as many."""
    _jax_devices(job)
    import jax
    import jax.numpy as jnp

    held = jnp.zeros(COPIED[job.device] // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return _with_jax(job, lambda: add(held))


NETWORKS: dict[str, tuple[Callable[[Job], Prepared], tuple[str, ...]]] = {
    "ours": (ours, ("jax", "jaxlib", "flax")),
    "torch": (torch, ("torch", "torchvision")),
    "torch-compile": (partial(torch, compiled=True), ("torch",)),
    "timm": (partial(torch, source="timm"), ("timm",)),
}
LOWERINGS: dict[str, tuple[Callable[[Job], Prepared], tuple[str, ...]]] = {
    "convolution": (partial(depthwise, lowering=_grouped), ("jax", "jaxlib")),
    "shifted-sums": (partial(depthwise, lowering=_shifted_sums), ("jax", "jaxlib")),
    "triton": (partial(depthwise, lowering=_triton), ("jax", "jaxlib")),
}
COPY = {"copy": (copy, ("jax", "jaxlib"))}


def measure(way: Prepared, rounds: int, seconds: float) -> list[float]:
    """Returns the seconds of one step, measured over about `seconds` in each round."""

    def timed(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            way.step()
            if way.alone:
                way.wait()
        way.wait()
        return (time.perf_counter() - begin) / steps

    for _ in range(3):  # compile; let libraries choose their kernels
        timed(1)
    steps = max(1, round(seconds / timed(3)))
    return [timed(steps) for _ in range(rounds)]


def main() -> None:
    """Runs the command."""
    ways = NETWORKS | LOWERINGS | COPY
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=ways)
    parser.add_argument("--device", choices=COPIED, default="gpu")
    parser.add_argument("--task", default="training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    # The output of libraries goes to standard error; standard output is for the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fields = [field.name for field in dataclasses.fields(Job)]
    job = Job(**{name: getattr(options, name) for name in fields})
    prepare, packages = ways[options.way]
    try:
        way = prepare(job)
        seconds = measure(way, options.rounds, options.seconds)
        peak = way.peak()
        answer = {
            "seconds": seconds,
            "peak_mib": None if peak is None else peak / 2**20,
            "device": way.device,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }
    except ImportError as error:
        answer = {"missing": str(error)}
    except RuntimeError as error:  # JAX's or torch's
        if not any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "out of memory")):
            raise
        answer = {"missing": "the device's memory is too small"}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
