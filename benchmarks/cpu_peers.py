"""One way of running MobileNetV2 on CPU cores, as a process that takes steps on request.

    python -m benchmarks.cpu_peers WAY --task=training --batch=32 --weights=FOLDER --cores=0,1
    python -m benchmarks.cpu_peers torch --make=FOLDER      # writes the weights, the first thing

benchmarks/cpu.py runs these processes beside each other. A process builds its network, takes the
steps by which it is compared with the others, warms up, and prints a line of JSON:

    {"outputs": the logits, or the losses of the first two steps of training,
     "steps": the number of steps that take about --seconds,
     "versions": the versions of its packages}

or {"missing": the reason} where its packages are not installed. Then it waits for lines on its
standard input. For each line it takes that number of steps and prints
{"seconds": their duration, "peak_mib": the peak of its memory}. It ends with its input.

At the top it imports only the standard library, numpy, and a few plain dataclasses, since the
imports of a way count as its memory.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import CLASSES, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Batch

TASKS = ("inference", "training")
OURS = "model"  # torch's weights as a model directory, which ours and plain Flax read

Step = Callable[[], Any]  # takes one step; returns the logits, or the loss before the step


@dataclasses.dataclass(frozen=True)
class Job(Batch):
    """The task of a process, on a batch.

    Attributes:
      task: "inference" or "training".
      weights: the folder of the weights.
      cores: the number of CPU cores.
    """

    task: str
    weights: Path
    cores: int


def ours(job: Job, file: str = OURS) -> Step:
    """Prepares this package: its predictor on normalised images, or its training step.

    That step takes pixels, normalises them, and reports accuracy and the gradient's norm besides.
    """
    import jax

    from benchmarks.trainer import training_step
    from mbv2_jax import inference, model_dir
    from mbv2_jax.runtime import cpu, memory

    if job.task == "training":
        cpu.use_cores(job.batch, 0)  # as the command does
    saved = model_dir.read(job.weights / file)
    if job.task == "inference":
        predictor, images = inference.Predictor(saved), jax.device_put(job.images())
        return lambda: predictor(images).block_until_ready()
    train = training_step(job, saved.variables(), "float32", jax.devices())
    # Once, after the first step, as in a training run.
    release_freed_memory = cache(memory.release_freed_memory)

    def step() -> Any:
        _, metrics = jax.block_until_ready(train())
        release_freed_memory()
        return metrics["loss"]

    return step


def flax(job: Job) -> Step:
    """Prepares Flax's own layers and optax, jitted (see plain_flax.py)."""
    import jax
    import optax

    from benchmarks.plain_flax import MobileNetV2
    from mbv2_jax import model_dir

    saved = model_dir.read(job.weights / OURS)
    variables = jax.device_put(saved.variables())
    model, images, labels = MobileNetV2(), jax.device_put(job.images()), job.labels()
    if job.task == "inference":
        apply = jax.jit(model.apply)
        return lambda: apply(variables, images).block_until_ready()
    optimizer = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM)
    )

    def loss_of(params: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, images, True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated["batch_stats"]

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: Any) -> Any:
        params, batch_stats, opt_state = state
        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch_stats)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    state = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))

    def step() -> Any:
        nonlocal state
        state, loss = train_step(state)
        return jax.block_until_ready((loss, state))[0]

    return step


def torch(job: Job, form: str = "eager") -> Step:
    """Prepares torchvision's network: eager, fused (BatchNorm in the convolutions) or compiled."""
    # An own folder, since an interrupted run may have left half of a compiled program.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.weights / "inductor")
    import torch

    from benchmarks import torch_peer

    torch.set_num_threads(job.cores)
    model = torch_peer.network(job.weights / "torch.pth").eval()
    x = torch_peer.images(job.images())
    forward = {"eager": lambda m: m, "fused": torch_peer.fused, "compiled": torch_peer.compiled}[
        form
    ](model)
    if job.task == "inference":
        return torch_peer.inference(forward, x)
    return torch_peer.training(model, forward, x, torch.from_numpy(job.labels()).long())


def keras(job: Job) -> Step:
    """Prepares Keras's MobileNetV2 on its JAX backend; its weight decay is decoupled."""
    model = _keras_network(job.image_size)
    model.load_weights(job.weights / "keras.weights.h5")
    images, labels = job.images(), job.labels()
    if job.task == "inference":
        return lambda: model.predict_on_batch(images)
    import keras

    model.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return lambda: np.asarray(model.train_on_batch(images, labels))


def _keras_network(image_size: int) -> Any:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    keras.config.set_image_data_format("channels_last")
    return keras.applications.MobileNetV2(
        (image_size, image_size, 3), weights=None, classes=CLASSES, classifier_activation=None
    )


def _save_keras(folder: Path, image_size: int) -> None:
    """Writes keras.weights.h5: random weights and running statistics."""
    model, rng = _keras_network(image_size), np.random.default_rng(0)
    for layer in model.layers:
        if hasattr(layer, "moving_variance"):
            layer.moving_mean.assign(rng.normal(0.0, 0.1, layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.2, 1.0, layer.moving_variance.shape))
    model.save_weights(folder / "keras.weights.h5")


def onnxruntime(job: Job) -> Step:
    """Prepares ONNX Runtime on torch's export, with the batch size fixed."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = job.cores
    settings.add_free_dimension_override_by_name("batch", job.batch)
    session = onnxruntime.InferenceSession(
        _exported(job), settings, providers=["CPUExecutionProvider"]
    )
    feeds = {"images": _channels_first(job)}
    return lambda: session.run(None, feeds)[0]


def openvino(job: Job) -> Step:
    """Prepares OpenVINO on torch's export, in float32, with the batch size fixed."""
    import openvino

    core = openvino.Core()
    model = core.read_model(_exported(job))
    images = _channels_first(job)
    model.reshape(images.shape)
    settings = {
        "INFERENCE_NUM_THREADS": job.cores,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", settings)
    return lambda: compiled(images)[0]


def _exported(job: Job) -> str:
    path = job.weights / "torch.onnx"
    if not path.exists():
        raise ImportError("No module named 'onnx', which exports torch's network")
    return str(path)


def _channels_first(job: Job) -> np.ndarray:
    return np.ascontiguousarray(job.images().transpose(0, 3, 1, 2))


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of running the network.

    Attributes:
      prepare: returns its step.
      packages: the packages whose versions are reported.
      tasks: the tasks that it can do.
    """

    prepare: Callable[[Job], Step]
    packages: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS


WAYS = {
    "ours": Way(ours, ("jax", "jaxlib", "flax")),
    "torch": Way(torch, ("torch", "torchvision")),
    "torch-fused": Way(partial(torch, form="fused"), ("torch",), ("inference",)),
    "torch-compile": Way(partial(torch, form="compiled"), ("torch",)),
    "flax": Way(flax, ("jax", "jaxlib", "flax")),
    "keras": Way(keras, ("keras", "jax")),
    "onnxruntime": Way(onnxruntime, ("onnxruntime", "onnx"), ("inference",)),
    "openvino": Way(openvino, ("openvino", "onnx"), ("inference",)),
}
# It is not timed: Keras's logits are compared with its logits.
OURS_OF_KERAS = "ours-of-keras"
CHECKS = {OURS_OF_KERAS: Way(partial(ours, file="keras.weights.h5"), ())}


def make(way: str, folder: Path, image_size: int) -> None:
    """Writes random weights: Keras's, or torch's, which all other ways have."""
    if way == "keras":
        _save_keras(folder, image_size)
        return
    from benchmarks import torch_peer
    from mbv2_jax import model_dir

    torch_peer.save(folder, image_size)
    # They are converted, since reading a torch file takes torch, whose memory would count.
    saved = model_dir.read(folder / "torch.pth")
    model_dir.write(folder / OURS, **saved.variables(), description=saved.description)


def work(way: Way, job: Job, seconds: float, say: Callable[[dict[str, Any]], None]) -> None:
    """Prepares a way, and takes steps for each line of the standard input."""
    step = way.prepare(job)
    outputs = [np.ravel(step()) for _ in range(2 if job.task == "training" else 1)]
    step()
    steps = max(1, round(seconds / _time(step, 1)))
    versions = {name: importlib.metadata.version(name) for name in way.packages}
    say({"outputs": np.concatenate(outputs).tolist(), "steps": steps, "versions": versions})
    # The peak is counted from here on: building and compiling do not matter.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in sys.stdin:
        say({"seconds": _time(step, steps), "peak_mib": _peak_mebibytes()})


def _time(step: Step, steps: int) -> float:
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - begin


def _peak_mebibytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=[*WAYS, *CHECKS])
    parser.add_argument("--make", type=Path, metavar="FOLDER")
    parser.add_argument("--task", choices=TASKS, default="inference")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--weights", type=Path, metavar="FOLDER")
    parser.add_argument("--cores", required=True, help="numbers of the cores to use, such as 0,1,2")
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    cores = {int(core) for core in options.cores.split(",")}
    os.sched_setaffinity(0, cores)
    if options.make:
        make(options.way, options.make, options.image_size)
        return
    # The output of libraries goes to standard error; standard output is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        job = Job(options.batch, options.image_size, options.task, options.weights, len(cores))
        way = (WAYS | CHECKS)[options.way]
        with contextlib.suppress(BrokenPipeError):
            work(way, job, options.seconds, say)
    except ImportError as error:
        say({"missing": str(error)})


if __name__ == "__main__":
    main()
