"""Class activation maps: the parts of a photo that support a class.

Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) weighs the channels of a layer by
the mean gradient of the class's logit. Score-CAM (Wang et al. 2020,
https://arxiv.org/abs/1910.01279) needs no gradients: it weighs a channel by the logit of the photo
when only that channel's area is left of it. Both explain a given class, unlike Eigen-CAM, whose map
is the same for every class.
"""

import dataclasses
import functools
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tqdm
from flax import linen as nn
from PIL import Image, ImageDraw

from mbv2_jax import drawing, inference, model_dir
from mbv2_jax.data import classes, labels
from mbv2_jax.data.decoding import ImageLike
from mbv2_jax.errors import UserError, nearest
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.models import mobilenet_v2
from mbv2_jax.runtime import compilation_cache
from mbv2_jax.spec import ModelSpec
from mbv2_jax.tasks.task import Task
from mbv2_jax.training import evaluation

NAMES = {"grad": "Grad-CAM", "score": "Score-CAM"}
CHANNELS_AT_ONCE = 32  # masked photos that Score-CAM passes through the network together

# All in pixels.
SIDE = 320  # the longer side of a photo in its picture, at least
GAP = 8
TEXT = 56  # the height of the lines below


class Explained(NamedTuple):
    """The maps of a batch of N images.

    Attributes:
      heat: (N, H, W) float32 from 0 to 1, of the images' size; 0 everywhere where nothing
        supports the class.
      labels: (N,) integers, the classes that are explained.
      scores: (N,) float32, their probabilities.
    """

    heat: jax.Array
    labels: jax.Array
    scores: jax.Array


def cam(
    photos: Sequence[str],
    checkpoint: str | None,
    out: str = "cam",
    *,
    class_name: str | None = None,
    layer: str = "last",
    method: str = "grad",
) -> None:
    """Draws the class activation maps of photos, and prints a line for each.

    Args:
      photos: image files, and folders of them.
      checkpoint: anything that model_dir.read takes.
      out: the folder of the pictures; no file in it is overwritten.
      class_name: the class to explain, see `labels.find`; None explains the predicted one.
      layer: the layer whose map is used, see `endpoint`.
      method: "grad" or "score".

    Raises:
      UserError: an argument is wrong, the model has no classes, or some of the photos could not be
        read; the others were drawn.
    """
    if not photos:
        raise UserError("no image: give image files, or folders of them")
    if not checkpoint:
        raise UserError("--checkpoint=PATH is missing: the model whose maps to draw")
    images = [image for photo in photos for image in inference.list_images(photo)]
    compilation_cache.enable()
    explainer = Explainer(model_dir.read(checkpoint), layer, method)
    label = None if class_name is None else labels.find(class_name, explainer.task.classes)
    folder = pathlib.Path(out).expanduser()
    drawing.make_folder(folder, "--out", apart_from=photos)
    bad = 0
    for name in _with_bar([str(image) for image in images]):
        try:
            crop = explainer.prepare(name)
        except UserError as error:
            bad += 1
            tqdm.tqdm.write(f"error: {error}", file=sys.stderr)
            continue
        found = explainer(crop[None], label)
        text = f"{explainer.class_name(int(found.labels[0]))}  {float(found.scores[0]):.1%}"
        picture = draw(crop, np.asarray(found.heat[0]), text, explainer.caption)
        path = drawing.save(picture, folder, os.path.basename(name))
        tqdm.tqdm.write(f"{path}: {text}")
    if bad:
        raise UserError(f"{bad} of {len(images)} images could not be read")


class Explainer:
    """A classifier whose class activation maps are computed.

    Args:
      saved: from model_dir.read.
      layer: see `endpoint`.
      method: "grad" or "score".

    Attributes:
      task: the model's task.
      caption: the method and the layer, for a picture.

    Raises:
      UserError: the layer is unknown, or the model does not classify.
    """

    def __init__(self, saved: SavedModel, layer: str = "last", method: str = "grad"):
        check_classifier(saved, "class activation maps")
        spec = saved.spec
        self.task = saved.task()
        self._endpoint = endpoint(layer, spec)
        self.caption = f"{NAMES[method]} of {self._endpoint}"
        self._preprocessing = spec.preprocessing
        # Not folded: rounding in a folded kernel moves inputs of ReLU6 across its kinks, where the
        # gradient jumps, and the maps of early layers with it.
        self._variables = jax.device_put(saved.variables())
        transform = evaluation.eval_transform(spec.preprocessing)
        _check_map(self._endpoint, transform.output_size, spec)
        # Rematerialisation concerns training, and hides its blocks' values from `_split`.
        mode = dataclasses.replace(spec.mode, remat=False)
        self._explain = functools.partial(
            {"grad": grad_cam, "score": score_cam}[method],
            task=self.task,
            network=self.task.network(spec.backbone, mode),
            endpoint=self._endpoint,
        )

    def prepare(self, image: ImageLike) -> np.ndarray:
        """Returns an image as the network sees it: (H, W, 3) uint8 RGB, resized and cropped."""
        return self._preprocessing.prepare(image)

    def __call__(self, images: np.ndarray, label: int | None = None) -> Explained:
        """Returns the maps of prepared images.

        Args:
          images: (N, H, W, 3) uint8.
          label: the class to explain; None explains the predicted ones.
        """
        chosen = None if label is None else jnp.full(len(images), label)
        normalized = self._preprocessing.normalize(jnp.asarray(images))
        return self._explain(self._variables, normalized, chosen)

    def class_name(self, label: int) -> str:
        """Returns the name of a class, in English for ImageNet's ids."""
        return classes.english(self.task.classes[label])


def check_classifier(saved: SavedModel, purpose: str) -> None:
    """Raises UserError unless a model gives each image a class.

    Args:
      saved: the model.
      purpose: the thing that needs classes, for the message.
    """
    if saved.features_only:
        raise UserError(
            f"{saved.path} has no classifier, only features, and {purpose} need classes: train one "
            "on your data with --mode=train"
        )
    if not saved.task().classifies:
        raise UserError(
            f"{saved.path} is a model for {saved.spec.task!r}, which gives an image no class, and "
            f"{purpose} need classes"
        )


def endpoint(layer: str, spec: ModelSpec) -> str:
    """Returns the endpoint that a user names.

    Args:
      layer: an endpoint of `mobilenet_v2.feature_info`; "layer1" to "layer7" for a stage's last; or
        "last" for the last of the maps, which is layer7's where there is no last convolution.
      spec: the model's.

    Raises:
      UserError: there is no such endpoint.
    """
    maps = mobilenet_v2.map_endpoints(spec.backbone)
    stages = {name.partition("_")[0]: name for name in maps} | {"last": maps[-1]}
    known = list(mobilenet_v2.feature_info(spec.backbone))
    name = stages.get(layer, layer)
    if name not in known:
        options = ["stem", *stages, *known]
        raise UserError(f"there is no layer {layer!r}: {nearest(layer, dict.fromkeys(options))}")
    return name


def _check_map(endpoint: str, size: tuple[int, int], spec: ModelSpec) -> None:
    """Raises UserError where the map of images of a (height, width) has a single pixel."""
    known = mobilenet_v2.feature_info(spec.backbone)
    if max(size) > known[endpoint].reduction:
        return
    stages = reversed(mobilenet_v2.stage_endpoints(spec.backbone))
    larger = next((name for name in stages if max(size) > 2 * known[name].reduction), "stem")
    raise UserError(
        f"the map of {endpoint} is a single pixel for images of {size[1]} x {size[0]}: give an "
        f"earlier layer, such as --layer={larger.partition('_')[0]}"
    )


@functools.partial(jax.jit, static_argnames=("task", "network", "endpoint"))
def grad_cam(
    variables: Mapping[str, Any],
    images: jax.Array,
    labels: jax.Array | None,
    *,
    task: Task,
    network: nn.Module,
    endpoint: str,
) -> Explained:
    """Returns the Grad-CAM maps of normalised images.

    Args:
      variables: of the network.
      images: (N, H, W, 3), normalised.
      labels: (N,) the classes to explain; None explains the predicted ones.
      task, network, endpoint: static; the layer is an endpoint of the backbone.
    """
    features, rest = _split(network, variables, images, endpoint)  # (N, h, w, C)
    logits, pull_back = jax.vjp(lambda features: task.class_logits(rest(features)), features)
    labels = logits.argmax(-1) if labels is None else labels
    (gradients,) = pull_back(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))
    weights = gradients.mean((1, 2))  # (N, C)
    return _explained(features, weights, logits, labels, images)


@functools.partial(jax.jit, static_argnames=("task", "network", "endpoint"))
def score_cam(
    variables: Mapping[str, Any],
    images: jax.Array,
    labels: jax.Array | None,
    *,
    task: Task,
    network: nn.Module,
    endpoint: str,
) -> Explained:
    """Returns the Score-CAM maps of normalised images; the arguments are those of `grad_cam`.

    The masks are the channels' maps, each scaled to 0..1, upsampled as in the authors' code. The
    weights are the softmax over channels of the logits of the masked images (Equation 9).
    """
    features, rest = _split(network, variables, images, endpoint)
    logits = task.class_logits(rest(features))
    labels = logits.argmax(-1) if labels is None else labels

    at_once = math.gcd(features.shape[-1], CHANNELS_AT_ONCE)

    def weigh(image: jax.Array, maps: jax.Array, label: jax.Array) -> jax.Array:
        def logits_of(channels: jax.Array) -> jax.Array:  # (n, h, w) -> (n,)
            masks = _scale(_resize(channels, image.shape[:2]))
            outputs = network.apply(variables, image * masks[..., None])
            return task.class_logits(outputs)[:, label]

        channels = maps.transpose(2, 0, 1)  # (C, h, w)
        parts = channels.reshape(-1, at_once, *channels.shape[1:])
        return jax.nn.softmax(jax.lax.map(logits_of, parts).ravel())

    weights = jax.lax.map(lambda example: weigh(*example), (images, features, labels))
    return _explained(features, weights, logits, labels, images)


def _split(
    network: nn.Module, variables: Mapping[str, Any], images: jax.Array, endpoint: str
) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Splits a network at an endpoint of its backbone.

    The endpoints are the outputs of the modules of the same path, which is true of any network that
    contains the backbone.

    Returns:
      The endpoint's map of the images, (N, h, w, C); and the rest of the network, a function from
      such a map to the network's outputs.

    Raises:
      UserError: the network does not compute the endpoint.
    """
    seen: list[jax.Array] = []

    def run(replacement: jax.Array | None) -> Any:
        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            result = call(*args, **kwargs)
            if context.module.path != tuple(endpoint.split("/")):
                return result
            features, *others = result if isinstance(result, tuple) else (result,)
            if replacement is None:
                seen.append(features)
            else:
                features = replacement
            return (features, *others) if others else features

        with nn.intercept_methods(intercept):
            return network.apply(variables, images)

    run(None)
    if not seen:
        raise UserError(f"the model's network does not compute the layer {endpoint!r}")
    return seen[0], run


def _explained(
    features: jax.Array,
    weights: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    images: jax.Array,
) -> Explained:
    """Returns the maps of channels (N, h, w, C) with weights (N, C)."""
    heat = jax.nn.relu(jnp.einsum("nhwc,nc->nhw", features, weights))
    scores = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=-1)[:, 0]
    return Explained(_scale(_resize(heat, images.shape[1:3])), labels, scores)


def _resize(maps: jax.Array, size: Sequence[int]) -> jax.Array:
    """Returns maps (N, h, w) at (height, width) by bilinear interpolation, as OpenCV does."""
    shape = (maps.shape[0], *size)
    return jax.image.resize(maps, shape, "bilinear", antialias=False)


def _scale(maps: jax.Array) -> jax.Array:
    """Returns maps (N, H, W) moved and scaled to 0..1; constant ones become 0."""
    low, high = (bound(maps, axis=(1, 2), keepdims=True) for bound in (jnp.min, jnp.max))
    spread = high - low
    return jnp.where(spread > 0, (maps - low) / jnp.where(spread > 0, spread, 1), 0)


def draw(photo: np.ndarray, heat: np.ndarray, text: str, caption: str) -> Image.Image:
    """Draws a photo, and beside it the same with its map over it.

    Args:
      photo: (H, W, 3) uint8, the crop that the network sees; enlarged to a side of at least 320.
      heat: (H, W) from 0, blue, to 1, red.
      text: a line below, with the class.
      caption: a second line.
    """
    height, width = photo.shape[:2]
    factor = max(1.0, SIDE / max(height, width))
    size = (round(width * factor), round(height * factor))
    filter_ = Image.Resampling.NEAREST if factor >= 4 else Image.Resampling.LANCZOS
    colours = matplotlib.colormaps["turbo"](heat)[..., :3]  # (H, W, 3), 0..1
    mixed = np.uint8(0.5 * photo + 127.5 * colours + 0.5)
    picture = Image.new("RGB", (2 * size[0] + GAP, size[1] + TEXT), drawing.BACKGROUND)
    for number, pixels in enumerate((photo, mixed)):
        shown = Image.fromarray(pixels).resize(size, filter_)
        picture.paste(shown, (number * (size[0] + GAP), 0))
    ink = ImageDraw.Draw(picture)
    drawing.write(ink, (GAP, size[1] + 6), text, picture.width - 2 * GAP)
    drawing.write(ink, (GAP, size[1] + 30), caption, picture.width - 2 * GAP, drawing.FAINT)
    return picture


def _with_bar(names: Sequence[str]) -> Iterator[str]:
    hidden = not sys.stderr.isatty() or len(names) == 1
    return iter(tqdm.tqdm(names, unit="image", disable=hidden))
