"""Prediction with a trained model: images in, predictions or features out."""

import dataclasses
import functools
import os
import pathlib
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from mbv2_jax import model_dir, tasks
from mbv2_jax.data import classes
from mbv2_jax.data.decoding import ImageLike
from mbv2_jax.data.sample import Sample
from mbv2_jax.data.sources.folder import EXTENSIONS
from mbv2_jax.errors import UserError, nearest
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.model_json import Description
from mbv2_jax.models import variants
from mbv2_jax.models.mobilenet_v2 import MobileNetV2, map_endpoints
from mbv2_jax.models.variants import VARIANTS
from mbv2_jax.ops import lowering
from mbv2_jax.ops.conv import map_batch
from mbv2_jax.runtime import memory, processes
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.task import Task

# How far normalised floats may lie outside the range of pixels. Standard normal noise, which many
# tests feed, stays within 7 in a billion values, and a bicubic filter overshoots by a fifth of the
# range. Pixels 0-255 that pass are of a picture that is black to the eye.
_MARGIN = 10.0

BATCH_SIZE = 32

# Held while a program is compiled: threads that ask for the same one wait instead of compiling it
# again.
_COMPILING = threading.Lock()


class Predictor:
    """A model with its preprocessing, compiled once for each batch shape.

    Batch normalisation is folded into the convolutions; the outputs are the same but for rounding.

    The first call with a batch of another size, or of another dtype, compiles the network for it,
    which takes seconds; later calls do not. A server can do so before its first request, with zeros
    of the same shape: `predictor(np.zeros((1, 224, 224, 3), np.uint8))` for logits, and
    `predictor.predict(np.zeros((8, 8, 3), np.uint8))` for predictions, which are another program.
    `predict` uses batches of `batch_size` images or, for fewer, of the next power of 2. After
    `mbv2_jax.enable_compilation_cache()` a later process loads what an earlier one compiled.

    Args:
      saved: from model_dir.read.

    Attributes:
      task: the model's task, which knows its classes.
      transform: turns an image of any size into the network's input.
    """

    def __init__(self, saved: SavedModel):
        spec = saved.spec
        self.task = saved.task()
        self.transform = spec.preprocessing.transform
        self._spec, self._path = spec, saved.path
        self._network = saved.module(folded=True)
        folded = self.task.fold(saved.params, saved.batch_stats, spec.backbone)
        self._params = jax.device_put(folded)
        self._compiled: set[Any] = set()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of the outputs; () for a backbone alone."""
        return self.task.classes

    def __call__(self, images: np.ndarray | jax.Array) -> Any:
        """Returns the outputs of the network, such as logits, for images of the network's size.

        All of them go through the network in one batch; `predict` takes any number of images.

        Args:
          images: (N, H, W, 3) RGB: uint8 pixels, which are normalised here, or floats that are
            normalised already. Nothing is resized.

        Returns:
          The outputs of the task's network: logits (N, classes) float32 of a classifier, and
          (N, H, W, classes) of a segmentation model; of a detector `models.ssdlite.Outputs`.

        Raises:
          UserError: the images have another shape (the message points out (N, 3, H, W)) or dtype,
            or the model has only features.
        """
        self._check_head()
        return self._forward(self._network, images)

    def predict(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = BATCH_SIZE
    ) -> list[dict[str, Any]]:
        """Predicts any number of images of any size.

        Args:
          images: an image, a folder, or several of either: see `list_images`.
          batch_size: how many images go through the network at once.

        Returns:
          One dict for each image, as `inference_model` returns it.

        Raises:
          UserError: an image cannot be read (the message names it), the model has only features, or
            its outputs are NaN.
        """
        return [_or_raise(outcome) for outcome in self.stream(images, batch_size)]

    def stream(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = BATCH_SIZE
    ) -> Iterator[dict[str, Any] | UserError]:
        """Yields the results of `predict` as they come, and an error for each bad image."""
        self._check_head()
        for prepared, rows in self._batches(list_images(images), batch_size):
            good = [image for image in prepared if not isinstance(image, UserError)]
            predictions = iter(self._decode(good, rows) if good else [])
            for image in prepared:
                yield image if isinstance(image, UserError) else next(predictions)

    def _decode(self, samples: Sequence[Sample], rows: int) -> list[dict[str, Any]]:
        """Returns the predictions of prepared images, which go through the network at once."""
        outputs = self._forward(self._network, self._padded(samples, rows), self.task)
        frames = [sample.frame for sample in samples if sample.frame is not None]
        try:
            return self.task.decode(jax.device_get(outputs), frames)
        except ValueError as error:
            raise UserError(
                f"{error}: the weights in {self._path} are damaged, or their training went wrong"
            ) from None

    def extract_feat(
        self,
        images: ImageLike | Iterable[ImageLike] | jax.Array,
        stage: str = "neck",
        *,
        out_indices: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> jax.Array | tuple[jax.Array, ...]:
        """Returns features of images (mmpretrain's extract_feat, channels last).

        Args:
          images: (N, H, W, 3) as `__call__` takes them, which are not resized; or anything that
            `list_images` takes, which is prepared first.
          stage: 'neck', the pooled features that the classifier gets, before its hidden layers if
            it has some; or 'backbone', feature maps.
          out_indices: the feature maps to return: 0..6 = layer1..layer7, 7 = the last convolution,
            if the network has one; None returns the last of them. Only used if stage is 'backbone'.
          batch_size: how many prepared images go through the network at once.

        Returns:
          (N, 1280) float32 (wider where the width multiplier is above 1, and layer7's channels
          where there is no last convolution); for 'backbone' a tuple of (N, h, w, channels)
          float32, in the network's order.

        Raises:
          UserError: the stage or an index is unknown, `__call__` would refuse the images, or an
            image cannot be read.
        """
        if stage not in ("backbone", "neck"):
            raise UserError(f"there is no stage {stage!r}: {nearest(stage, ('backbone', 'neck'))}")
        wanted = None if stage == "neck" else out_indices
        backbone = MobileNetV2(
            num_classes=None,
            out_indices=checked_indices(wanted, self._spec.backbone),
            folded=True,
            **dataclasses.asdict(self._spec.backbone),
        )

        def forward(batch: np.ndarray | jax.Array) -> tuple[jax.Array, ...]:
            maps = self._forward(backbone, batch)
            return (maps[0].mean((1, 2)),) if stage == "neck" else maps

        if isinstance(images, np.ndarray | jax.Array) and images.ndim == 4:
            features = forward(images)
        else:
            parts = []
            for prepared, rows in self._batches(list_images(images), batch_size):
                good = [_or_raise(image) for image in prepared]
                maps = forward(self._padded(good, rows))
                parts.append([part[: len(good)] for part in maps])
            features = tuple(jnp.concatenate(part) for part in zip(*parts, strict=True))
        return features[0] if stage == "neck" else features

    def prepare(self, image: ImageLike) -> np.ndarray:
        """Returns an image as the network's input: (H, W, 3) uint8 RGB.

        Args:
          image: a path, an encoded file's bytes, a PIL image, or (H, W, 3) uint8 RGB pixels.

        Raises:
          UserError: it cannot be read or decoded, or is none of these.
        """
        return self._spec.preprocessing.prepare(image)

    def _forward(self, network: nn.Module, images: Any, task: Task | None = None) -> Any:
        """Applies a network to images of its size, and a task's `postprocess` to its outputs."""
        if not isinstance(images, np.ndarray | jax.Array):
            raise UserError(
                f"images are a {type(images).__name__}: give an array (N, H, W, 3); predict and"
                " extract_feat take files and lists"
            )
        shape = images.shape
        if len(shape) == 4 and shape[-1] != 3 and shape[1] == 3:
            raise UserError(f"images are (N, 3, H, W) = {shape}: give (N, H, W, 3)")
        if len(shape) != 4 or shape[-1] != 3:
            raise UserError(f"images have the shape {shape}: give (N, H, W, 3)")
        if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"images are {images.dtype}: give uint8 pixels, or normalised floats")
        preprocessing = self._spec.preprocessing
        if images.dtype != np.uint8:
            _check_normalized(images, preprocessing)
        kind = (network, task, shape, images.dtype)
        with lowering.lowering_for(_platform(images)):
            if kind in self._compiled:
                return _apply(network, task, preprocessing, self._params, images)
            with _COMPILING:
                result = _apply(network, task, preprocessing, self._params, images)
                self._compiled.add(kind)
                memory.release_freed_memory()
        return result

    def _batches(
        self, images: Sequence[ImageLike], batch_size: int
    ) -> Iterator[tuple[list[Sample | UserError], int]]:
        """Yields batches of prepared images, with errors among them, and the rows to pad them to.

        Every batch has the same number of rows, so that the network is compiled once: `batch_size`
        or, if there are fewer images, the next power of 2. Threads prepare the next batch
        meanwhile. Without images, there is one empty batch.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: give 1 or more")
        rows = min(batch_size, 1 << max(0, len(images) - 1).bit_length())

        def attempt(index: int) -> Sample | UserError:
            try:
                return self.transform.from_image(images[index])
            except UserError as error:
                named = len(images) == 1 or isinstance(images[index], str | os.PathLike)
                return error if named else UserError(f"images[{index}]: {error}")

        with ThreadPoolExecutor() as pool:
            indices = range(len(images))
            following = [pool.submit(attempt, i) for i in indices[:rows]]
            for start in indices[::rows] or [0]:
                current = following
                following = [pool.submit(attempt, i) for i in indices[start + rows :][:rows]]
                yield [future.result() for future in current], rows

    def _padded(self, samples: Sequence[Sample], rows: int) -> np.ndarray:
        """Stacks prepared images to (rows, H, W, 3); missing ones are black."""
        batch = np.zeros((rows, *self.transform.output_size, 3), np.uint8)
        for i, sample in enumerate(samples):
            batch[i] = sample.image
        return batch

    def _check_head(self) -> None:
        if self._spec.head is None:
            raise UserError(f"{self._path} has no head, only features: extract_feat gives those")


def checked_indices(out_indices: Sequence[int] | None, architecture: Backbone) -> tuple[int, ...]:
    """Returns the indices of feature maps in the network's order; of the last one for None.

    Raises:
      UserError: there are none, or the network has no such map.
    """
    last = len(map_endpoints(architecture)) - 1
    chosen = (last,) if out_indices is None else tuple(out_indices)
    if not chosen or not set(chosen) <= set(range(last + 1)):
        raise UserError(f"out_indices={chosen}: give some of 0..{last}")
    return tuple(sorted(set(chosen)))


def _platform(images: np.ndarray | jax.Array) -> str | None:
    """Returns the platform on which a network is applied; None where it is traced for any."""
    if isinstance(images, jax.core.Tracer):
        return None
    if isinstance(images, jax.Array):
        return next(iter(images.devices())).platform
    return jax.default_backend()


@functools.partial(jax.jit, static_argnames=("network", "task", "preprocessing"))
def _apply(
    network: nn.Module, task: Task | None, preprocessing: Preprocessing, params: Any, images: Any
) -> Any:
    if images.dtype == jnp.uint8:
        images = preprocessing.normalize(images)

    def forward(images: jax.Array) -> Any:
        outputs = network.apply({"params": params}, images)
        return outputs if task is None else task.postprocess(outputs)

    return map_batch(forward, images)


def _check_normalized(images: np.ndarray | jax.Array, preprocessing: Preprocessing) -> None:
    """Refuses floats that are pixel values; values that are still traced are not looked at."""
    if isinstance(images, jax.core.Tracer) or not images.size:
        return
    lowest, highest = float(images.min()), float(images.max())
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
    low, high = ((0 - mean) / std).min(), ((255 - mean) / std).max()
    if lowest < low - _MARGIN or highest > high + _MARGIN:
        raise UserError(
            f"images are floats from {lowest:.4g} to {highest:.4g}, which look like pixels 0-255: "
            f"normalised ones lie in {low:.3g}..{high:.3g}. Give uint8, or normalise them first, "
            "with Preprocessing.normalize"
        )


def _or_raise(outcome: Any) -> Any:
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def list_images(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """Returns the images one by one.

    Args:
      images: an image (a path, an encoded file's bytes, a PIL image, or (H, W, 3) uint8 RGB
        pixels); a folder, which stands for all image files in it and in its subfolders, sorted,
        except for hidden ones; or any number of both.

    Raises:
      UserError: a folder cannot be read, or holds no image files.
    """
    if _is_one(images):
        return [images]
    if isinstance(images, str | os.PathLike):
        return _files(os.fspath(images))
    several: Iterable[Any] = images  # type: ignore[assignment] # mypy cannot subtract a TypeGuard
    return [image for item in several for image in list_images(item)]


def _is_one(images: ImageLike | Iterable[ImageLike]) -> TypeGuard[ImageLike]:
    """Returns whether this is one image (or no image at all, which `open_image` refuses)."""
    if isinstance(images, str | os.PathLike):
        return not os.path.isdir(images)
    # These types are iterable, too.
    return isinstance(images, bytes | Image.Image | np.ndarray | jax.Array) or not isinstance(
        images, Iterable
    )


def _files(folder: str) -> list[ImageLike]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    found: list[ImageLike] = []
    seen: set[str] = set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link leads back to it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(path, name)
            for name in sorted(names)
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not found:
        endings = ", ".join(EXTENSIONS)
        raise UserError(f"no image files in {folder} or below; looked for {endings}")
    return found


def init_model(checkpoint: str | os.PathLike[str], *, seed: int = 0) -> Predictor:
    """Opens a model for prediction.

    Args:
      checkpoint: a model directory, a training workdir or one of its checkpoints (WORKDIR:best,
        WORKDIR:last, WORKDIR:STEP); weights of another framework (`python -m convert --help`): a
        file, an https address, or a known name such as 'mmpretrain'; or the name of a variant
        (models/variants.py), such as 'mobilenet_v2_1.0_224', for a network with random weights. A
        file or folder comes before a name.
      seed: the seed of random weights.

    Raises:
      UserError: there is no model at `checkpoint`, or it cannot be read.
    """
    return Predictor(open_model(checkpoint, seed))


def open_model(checkpoint: str | os.PathLike[str], seed: int) -> SavedModel:
    """Reads a model, or makes a variant with random weights, which is announced.

    Args:
      checkpoint, seed: as `init_model` takes them.

    Raises:
      UserError: as `init_model`.
    """
    name = os.fspath(checkpoint)
    if os.path.exists(name):
        return model_dir.read(name)
    from mbv2_jax.convert import published  # here: convert/ imports model_dir

    if name in VARIANTS:
        processes.say(f"{name} has random weights, of seed {seed}; {published.suggest(name)}")
        return _random(name, seed)
    if published.looks_like_network(name):
        raise UserError(
            f"{name!r} names no model: {published.suggest(name)}. For random weights, "
            f"{nearest(_variant_like(name), VARIANTS)}"
        )
    return model_dir.read(name)


def _variant_like(name: str) -> str:
    """Returns the name that a variant would have which is named like a network of any port."""
    from mbv2_jax.convert import published  # here: convert/ imports model_dir

    if deep := re.search(r"[0-9]{3}d", name):  # timm's deeper ones
        return f"mobilenet_v2_{deep[0]}"
    with_size = re.search(r"[0-9]\.[0-9]+_[0-9]", name)
    return name if with_size else variants.name_of(published.width_in(name), 224)


def _random(name: str, seed: int) -> SavedModel:
    """Returns the variant `name` with random weights and ImageNet's classes."""
    variant = VARIANTS[name]
    head = tasks.settings("classification").Head(len(classes.IMAGENET_NAMES))
    spec = ModelSpec("classification", variant.backbone, head, variant.preprocessing)
    origin = {"kind": "random", "variant": name, "seed": seed}
    description = Description(spec, classes.IMAGENET_NAMES, origin)
    task = tasks.find(spec.task).for_model(head, classes.IMAGENET_NAMES)
    variables = init_variables(task.network(spec.backbone, spec.mode), jax.random.key(seed))
    return SavedModel(**variables, description=description, path=pathlib.Path(name))


@functools.partial(jax.jit, static_argnames="network")
def init_variables(network: nn.Module, key: jax.Array) -> Any:
    """Returns random {"params", "batch_stats"} of a network."""
    return network.init(key, jnp.zeros((1, 32, 32, 3)))  # parameters do not depend on the size


def inference_model(predictor: Predictor, image: ImageLike | Iterable[ImageLike]) -> Any:
    """Predicts one image; a classifier's result has mmpretrain's keys.

    Args:
      predictor: from init_model.
      image: a path, an encoded file's bytes, a PIL image, or (H, W, 3) uint8 RGB pixels; or
        several images, as `Predictor.predict` takes them.

    Returns:
      The prediction of the model's task. For classification: {"pred_label": int, "pred_class": str,
      "pred_score": float, "pred_scores": (classes,) float32}, where scores are probabilities. For
      segmentation: {"mask": (H, W) uint8, the class of each pixel of the picture, "classes": their
      names, the largest first, "areas": their shares of the picture}. For detection: {"boxes":
      (N, 4) float32, x0, y0, x1, y1 of each object in pixels of the picture, "scores": (N,)
      float32 from 0 to 1, the best first, "labels": (N,) int32, "classes": their names}. For a
      folder or several images, a list of predictions.

    Raises:
      UserError: as `Predictor.predict`.
    """
    results = predictor.predict(image)
    return results[0] if _is_one(image) else results
