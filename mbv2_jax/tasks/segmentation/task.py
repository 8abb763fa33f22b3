"""Semantic segmentation as training, evaluation and prediction see it."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mbv2_jax import drawing
from mbv2_jax.data import labels
from mbv2_jax.data.sample import IGNORED, ArraySpec, Frame, Sample
from mbv2_jax.data.sources import Source
from mbv2_jax.errors import UserError
from mbv2_jax.models import deeplabv3
from mbv2_jax.models.deeplabv3 import DeepLabV3
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.ops.resize import resize_bilinear
from mbv2_jax.spec import Backbone, TrainingMode
from mbv2_jax.tasks import classes as classes_lib
from mbv2_jax.tasks.segmentation import masks, scores
from mbv2_jax.tasks.segmentation.palette import colours
from mbv2_jax.tasks.segmentation.settings import Head, Settings
from mbv2_jax.tasks.task import Aligned, Batch, Chance, Summary, Task, Transferred

if TYPE_CHECKING:  # model_dir finds tasks
    from mbv2_jax.model_dir import SavedModel

# The scales of --tta, each with its mirror image: those of the paper's "MF" (TensorFlow's deeplab,
# g3doc/pascal.md). The first is the image itself, to whose size the others' logits are resized.
SCALES = (1.0, 0.5, 0.75, 1.25, 1.5, 1.75)


@dataclasses.dataclass(frozen=True)
class Segmentation(Task):
    """A class for each pixel of an image.

    Attributes:
      settings: label smoothing and class weights, for training.
    """

    settings: Settings = dataclasses.field(default_factory=Settings)

    Head: ClassVar[type] = Head
    Settings: ClassVar[type] = Settings
    figures: ClassVar[tuple[str, ...]] = ("mIoU", "pixel_accuracy")
    labels: ClassVar[Mapping[str, str]] = {
        "loss": "loss (nats)",
        "mIoU": "mean IoU (%)",
        "pixel_accuracy": "pixel accuracy (%)",
    }
    columns: ClassVar[tuple[str, ...]] = ("share", "label", "class")
    target: ClassVar[str] = masks.MASK
    image_of: ClassVar[str] = "mask"
    agree_on: ClassVar[str] = "pixels"
    open_head: ClassVar[str] = (
        "model.num_classes is not set, and no data is opened to count the classes: give "
        "--config.model.num_classes=21, say"
    )

    @classmethod
    def for_training(cls, settings: Mapping[str, Any], source: Source | None) -> "Segmentation":
        """Returns the task of a config; the data decides the number of classes if it is unset."""
        names = () if source is None else tuple(source.class_names)
        count = classes_lib.count(settings, source)
        if source is not None:
            masks.check(source)
        weights = settings["class_weights"]
        if weights and not any(weights):
            raise UserError(
                "class_weights are all 0, and nothing would be learned: give some above 0"
            )
        if weights and count is not None and len(weights) != count:
            raise UserError(
                f"class_weights holds {len(weights)} numbers, and there are {count} classes: give "
                "one for each, in the order of the classes, or ()"
            )
        head = None
        if count is not None:
            head = Head(count, settings["model.aspp_rates"], settings["model.align_corners"])
        fields = [field.name for field in dataclasses.fields(Settings)]
        return cls(head, names, Settings(**{name: settings[name] for name in fields}))

    @classmethod
    def split_fault(cls, train: Source, evaluation: Source) -> str:
        """Returns "" if both splits have the same classes in the same order."""
        return classes_lib.split_fault(train, evaluation)

    def network(
        self, backbone: Backbone, mode: TrainingMode, *, folded: bool = False
    ) -> DeepLabV3 | MobileNetV2:
        """Returns the network: logits (N, H, W, classes); feature maps where there is no head."""
        if self.head is None:
            fields = dataclasses.asdict(backbone) | dataclasses.asdict(mode)
            fields["dtype"] = jnp.dtype(mode.dtype)
            return MobileNetV2(num_classes=None, folded=folded, **fields)
        return DeepLabV3(
            **dataclasses.asdict(self.head), architecture=backbone, mode=mode, folded=folded
        )

    def backbone(self, described: Backbone) -> Backbone:
        """Returns the backbone without its last convolution: the head is on layer7."""
        return dataclasses.replace(described, last_convolution=False)

    def fold(
        self, params: Mapping[str, Any], batch_stats: Mapping[str, Any], backbone: Backbone
    ) -> dict[str, Any]:
        """Returns the parameters of the folded network; the head has an epsilon of its own."""
        return deeplabv3.fold(params, batch_stats, backbone.bn_epsilon)

    def batch_spec(self, size: tuple[int, int]) -> dict[str, ArraySpec]:
        """Returns {"image": (H, W, 3) uint8, "labels": (H, W) uint8}."""
        return {"image": ArraySpec((*size, 3), np.uint8), "labels": ArraySpec(size, np.uint8)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Returns {"image": (N, H, W, 3) uint8, "labels": (N, H, W) uint8}."""
        found = [masks.of(sample) for sample in samples]
        for sample, mask in zip(samples, found, strict=True):
            if fault := masks.fault(mask, self.head.num_classes):
                raise UserError(f"{sample.id}: {fault}")
        return {"image": np.stack([sample.image for sample in samples]), "labels": np.stack(found)}

    def loss(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean cross entropy of the counted pixels, and "pixel_accuracy"."""
        truth, settings = batch["labels"], self.settings
        loss = scores.mean_cross_entropy(
            outputs, truth, settings.label_smoothing, settings.class_weights
        )
        right = (outputs.argmax(-1) == truth).sum()
        accuracy = 100.0 * right / jnp.maximum(1, scores.counted(truth).sum())
        return loss, {"pixel_accuracy": accuracy}

    def evaluate(
        self, outputs: jax.Array, batch: Batch
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns "confusion", "loss" and "pixels" of the batch, and figures of each example."""
        truth = jnp.where(batch["mask"][:, None, None], batch["labels"], IGNORED)
        predicted = outputs.argmax(-1)
        losses = scores.cross_entropy(outputs, truth).sum((1, 2))
        pixels = scores.counted(truth).sum((1, 2), dtype=jnp.int32)
        right = (predicted == truth).sum((1, 2), dtype=jnp.int32)
        sums = {
            "confusion": scores.confusion(truth, predicted, self.head.num_classes),
            "loss": losses.sum(),
            "pixels": pixels.sum(),
        }
        return sums, {"loss": losses / jnp.maximum(1, pixels), "right": right, "pixels": pixels}

    def views(self, images: jax.Array) -> Sequence[jax.Array]:
        """Returns the images at each of SCALES, each followed by its mirror image."""
        found = []
        for scale in SCALES:
            size = [_scaled(side, scale, self.head.align_corners) for side in images.shape[1:3]]
            view = resize_bilinear(images, size, align_corners=self.head.align_corners)
            found += [view, view[:, :, ::-1]]
        return found

    def merge(self, outputs: Sequence[jax.Array]) -> jax.Array:
        """Averages the probabilities of all views; returns their logarithms.

        The logits of a view are resized to the image, not their probabilities: as in TensorFlow's
        deeplab.
        """
        size = outputs[0].shape[1:3]

        def placed(number: int, logits: jax.Array) -> jax.Array:
            upright = logits[:, :, ::-1] if number % 2 else logits
            resized = resize_bilinear(upright, size, align_corners=self.head.align_corners)
            # Logarithms, in which no probability is too small to be a number.
            return jax.nn.log_softmax(resized)

        found = (placed(number, logits) for number, logits in enumerate(outputs))
        return functools.reduce(jnp.logaddexp, found) - math.log(len(outputs))

    def postprocess(self, outputs: jax.Array) -> dict[str, jax.Array]:
        """Returns {"mask": (N, H, W) uint8, "finite": (N,) bool}."""
        finite = jnp.isfinite(outputs).all((1, 2, 3))
        return {"mask": outputs.argmax(-1).astype(jnp.uint8), "finite": finite}

    def exported(self, outputs: jax.Array) -> dict[str, jax.Array]:
        """Returns {"logits": (N, H, W, classes)}."""
        return {"logits": outputs}

    def from_exported(
        self, arrays: Mapping[str, jax.Array], size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """Returns {"mask", "finite"} as `postprocess` does."""
        del size
        return self.postprocess(arrays["logits"])

    def decoding(self) -> dict[str, Any]:
        """Returns {"palette": VOC's colour of each class}."""
        return {"palette": colours(self.head.num_classes).tolist()}

    def summarize(
        self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], source: Source
    ) -> Summary:
        """Returns {"mIoU", "pixel_accuracy", "loss", "examples"}, and a table of the classes."""
        del rows, source
        return Summary(scores.summarize(sums), scores.table(sums["confusion"], self.classes))

    def chance(self, sums: Mapping[str, np.ndarray]) -> Chance | None:
        """Returns the mIoU of always naming the largest class; None where there is only one."""
        pixels = np.asarray(sums["confusion"]).sum(1)
        if np.count_nonzero(pixels) < 2:
            return None
        value, error = scores.chance(pixels, int(sums["examples"]))
        return Chance("mIoU", value, 2 * error, "by always naming the largest class")

    def record(self, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Returns {"pixels", "pixel_accuracy" (percent), "loss"}."""
        pixels = int(row["pixels"])
        return {
            "pixels": pixels,
            "pixel_accuracy": 100 * int(row["right"]) / max(1, pixels),
            "loss": float(row["loss"]),
        }

    def decode(
        self, outputs: Mapping[str, np.ndarray], frames: Sequence[Frame]
    ) -> list[dict[str, Any]]:
        """Returns {"mask": (H, W) uint8, "classes", "areas"} of each picture, at its size.

        "classes" are the names of the classes in the mask, the largest first, and "areas" their
        shares of the picture.
        """
        if not outputs["finite"][: len(frames)].all():
            raise ValueError("the model's logits are not numbers (NaN)")
        pairs = zip(outputs["mask"], frames, strict=False)
        return [self._prediction(masks.in_picture(mask, frame)) for mask, frame in pairs]

    def agreement(
        self, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
    ) -> tuple[int, int]:
        """Returns the number of pixels of the same class, and of all."""
        same = ours["mask"] == theirs["mask"]
        return int(same.sum()), same.size

    def entries(self, prediction: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
        """Returns {"share", "label", "class"} of the largest classes."""
        return [
            {"share": share, "label": label, "class": self.classes[label]}
            for label, share in masks.shares(prediction["mask"])[:limit]
        ]

    def draw(self, picture: Image.Image, prediction: Mapping[str, Any], limit: int) -> Image.Image:
        """Returns the picture under its mask, with a legend of the largest classes."""
        entries = self.entries(prediction, limit)
        found = [(entry["class"], entry["label"], entry["share"]) for entry in entries]
        return drawing.overlay(picture, prediction["mask"], colours(), found)

    def to_image(self, prediction: Mapping[str, Any]) -> Image.Image:
        """Returns the mask as an image of mode "P" with VOC's palette."""
        return masks.to_image(prediction["mask"])

    def transfer(self, saved: "SavedModel", fresh: Mapping[str, Any]) -> Transferred:
        """Keeps a saved model's logits only where its classes are this task's."""
        params, why = dict(saved.params), ""
        if "logits" in params and not labels.same(self.classes, saved.classes):
            del params["logits"]
            why = f": its {len(saved.classes)} classes are not these {self.head.num_classes}"
        kept = super().transfer(dataclasses.replace(saved, params=params), fresh)
        head = [name for name in fresh["params"] if deeplabv3.is_of_head(name)]
        new = [name for name in head if kept.variables["params"][name] is fresh["params"][name]]
        if not new:
            note = ", head included"
        elif new == head:
            note = " with a new head"
        else:
            note = f" with new weights of {', '.join(new)}{why}"
        return kept._replace(note=f"starting from {saved.path}{note}")

    def align(self, source: Source, data: str, model: str) -> Aligned:
        """Returns the split with the model's labels: see `data.labels.match`."""
        found, note = labels.match(source.class_names, self.classes, data=data, model=model)
        if found == tuple(range(len(source.class_names))):
            return Aligned(source, found, note)
        return Aligned(masks.Relabelled(source, found, self.classes), found, note)

    def unlike_published(self, aligned: Aligned) -> str:
        """Returns why a split is not VOC's; "" if its classes are all of the model's."""
        found = len(set(aligned.found))
        if found != len(self.classes):
            return f"they are for {len(self.classes)} classes, and the data has {found} of them"
        return ""

    def _prediction(self, mask: np.ndarray) -> dict[str, Any]:
        found = masks.shares(mask)
        return {
            "mask": mask,
            "classes": [self.classes[label] for label, _ in found],
            "areas": [share for _, share in found],
        }


def _scaled(side: int, scale: float, align_corners: bool) -> int:
    """Returns a scaled side; with aligned corners, the distance of the corner pixels is scaled."""
    return int((side - 1) * scale + 1) if align_corners else round(side * scale)
