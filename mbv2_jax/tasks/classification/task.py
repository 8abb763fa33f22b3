"""Image classification as training, evaluation and prediction see it."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mbv2_jax import drawing
from mbv2_jax.data import classes, labels
from mbv2_jax.data.sample import ArraySpec, Frame, Sample
from mbv2_jax.data.sources import Source
from mbv2_jax.errors import UserError
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.spec import Backbone, TrainingMode
from mbv2_jax.tasks import classes as classes_lib
from mbv2_jax.tasks.classification import scores
from mbv2_jax.tasks.classification.mixing import Targets, mix
from mbv2_jax.tasks.classification.settings import Head, Settings
from mbv2_jax.tasks.task import Aligned, Batch, Chance, Classified, Summary, Task, Transferred

if TYPE_CHECKING:  # model_dir finds tasks
    from mbv2_jax.model_dir import SavedModel


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """One label for each image.

    Attributes:
      settings: label smoothing, mixup and cutmix, for training.
    """

    settings: Settings = dataclasses.field(default_factory=Settings)

    Head: ClassVar[type] = Head
    Settings: ClassVar[type] = Settings
    figures: ClassVar[tuple[str, ...]] = ("top1", "top5")
    labels: ClassVar[Mapping[str, str]] = {
        "loss": "loss (nats)",
        "top1": "top-1 (%)",
        "top5": "top-5 (%)",
    }
    columns: ClassVar[tuple[str, ...]] = ("score", "label", "class")
    target: ClassVar[str] = "label"
    classifies: ClassVar[bool] = True
    open_head: ClassVar[str] = (
        "model.num_classes is not set, and no data is opened to count the classes: give "
        "--config.model.num_classes=1000, say"
    )

    @classmethod
    def for_training(cls, settings: Mapping[str, Any], source: Source | None) -> "Classification":
        """Returns the task of a config; the data decides the number of classes if it is unset."""
        names = () if source is None else tuple(source.class_names)
        count = classes_lib.count(settings, source)
        head = None if count is None else Head(count, settings["model.hidden"])
        fields = [field.name for field in dataclasses.fields(Settings)]
        return cls(head, names, Settings(**{name: settings[name] for name in fields}))

    @classmethod
    def split_fault(cls, train: Source, evaluation: Source) -> str:
        """Returns "" if both splits have the same classes in the same order."""
        return classes_lib.split_fault(train, evaluation)

    def network(
        self, backbone: Backbone, mode: TrainingMode, *, folded: bool = False
    ) -> MobileNetV2:
        """Returns the network: logits (N, classes); feature maps where there is no head."""
        fields = dataclasses.asdict(backbone) | dataclasses.asdict(mode)
        fields["dtype"] = jnp.dtype(mode.dtype)
        head = self.head or Head()
        return MobileNetV2(
            num_classes=head.num_classes, hidden=head.hidden, folded=folded, **fields
        )

    def batch_spec(self, size: tuple[int, int]) -> dict[str, ArraySpec]:
        """Returns {"image": (H, W, 3) uint8, "label": () int32}."""
        return {"image": ArraySpec((*size, 3), np.uint8), "label": ArraySpec((), np.int32)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Returns {"image": (N, H, W, 3) uint8, "label": (N,) int32}."""
        for sample in samples:  # the test splits of some datasets come without labels
            if sample.targets.get("label", -1) < 0:
                raise UserError(f"{sample.id}: has no label")
        return {
            "image": np.stack([sample.image for sample in samples]),
            "label": np.array([sample.targets["label"] for sample in samples], np.int32),
        }

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The names of those of mixup and cutmix that the settings enable."""
        names = ("mixup", "cutmix")
        return tuple(name for name in names if getattr(self.settings, f"{name}_alpha"))

    def augment(self, key: jax.Array, batch: Batch) -> Batch:
        """Applies mixup or cutmix; adds "mixed_label" (N,) and "share" () where it does."""
        pixels, targets = mix(
            key,
            batch["image"],
            batch["label"],
            self.settings.mixup_alpha,
            self.settings.cutmix_alpha,
        )
        if targets.others is None:
            return batch
        mixed = {"image": pixels, "mixed_label": targets.others, "share": targets.share}
        return dict(batch) | mixed

    def loss(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean cross entropy, and "top1": the percentage of right main labels."""
        targets = Targets(batch["label"], batch.get("mixed_label"), batch.get("share", 1.0))
        losses = scores.mixed_cross_entropy(outputs, targets, self.settings.label_smoothing)
        top1 = 100.0 * (outputs.argmax(-1) == targets.main()).mean()
        return losses.mean(), {"top1": top1}

    def evaluate(
        self, outputs: jax.Array, batch: Batch
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns `scores.sums`, and `scores.ranking` of each example."""
        sums = scores.sums(outputs, batch["label"], batch["mask"])
        return sums, scores.ranking(outputs, batch["label"])

    def merge(self, outputs: Sequence[jax.Array]) -> jax.Array:
        """Averages the probabilities of an image and of its mirror image."""
        return scores.average(*outputs)

    def class_logits(self, outputs: jax.Array) -> jax.Array:
        """Returns the outputs, which are logits (N, classes)."""
        return outputs

    def postprocess(self, outputs: jax.Array) -> jax.Array:
        """Returns probabilities (N, classes)."""
        return jax.nn.softmax(outputs)

    def exported(self, outputs: jax.Array) -> dict[str, jax.Array]:
        """Returns {"logits": (N, classes)}."""
        return {"logits": outputs}

    def from_exported(self, arrays: Mapping[str, jax.Array], size: tuple[int, int]) -> jax.Array:
        """Returns probabilities (N, classes)."""
        del size
        return self.postprocess(arrays["logits"])

    def summarize(
        self, sums: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], source: Source
    ) -> Summary:
        """Returns {"top1", "top5" (percent), "loss", "examples"}."""
        del rows, source
        return Summary(scores.summarize(sums))

    def chance(self, sums: Mapping[str, np.ndarray]) -> Chance | None:
        """Returns the top-1 of always naming the largest class; None where there is only one."""
        if np.count_nonzero(sums["labels"]) < 2:
            return None
        value, error = scores.chance(sums["labels"])
        return Chance("top1", value, 2 * error, "by always naming the largest class")

    def standard_error(self, figure: str, result: Mapping[str, Any]) -> float:
        """Returns the binomial standard error of top1 and top5; 0 for the loss."""
        if figure not in self.figures:
            return 0.0
        return scores.standard_error(result[figure], result["examples"])

    def classified(self, rows: Mapping[str, np.ndarray]) -> Classified:
        """Returns the labels, and the first of the ranked classes with its probability."""
        return Classified(rows["label"], rows["best"][:, 0], rows["scores"][:, 0])

    def record(self, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Returns {"label", "class", "loss", "predictions": [{"label", "class", "score"}, ...]}."""
        label = int(row["label"])
        ranked = zip(row["best"], row["scores"], strict=True)
        return {
            "label": label,
            "class": self.classes[label],
            "loss": float(row["loss"]),
            "predictions": [self._entry(int(best), float(score)) for best, score in ranked],
        }

    def decode(self, outputs: np.ndarray, frames: Sequence[Frame]) -> list[dict[str, Any]]:
        """Returns {"pred_label", "pred_class", "pred_score", "pred_scores" (classes,)} of each."""
        return [self._prediction(probabilities) for probabilities in outputs[: len(frames)]]

    def agreement(self, ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
        """Returns the number of images whose most probable class is the same, and of all."""
        return int((ours.argmax(-1) == theirs.argmax(-1)).sum()), len(ours)

    def entries(self, prediction: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
        """Returns {"label", "class", "score"} of the best classes."""
        probabilities = prediction["pred_scores"]
        best = (-probabilities).argsort(kind="stable")[:limit]
        return [self._entry(int(label), float(probabilities[label])) for label in best]

    def draw(self, picture: Image.Image, prediction: Mapping[str, Any], limit: int) -> Image.Image:
        """Returns the photo with the best classes below it, with bars and percentages."""
        best = self.entries(prediction, limit)
        return drawing.annotate(picture, [(entry["class"], entry["score"]) for entry in best])

    def transfer(self, saved: "SavedModel", fresh: Mapping[str, Any]) -> Transferred:
        """Keeps a saved model's classifier only where its classes are this task's.

        Hidden layers are kept up to the first whose width is another one.
        """
        params, ours = dict(saved.params), self.head.hidden
        theirs = saved.spec.head.hidden if isinstance(saved.spec.head, Head) else ()
        for number in range(_equal_first(theirs, ours), len(theirs)):
            del params[f"hidden_{number}"]
        if "classifier" not in params:
            why = "it has none"
        elif theirs != ours:
            del params["classifier"]
            why = f"its hidden layers are {theirs}, not {ours}"
        elif labels.same(self.classes, saved.classes):
            kept = super().transfer(saved, fresh)
            return kept._replace(note=f"{kept.note}, classifier included")
        else:
            del params["classifier"]
            why = f"its {len(saved.classes)} classes are not these {self.head.num_classes}"
        kept = super().transfer(dataclasses.replace(saved, params=params), fresh)
        return kept._replace(note=f"{kept.note}: {why}")

    def features(
        self, network: nn.Module, variables: Mapping[str, Any], images: jax.Array
    ) -> jax.Array:
        """Returns the pooled features (N, channels) that the classifier gets.

        Raises:
          UserError: the classifier has hidden layers, which cannot be fitted in closed form.
        """
        if self.head.hidden:
            raise UserError(
                f"fit_head fits a single dense layer, and model.hidden is {self.head.hidden}: give "
                "--config.fit_head=false, or --config.model.hidden='()'"
            )
        backbone = network.clone(num_classes=None)
        return backbone.apply(variables, images)[0].astype(jnp.float32).mean((1, 2))

    def fit_head(self, variables: Mapping[str, Any], rows: Mapping[str, np.ndarray]) -> Transferred:
        """Fits the classifier in closed form, see `probe.fit`."""
        from mbv2_jax.tasks.classification import probe

        features = rows["features"]
        if len(features) < 2:
            raise UserError(f"fit_head: {len(features)} training image is too few")
        if not np.isfinite(features).all():
            raise UserError(
                "fit_head: the features are infinite or NaN: the checkpoint's weights are damaged, "
                "or their training went wrong"
            )
        found = probe.fit(features, rows["label"], len(self.classes))
        classifier = {"kernel": found.kernel, "bias": found.bias}
        note = (
            f"fitted the classifier to the features of {len(rows['label']):,} images, which it "
            f"classifies with {100 * found.accuracy:.1f} % top-1 where it has not seen them"
        )
        params = dict(variables["params"]) | {"classifier": classifier}
        return Transferred({**variables, "params": params}, note, new_head=True)

    def align(self, source: Source, data: str, model: str) -> Aligned:
        """Returns the split with the model's labels: see `data.labels.match`."""
        found, note = labels.match(source.class_names, self.classes, data=data, model=model)
        return Aligned(labels.Relabelled(source, found, self.classes), found, note)

    def unlike_published(self, aligned: Aligned) -> str:
        """Returns why a split is not ImageNet's 1000 classes; "" if it is."""
        offset, found = classes.imagenet_offset(self.classes), set(aligned.found)
        if offset is None:
            return "they are for ImageNet, and the model's classes are not known to be ImageNet's"
        if not found >= set(range(offset, offset + 1000)):
            return f"they are for ImageNet's 1000 classes, and the data has {len(found)} classes"
        return ""

    def _prediction(self, probabilities: np.ndarray) -> dict[str, Any]:
        if not np.isfinite(probabilities).all():
            raise ValueError("the model's logits are not numbers (NaN)")
        label = int(probabilities.argmax())
        return {
            "pred_label": label,
            "pred_class": self.classes[label],
            "pred_score": float(probabilities[label]),
            "pred_scores": probabilities,
        }

    def _entry(self, label: int, score: float) -> dict[str, Any]:
        return {"label": label, "class": self.classes[label], "score": score}


def _equal_first(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of items at the beginning that two sequences have in common."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
