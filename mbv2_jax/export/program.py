"""The function that is exported: a batch of images in, named arrays out."""

import copy
import dataclasses
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from mbv2_jax.data.decoding import ImageLike
from mbv2_jax.errors import UserError
from mbv2_jax.export.formats import INPUTS
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.ops import lowering
from mbv2_jax.spec import INT8
from mbv2_jax.tasks.task import Task

# The kinds of images that a file takes, by the values of --input.
UINT8, FLOAT32, NORMALISED = INPUTS


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model as a function of a batch of images, for inference alone.

    Batch normalisations are folded into the convolutions.

    Attributes:
      saved: the model.
      batch: the number of images; None leaves it to the caller of the file.
      input: "uint8" or "float32" pixels from 0 to 255, which are normalised inside, or "normalised"
        float32.
    """

    saved: SavedModel
    batch: int | None = None
    input: str = UINT8

    def __post_init__(self) -> None:
        if self.saved.features_only:
            raise UserError(
                f"{self.saved.path} has no head, only features: train a head, or export a model "
                "that has one"
            )
        task = self.saved.task()
        if type(task).exported is Task.exported:
            raise UserError(
                f"{self.saved.path} is a model of {self.saved.spec.task}, which is not exported: "
                "give that class the members exported, from_exported and agreement of Task"
            )
        params = task.fold(self.saved.params, self.saved.batch_stats, self.saved.spec.backbone)
        object.__setattr__(self, "task", task)
        object.__setattr__(self, "params", params)

    task: Task = dataclasses.field(init=False)
    params: dict[str, Any] = dataclasses.field(init=False)

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of the images, in pixels."""
        return self.saved.spec.preprocessing.transform.output_size

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the images."""
        return np.dtype(np.uint8 if self.input == UINT8 else np.float32)

    @property
    def trained_in_8_bits(self) -> bool:
        """The network has the ranges of its activations, see `models.layers.Rounding`."""
        return self.saved.spec.mode.quantize == INT8

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Returns the arrays of `Task.exported` for images, (N, H, W, 3) of `dtype`.

        A program that is traced in `lowering.plain_lowering()` has XLA's own convolutions alone.
        """
        if self.input != NORMALISED:
            images = self.saved.spec.preprocessing.normalize(images)
        return self.of_normalised(images)

    def of_normalised(self, images: jax.Array) -> dict[str, jax.Array]:
        """Returns the arrays of `Task.exported` for normalised images, (N, H, W, 3) float32."""
        network = self.saved.module(folded=True)
        outputs = network.apply({"params": self.params}, images.astype(jnp.float32))
        return self.task.exported(outputs)

    def with_params(self, params: dict[str, Any]) -> "Program":
        """Returns the same program with other parameters, of the shapes of `params`."""
        changed = copy.copy(self)  # dataclasses.replace would fold the network again
        object.__setattr__(changed, "params", params)
        return changed

    def prepare(self, image: ImageLike) -> np.ndarray:
        """Returns an image of any size as pixels, (H, W, 3) uint8: resized and cropped."""
        return self.saved.spec.preprocessing.prepare(image)

    def example(self, batch: int | None = None) -> jax.ShapeDtypeStruct:
        """Returns the shape and the dtype of a batch: of `batch` images, else of the program's."""
        return jax.ShapeDtypeStruct((batch or self.batch or 1, *self.size, 3), self.dtype)

    def jaxpr(self, batch: int = 1) -> jax.extend.core.ClosedJaxpr:
        """Returns the program for a batch, of XLA's own operations and of composites."""
        with lowering.plain_lowering(composites=True):
            return jax.make_jaxpr(self)(self.example(batch))

    def outputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the arrays for a batch, by name."""
        with lowering.plain_lowering():  # the shapes are the same, and found in half the time
            return jax.eval_shape(self, self.example(batch))


def resized(saved: SavedModel, size: tuple[int, int]) -> SavedModel:
    """Returns a model for images of another size, with evaluation transforms that make them.

    Args:
      saved: the model.
      size: (height, width) in pixels. Other than squares have no crop: the whole picture is
        resized.
    """
    preprocessing = saved.spec.preprocessing
    changed = dataclasses.replace(preprocessing, image_size=size[0])
    if changed.transform.output_size != size:
        changed = dataclasses.replace(changed, eval_transforms=f"resize({size})")
    return saved.with_spec(dataclasses.replace(saved.spec, preprocessing=changed))
