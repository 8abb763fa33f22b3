"""A trained model for use: pixels in, named predictions out."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mbv2_jax import model_dir
from mbv2_jax.data import transforms
from mbv2_jax.errors import UserError

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


class Classifier:
    """A model with its preprocessing and class names, compiled once for each batch shape.

    Args:
      saved: from model_dir.read.

    Attributes:
      class_names: in the order of the logits.
      transform: what turns an image of any size into the network's input.
    """

    def __init__(self, saved: model_dir.SavedModel):
        self.class_names = saved.class_names
        self.transform = transforms.make_transform(
            saved.field("data.eval_transforms"), saved.field("data.image_size")
        )
        self._mean = np.asarray(saved.field("data.mean"), np.float32)
        self._std = np.asarray(saved.field("data.std"), np.float32)
        self._variables = {"params": saved.params, "batch_stats": saved.batch_stats}
        self._apply = jax.jit(saved.module().apply)

    def __call__(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Returns the logits of images that have the network's size already.

        Args:
          images: (N, H, W, 3) RGB; uint8 are pixels and are normalised here, floats are taken as
            normalised. Nothing is resized.

        Returns:
          (N, classes) float32.

        Raises:
          UserError: another shape or dtype; channels first (N, 3, H, W) is named as such.
        """
        shape = tuple(images.shape)
        if len(shape) == 4 and shape[-1] != 3 and shape[1] == 3:
            raise UserError(f"images are (N, 3, H, W) = {shape}: give (N, H, W, 3)")
        if len(shape) != 4 or shape[-1] != 3:
            raise UserError(f"images have the shape {shape}: give (N, H, W, 3)")
        if images.dtype == np.uint8:
            images = (jnp.asarray(images, jnp.float32) - self._mean) / self._std
        elif not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"images are {images.dtype}: give uint8 pixels, or normalised floats")
        return self._apply(self._variables, images)

    def prepare(self, image: ImageLike) -> np.ndarray:
        """Returns an image as the network's input: (H, W, 3) uint8 RGB.

        Args:
          image: a path, an encoded file's bytes, a PIL image, or (H, W, 3) uint8 RGB pixels.

        Raises:
          UserError: it cannot be read or decoded, or is none of these.
        """
        if isinstance(image, (str, os.PathLike)):
            try:
                return self.prepare(pathlib.Path(image).read_bytes())
            except OSError as error:
                raise UserError(f"{image}: {error.strerror}") from None
            except UserError as error:
                raise UserError(f"{image}: {error}") from None
        if isinstance(image, bytes):
            image = transforms.decode(image)
        elif isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
                raise UserError(
                    f"an image is {image.dtype} {image.shape}: give uint8 (H, W, 3), or a path"
                )
            image = Image.fromarray(image)
        elif isinstance(image, Image.Image):
            image = transforms.upright_rgb(image)
        else:
            raise UserError(
                f"an image is a {type(image).__name__}: give a path, bytes, a PIL image or an array"
            )
        # No operation of an evaluation transform draws from the generator.
        return self.transform(image, np.random.default_rng(0))


def init_model(checkpoint: str | os.PathLike[str]) -> Classifier:
    """Opens a model for prediction.

    Args:
      checkpoint: a model directory or a training workdir.

    Raises:
      UserError: there is no model at `checkpoint`.
    """
    return Classifier(model_dir.read(checkpoint))


def inference_model(classifier: Classifier, image: ImageLike) -> dict[str, Any]:
    """Predicts one image; the result has mmpretrain's keys.

    Args:
      classifier: from init_model.
      image: whatever Classifier.prepare takes.

    Returns:
      {"pred_label": int, "pred_class": str, "pred_score": float, "pred_scores": (classes,)
      float32}; scores are probabilities.
    """
    logits = classifier(classifier.prepare(image)[None])
    scores = np.asarray(jax.nn.softmax(logits[0]))
    label = int(scores.argmax())
    return {
        "pred_label": label,
        "pred_class": classifier.class_names[label],
        "pred_score": float(scores[label]),
        "pred_scores": scores,
    }
