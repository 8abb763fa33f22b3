"""One way of reading photos, as a process that prints its images per second as a line of JSON.

    python -m benchmarks.input_peers PEER PHOTOS --cores=1 --setting=0 --seconds=5

benchmarks/input_pipeline.py runs these processes. At the top they import only the standard library:
the TensorFlow peers run in an environment of their own, without most of this package's
dependencies.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

SIZE = 224  # pixels, the side of the transformed images
BATCH = 64  # images
EPOCHS = 100_000  # more than any measurement takes

CROPS = 20  # crops of each photo that are drawn for TensorFlow

# Batches that may be ready before the clock starts: at most two per worker or thread, and a few.
_READY = 24

Batches = Iterator[Any]


def ours(photos: str, setting: int, decode_as: str) -> Batches:
    """Returns this package's training batches; `setting` is data.workers, 0 for threads."""
    from mbv2_jax.data.loader import train_batches
    from mbv2_jax.data.sources import open_source
    from mbv2_jax.data.transforms.pipeline import make_transform
    from mbv2_jax.tasks.classification.task import Classification

    source = open_source(f"folder:{photos}", "all")
    batches = train_batches(
        source,
        make_transform("random_resized_crop(size)|random_flip(0.5)", SIZE),
        Classification(),
        batch_size=BATCH,
        seed=0,
        start=0,
        stop=EPOCHS * len(source) // BATCH,
        workers=setting,
        decode_as=decode_as,
    )
    return (batch["image"] for batch in batches)


def torchvision(photos: str, setting: int, floats: bool) -> Batches:
    """Returns the batches of torch's DataLoader on ImageFolder; `setting` is num_workers.

    With `floats` the transform is torchvision's reference preset, which scales and normalises on
    the host (references/classification/presets.py). Without, it ends with uint8 pixels as ours.
    """
    import torch
    from torch.utils.data import DataLoader, RandomSampler

    from benchmarks import torch_peer

    transforms = torch_peer.torchvision().transforms
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)  # nothing here computes with tensors
    operations = [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    if floats:
        operations += [
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    dataset = ImageFolder(photos, transforms.Compose(operations))
    # One long epoch of shuffled passes, since a DataLoader pauses at the end of each epoch.
    order = RandomSampler(dataset, num_samples=EPOCHS * BATCH)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=order, num_workers=setting)
    return (images for images, _ in loader)


def tensorflow(photos: str, setting: int, antialias: bool) -> Batches:
    """Returns tf.data's batches with decode_and_crop_jpeg; `setting` is the number of threads."""
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="3")
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(setting)
    tf.config.threading.set_intra_op_parallelism_threads(1)

    def image(path: Any, window: Any) -> Any:
        encoded = tf.io.read_file(path)
        pixels = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        pixels = tf.image.resize(pixels, (SIZE, SIZE), antialias=antialias)
        pixels = tf.image.random_flip_left_right(pixels)
        return tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = setting
    options.threading.max_intra_op_parallelism = 1
    paths, windows = _drawn(photos)
    dataset = tf.data.Dataset.from_tensor_slices((paths, windows)).shuffle(len(paths)).repeat()
    dataset = dataset.map(image, num_parallel_calls=setting).batch(BATCH).prefetch(1)
    return iter(dataset.with_options(options))


def _drawn(photos: str) -> tuple[list[str], list[tuple[int, int, int, int]]]:
    """Returns photos and their crops, (top, left, height, width), drawn before the clock starts.

    TensorFlow's own sample_distorted_bounding_box draws smaller crops than RandomResizedCrop: 0.39
    of a 500 x 375 photo on average, instead of 0.43.
    """
    import numpy as np
    from PIL import Image

    from mbv2_jax.data.transforms.resize_and_crop import RandomResizedCrop

    crop, rng = RandomResizedCrop(SIZE), np.random.default_rng(0)
    paths, windows = [], []
    for folder, _, names in os.walk(photos):
        for path in (os.path.join(folder, name) for name in names):
            with Image.open(path) as image:
                boxes = [crop.box(*image.size, rng) for _ in range(CROPS)]
            paths += [path] * CROPS
            windows += [(top, left, height, width) for left, top, width, height in boxes]
    return paths, windows


# Name -> a function (photos, setting) -> batches, and the packages whose versions matter.
PEERS: dict[str, tuple[Callable[[str, int], Batches], tuple[str, ...]]] = {
    "ours-exact": (functools.partial(ours, decode_as="exact"), ("grain", "pillow")),
    "ours-fast": (
        functools.partial(ours, decode_as="fast"),
        ("grain", "simplejpeg", "cykooz.resizer"),
    ),
    "torch-uint8": (
        functools.partial(torchvision, floats=False),
        ("torch", "torchvision", "pillow"),
    ),
    "torch-float": (
        functools.partial(torchvision, floats=True),
        ("torch", "torchvision", "pillow"),
    ),
    "tf": (functools.partial(tensorflow, antialias=False), ("tensorflow",)),
    "tf-antialias": (functools.partial(tensorflow, antialias=True), ("tensorflow",)),
}


def images_per_second(batches: Batches, seconds: float) -> float:
    """Returns the steady rate, measured for `seconds` after the batches that were ready."""
    begin = time.perf_counter()
    for taken, _ in enumerate(batches, start=1):
        if taken >= _READY and time.perf_counter() - begin >= seconds / 4:
            break
    times, counts = [time.perf_counter()], [0]
    while times[-1] - times[0] < seconds or len(times) < 3:
        counts.append(counts[-1] + len(next(batches)))
        times.append(time.perf_counter())
    # A line through all points: threads and workers deliver in bursts, and it should not matter
    # where in a burst the clock starts and stops.
    return statistics.linear_regression(times, counts).slope


def main() -> None:
    """Prints {"rate": images per second, "versions": {package: version}}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("photos")
    parser.add_argument("--cores", required=True, help="numbers of the cores to use, such as 0,1,2")
    parser.add_argument("--setting", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    function, packages = PEERS[options.peer]
    rate = images_per_second(function(options.photos, options.setting), options.seconds)
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"rate": rate, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
