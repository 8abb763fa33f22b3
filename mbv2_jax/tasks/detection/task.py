"""Object detection as training, evaluation and prediction see it."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mbv2_jax import drawing
from mbv2_jax.data import labels
from mbv2_jax.data.sample import ArraySpec, Frame, Sample
from mbv2_jax.data.sources import Source
from mbv2_jax.errors import UserError, nearest
from mbv2_jax.models import ssdlite
from mbv2_jax.models.mobilenet_v2 import MobileNetV2, feature_info
from mbv2_jax.models.ssdlite import Outputs, SSDLite
from mbv2_jax.spec import Backbone, TrainingMode
from mbv2_jax.tasks import classes as classes_lib
from mbv2_jax.tasks.detection import coding, losses, nms, objects
from mbv2_jax.tasks.detection.anchors import AnchorTable
from mbv2_jax.tasks.detection.losses import Losses, Mining
from mbv2_jax.tasks.detection.nms import Detections
from mbv2_jax.tasks.detection.settings import Head, Settings
from mbv2_jax.tasks.task import Aligned, Batch, Summary, Task, Transferred

if TYPE_CHECKING:  # model_dir finds tasks
    from mbv2_jax.model_dir import SavedModel

COCO_CLASSES = 80
SURE = 0.3  # the score of an object that two models should both find


@dataclasses.dataclass(frozen=True)
class Detection(Task):
    """The boxes and classes of the objects in an image.

    Attributes:
      settings: the negatives in the loss, for training.
    """

    settings: Settings = dataclasses.field(default_factory=Settings)

    Head: ClassVar[type] = Head
    Settings: ClassVar[type] = Settings
    figures: ClassVar[tuple[str, ...]] = ("mAP", "mAP50", "mAP75")
    labels: ClassVar[Mapping[str, str]] = {
        "loss": "loss",
        "mAP": "mAP, IoU 0.5 to 0.95 (%)",
        "mAP50": "mAP at IoU 0.5 (%)",
        "mAP75": "mAP at IoU 0.75 (%)",
    }
    columns: ClassVar[tuple[str, ...]] = ("score", *objects.CORNERS, "label", "class")
    target: ClassVar[str] = objects.BOXES
    finds_objects: ClassVar[bool] = True
    agree_on: ClassVar[str] = "boxes"
    needs_rows: ClassVar[bool] = True
    open_head: ClassVar[str] = (
        "model.num_classes is not set, and no data is opened to count the classes: give "
        "--config.model.num_classes=80, say"
    )

    @classmethod
    def for_training(cls, settings: Mapping[str, Any], source: Source | None) -> "Detection":
        """Returns the task of a config; the data decides the number of classes if it is unset."""
        if source is not None:
            objects.check_room(objects.check(source), settings["model.max_boxes"])
        count = classes_lib.count(settings, source)
        head = None
        if count is not None:
            names = [field.name for field in dataclasses.fields(Head)]
            values = {name: settings[f"model.{name}"] for name in names}
            head = Head(**values | {"num_classes": count})
        fields = [field.name for field in dataclasses.fields(Settings)]
        return cls(
            head,
            () if source is None else tuple(source.class_names),
            Settings(**{name: settings[name] for name in fields}),
        )

    @classmethod
    def split_fault(cls, train: Source, evaluation: Source) -> str:
        """Returns "" if both splits have the same classes in the same order."""
        return classes_lib.split_fault(train, evaluation)

    @classmethod
    def select(cls, settings: Mapping[str, Any], source: Source) -> Source:
        """Returns the images with objects that are not tiny, if `skip_empty` is set."""
        found = objects.check(source)
        return found.without_empty(settings["smallest_side"]) if settings["skip_empty"] else source

    def network(
        self, backbone: Backbone, mode: TrainingMode, *, folded: bool = False
    ) -> SSDLite | MobileNetV2:
        """Returns the network: `Outputs`; feature maps where there is no head.

        Raises:
          UserError: the head's fields do not fit each other, or the backbone.
        """
        if self.head is None:
            fields = dataclasses.asdict(backbone) | dataclasses.asdict(mode)
            fields["dtype"] = jnp.dtype(mode.dtype)
            return MobileNetV2(num_classes=None, folded=folded, **fields)
        _check_maps(self.head, backbone)
        return SSDLite(
            num_classes=self.head.num_classes,
            anchors=AnchorTable(self.head.anchors, self.head.anchor_sizes),
            taps=self.head.taps,
            extra_channels=self.head.extra_channels,
            architecture=backbone,
            mode=mode,
            folded=folded,
            head=self.head,
        )

    def batch_spec(self, size: tuple[int, int]) -> dict[str, ArraySpec]:
        """Returns "image", the objects to train on, and the place of the image in its picture.

        "image" is (H, W, 3) uint8, "boxes" (max_boxes, 4) float32 in the image's pixels, "labels"
        (max_boxes,) int32, below 0 for padding, and "frame" (6,) float32, see `objects.frame_row`.
        """
        room = self.head.max_boxes
        return {
            "image": ArraySpec((*size, 3), np.uint8),
            "boxes": ArraySpec((room, 4), np.float32),
            "labels": ArraySpec((room,), np.int32),
            "frame": ArraySpec((6,), np.float32),
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Returns the arrays of `batch_spec`; crowds and difficult objects are left out."""
        found = objects.padded(samples, self.head.max_boxes, self.head.num_classes)
        images = np.stack([sample.image for sample in samples])
        frames = [objects.frame_row(s.frame) for s in samples if s.frame]  # a transform sets it
        return {"image": images, **found, "frame": np.stack(frames)}

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of classes and boxes over the batch's positives, and both apart."""
        mining = Mining(self.settings.negative_ratio, self.settings.min_negatives)
        found = self._losses(outputs, batch, mining)
        count = found.positives.sum().astype(found.classes.dtype)
        classes, boxes = found.classes.sum() / count, found.boxes.sum() / count
        return classes + boxes, {"class_loss": classes, "box_loss": boxes}

    def evaluate(
        self, outputs: Outputs, batch: Batch
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns "loss" and "positives" of the batch, and the detections of each example.

        The loss has SSD's mining, whatever the training's is, so that models compare.
        """
        found = self._losses(outputs, batch, Mining())
        mask = batch["mask"]
        sums = {
            "loss": jnp.where(mask, found.classes + found.boxes, 0).sum(),
            "positives": jnp.where(mask, found.positives, 0).sum(dtype=jnp.int32),
        }
        return sums, self.postprocess(outputs) | {"frame": batch["frame"]}

    def views(self, images: jax.Array) -> Sequence[jax.Array]:
        """Returns the images and their mirror images."""
        return images, images[:, :, ::-1]

    def merge(self, outputs: Sequence[Outputs]) -> Outputs:
        """Returns the outputs for both views with the anchors of both, the mirror image's back."""
        upright, mirrored = outputs
        width = mirrored.size[:, None, 1:]  # (N, 1, 1)

        def back(anchors: jax.Array) -> jax.Array:
            x0, y0, x1, y1 = jnp.split(anchors, 4, -1)
            return jnp.concatenate([width - x1, y0, width - x0, y1], -1)

        codes = tuple(part * jnp.array([-1, 1, 1, 1], part.dtype) for part in mirrored.codes)
        restored = mirrored._replace(codes=codes, anchors=tuple(map(back, mirrored.anchors)))
        logits, codes, anchors = (
            tuple(jnp.concatenate(pair, 1) for pair in zip(ours, theirs, strict=True))
            for ours, theirs in zip(upright[:3], restored[:3], strict=True)
        )
        return Outputs(logits, codes, anchors, upright.size)

    def postprocess(self, outputs: Outputs) -> dict[str, jax.Array]:
        """Chooses the detections of N images, at most D of each, the best first.

        Returns:
          {"boxes": (N, D, 4), x0, y0, x1, y1 in pixels of the network's image, "scores": (N, D),
          "labels": (N, D) int32, below 0 where there is no detection, "size": (N, 2), height and
          width of the image, "finite": (N,) bool}.
        """
        finite = [jnp.isfinite(part).all((1, 2)) for part in (*outputs.logits, *outputs.codes)]
        boxes, scores = self._decoded(outputs)
        choose = partial(self._chosen, candidates=self.head.candidates)
        found = jax.vmap(choose)(boxes, scores, outputs.size)
        return {**found._asdict(), "size": outputs.size, "finite": jnp.stack(finite).all(0)}

    def exported(self, outputs: Outputs) -> dict[str, jax.Array]:
        """Returns {"boxes": (N, A, 4), "scores": (N, A, classes)} of all anchors.

        Boxes are x0, y0, x1, y1 in pixels of the network's image; they may reach beyond it.
        """
        boxes, scores = self._decoded(outputs)
        return {"boxes": jnp.concatenate(boxes, 1), "scores": jnp.concatenate(scores, 1)}

    def from_exported(
        self, arrays: Mapping[str, jax.Array], size: tuple[int, int]
    ) -> dict[str, jax.Array]:
        """Returns what `postprocess` does, with the candidates of all maps together."""
        boxes, scores = jnp.asarray(arrays["boxes"]), jnp.asarray(arrays["scores"])
        sizes = jnp.broadcast_to(jnp.asarray(size, boxes.dtype), (len(boxes), 2))
        finite = jnp.isfinite(boxes).all((1, 2)) & jnp.isfinite(scores).all((1, 2))
        choose = partial(self._chosen, candidates=self._all_candidates)
        found = jax.vmap(choose)([boxes], [scores], sizes)
        return {**found._asdict(), "size": sizes, "finite": finite}

    def decoding(self) -> dict[str, Any]:
        """Returns the rules by which `from_exported` chooses detections, and the palette.

        They are {"score_threshold", "nms_iou", "clip_first", "candidates" (of all maps together),
        "max_detections", "palette"}.
        """
        head = self.head
        return {
            "score_threshold": head.score_threshold,
            "nms_iou": head.nms_iou,
            "clip_first": head.clip_first,
            "candidates": self._all_candidates,
            "max_detections": head.max_detections,
            "palette": [list(drawing.class_colour(label)) for label in range(head.num_classes)],
        }

    def summarize(
        self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], source: Source
    ) -> Summary:
        """Returns COCO's and VOC's figures, and a table of the classes: see scores.summarize."""
        # Here and below, since a light install predicts without pycocotools.
        from mbv2_jax.tasks.detection import scores

        return scores.summarize(sums, rows, objects.check(source), self.classes)

    def records(self, rows: Mapping[str, np.ndarray], source: Source) -> Iterator[str]:
        """Yields COCO's JSON of results: see coco.results."""
        from mbv2_jax.tasks.detection import coco

        return coco.results(rows, objects.check(source))

    def decode(
        self, outputs: Mapping[str, np.ndarray], frames: Sequence[Frame]
    ) -> list[dict[str, Any]]:
        """Returns {"boxes", "scores", "labels", "classes"} of each picture, the best first.

        "boxes" are (D, 4) float32, x0, y0, x1, y1 in pixels of the picture, "scores" (D,) float32,
        "labels" (D,) int32, and "classes" the names of the labels.
        """
        if not outputs["finite"][: len(frames)].all():
            raise ValueError("the model's outputs are not numbers (NaN)")
        rows = dict(outputs) | {"frame": np.stack([objects.frame_row(frame) for frame in frames])}
        return [self._prediction(objects.found(rows, i)) for i in range(len(frames))]

    def agreement(
        self, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
    ) -> tuple[int, int]:
        """Returns the number of objects that both found, and that either found: see objects.shared.

        Only objects whose score is SURE or more count.
        """
        counts = []
        for i in range(len(ours["labels"])):
            one, other = (
                objects.Found(side["boxes"][i], side["scores"][i], side["labels"][i])
                for side in (ours, theirs)
            )
            counts.append(objects.shared(one, other, least=SURE))
        return sum(both for both, _ in counts), sum(either for _, either in counts)

    @property
    def most_entries(self) -> int:
        """All objects: as many as the model finds at most."""
        return self.head.max_detections

    def confident(self, prediction: Mapping[str, Any], least: float) -> dict[str, Any]:
        """Returns the objects whose score is `least` or more."""
        count = int((prediction["scores"] >= least).sum())  # they are the first
        return {name: values[:count] for name, values in prediction.items()}

    def entries(self, prediction: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
        """Returns {"score", "label", "class", "x0", "y0", "x1", "y1"} of the best objects.

        Coordinates are in pixels of the picture.
        """
        names = ("scores", "labels", "classes", "boxes")
        rows = zip(*(prediction[name] for name in names), strict=True)
        return [
            {"score": float(score), "label": int(label), "class": name}
            | dict(zip(objects.CORNERS, box.tolist(), strict=True))
            for score, label, name, box in itertools.islice(rows, limit)
        ]

    def draw(self, picture: Image.Image, prediction: Mapping[str, Any], limit: int) -> Image.Image:
        """Returns the picture with the boxes, names and scores of the best objects."""
        entries = self.entries(prediction, limit)
        return drawing.boxes(
            picture,
            prediction["boxes"][:limit],
            [f"{entry['class']} {entry['score']:.0%}" for entry in entries],
            [drawing.class_colour(entry["label"]) for entry in entries],
        )

    def transfer(self, saved: "SavedModel", fresh: Mapping[str, Any]) -> Transferred:
        """Keeps a saved model's class predictors only where its classes are this task's."""
        params, why = dict(saved.params), ""
        predictors = [name for name in params if name.startswith("class_logits")]
        if predictors and not labels.same(self.classes, saved.classes):
            params = {name: part for name, part in params.items() if name not in predictors}
            why = ": its classes are others"
        elif predictors and (odd := _other_anchors(self.head, saved.spec.head)):
            dropped = ("class_logits", "box_codes")
            params = {name: part for name, part in params.items() if not name.startswith(dropped)}
            why = f": its {odd} {'is another' if odd == 'table of anchors' else 'are others'}"
        kept = super().transfer(dataclasses.replace(saved, params=params), fresh)
        old = set(kept.variables["params"]) - {
            name for name, part in kept.variables["params"].items() if part is fresh["params"][name]
        }
        return kept._replace(note=f"starting from {saved.path}{_kept(old, fresh['params'])}{why}")

    def align(self, source: Source, data: str, model: str) -> Aligned:
        """Returns the split with the model's labels: see `data.labels.match`."""
        boxed = objects.check(source)
        found, note = labels.match(source.class_names, self.classes, data=data, model=model)
        if found == tuple(range(len(self.classes))):
            return Aligned(source, found, note)
        return Aligned(objects.Relabelled(boxed, found, self.classes), found, note)

    def unlike_published(self, aligned: Aligned) -> str:
        """Returns why a split is not COCO's; "" if it looks like it, with all 80 classes."""
        found = len(set(aligned.found))
        if aligned.source.benchmark != "coco":
            return "they are for COCO, and the data is not"
        if found < COCO_CLASSES:
            return f"they are for COCO's {COCO_CLASSES} classes, and the data has {found}"
        return ""

    @property
    def _all_candidates(self) -> int:
        """The pairs of a box and a class of all maps together, at most."""
        return self.head.candidates * (len(self.head.anchor_sizes) - 1)

    def _losses(self, outputs: Outputs, batch: Batch, mining: Mining) -> Losses:
        logits, codes, anchors = (jnp.concatenate(parts, 1) for parts in outputs[:3])
        boxes = batch["boxes"].astype(anchors.dtype)
        wanted = losses.targets(anchors, boxes, batch["labels"], self.head.num_classes)
        return losses.losses(logits, codes, wanted, self.head.scores, mining)

    def _decoded(self, outputs: Outputs) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns the boxes (N, A, 4) and the scores (N, A, classes) of each map."""
        activation = jax.nn.softmax if self.head.scores == "softmax" else jax.nn.sigmoid
        # A slice also for a symbolic number of images, for which [..., :-1] is a gather.
        scores = [jax.lax.slice_in_dim(activation(part), 0, -1, axis=-1) for part in outputs.logits]
        pairs = zip(outputs.codes, outputs.anchors, strict=True)
        return [coding.decode(*pair) for pair in pairs], scores

    def _chosen(
        self,
        boxes: Sequence[jax.Array],
        scores: Sequence[jax.Array],
        size: jax.Array,
        candidates: int,
    ) -> Detections:
        """Returns the detections of one image.

        Args:
          boxes, scores: (A, 4) and (A, classes) of each map, or of all maps together.
          size: height and width of the image.
          candidates: pairs of a box and a class of each array, at most.
        """
        head = self.head
        limits = size[jnp.array([1, 0, 1, 0])]  # (4,), of x0, y0, x1, y1
        inside = [part.clip(0, limits) for part in boxes]
        # What is outside the image is no detection in either order.
        scores = [
            jnp.where(nms.has_area(part)[:, None], of_map, 0)
            for part, of_map in zip(inside, scores, strict=True)
        ]
        compared = inside if head.clip_first else boxes
        chosen = nms.choose(scores, compared, head.score_threshold, candidates)
        found = nms.suppress(chosen, head.nms_iou, head.max_detections)
        return found._replace(boxes=found.boxes.clip(0, limits))

    def _prediction(self, found: objects.Found) -> dict[str, Any]:
        return {
            "boxes": found.corners,
            "scores": found.scores,
            "labels": found.labels,
            "classes": [self.classes[label] for label in found.labels],
        }


def _check_maps(head: Head, backbone: Backbone) -> None:
    """Raises UserError unless a head's taps are maps, and there are anchors for all of its maps."""
    known = [*feature_info(backbone), *ssdlite.stages(backbone)]
    if not head.taps:
        raise UserError("model.taps names no map of the backbone: give one or more")
    for tap in head.taps:
        if tap not in known:
            raise UserError(f"model.taps has {tap!r}, which is no map: {nearest(tap, known)}")
    maps, sizes = len(head.taps) + len(head.extra_channels), len(head.anchor_sizes)
    if sizes != maps + 1:
        raise UserError(
            f"model.anchor_sizes has {sizes} numbers, and there are {maps} maps (model.taps and "
            f"model.extra_channels): give {maps + 1}, one more than maps"
        )


def _other_anchors(head: Head, saved: Head) -> str:
    """Returns in what a saved detector's codes or scores mean something else; "" if in nothing."""
    if head.anchors != saved.anchors:
        return "table of anchors"
    if head.anchor_sizes != saved.anchor_sizes:
        return "sizes of anchors"
    return "scores" if head.scores != saved.scores else ""


def _kept(old: set[str], params: Mapping[str, Any]) -> str:
    """Returns a clause about the layers of the heads and of the extra maps that were kept."""
    head = [name for name in params if name.startswith(("extra", "class_", "box_"))]
    new = [name for name in head if name not in old]
    if not new:
        return ", heads included"
    if len(new) == len(head):
        return " with new heads"
    if all(name.startswith("class_logits") for name in new):
        return " with a new layer for the classes"
    return f" with new weights of {', '.join(new)}"
