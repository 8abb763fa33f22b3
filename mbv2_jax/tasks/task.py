"""The interface of a task, which covers everything in which tasks differ, and nothing else.

Training, evaluation, prediction and conversion know a task only through the members below.
`config.task` names a built-in task, or a user's own class as 'module:Class'; `tasks.find` returns
either. A task is a frozen dataclass: hashable, so that it is a static argument of jitted functions,
and picklable, so that its `collate` runs in data workers.
"""

import abc
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mbv2_jax.data.sample import ArraySpec, Frame, Sample
from mbv2_jax.errors import UserError
from mbv2_jax.models import folding
from mbv2_jax.spec import Backbone, TrainingMode

if TYPE_CHECKING:
    import flax.linen as nn
    import jax
    import numpy as np
    from PIL import Image

    from mbv2_jax.data.sources import Source
    from mbv2_jax.model_dir import SavedModel

Batch = Mapping[str, "jax.Array"]


class Transferred(NamedTuple):
    """The parameters with which training starts from another model.

    Attributes:
      variables: {"params", "batch_stats"}, of the shapes of the fresh ones.
      note: a clause for the user about the parts that were kept or are new.
      new_head: whether the head is not the other model's.
    """

    variables: dict[str, Any]
    note: str
    new_head: bool = False


class Aligned(NamedTuple):
    """A dataset seen through a model's classes.

    Attributes:
      source: the split, whose targets use the model's classes.
      found: the model's index of each of the dataset's classes.
      note: a sentence for the user about how classes were matched; "" if there is nothing to say.
    """

    source: Any
    found: tuple[int, ...]
    note: str = ""


class Summary(NamedTuple):
    """The outcome of an evaluation.

    Attributes:
      result: metrics by name, and "examples"; it is printed as a line of JSON.
      details: lines that are printed before it; "" for none.
    """

    result: dict[str, Any]
    details: str = ""


class Chance(NamedTuple):
    """The score of a network that does not look at its images.

    Attributes:
      figure: the name of a figure, such as "top1".
      value: its value by chance.
      margin: two standard errors of it, on as many examples as were evaluated.
      how: a clause for the user about how it is reached: "by always naming the largest class".
    """

    figure: str
    value: float
    margin: float
    how: str


class Classified(NamedTuple):
    """The true and the predicted class of each example of an evaluation.

    Attributes:
      labels: (N,) integers, the true classes.
      predicted: (N,) integers, the predicted ones.
      scores: (N,) float, the probabilities of the predicted classes.
    """

    labels: "np.ndarray"
    predicted: "np.ndarray"
    scores: "np.ndarray"


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """The settings of a task without fields of its own beside the config's sections."""


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One task of a network, with its head and its classes.

    Attributes:
      head: the head's fields, of the type `Head`; None stands for a backbone alone.
      classes: the names of the classes in the order of the outputs; () where there are none.
    """

    head: Any = None
    classes: tuple[str, ...] = ()

    # The head's frozen dataclass. Its fields are declared as in spec.py, and stand in the config's
    # `model` section beside the backbone's.
    Head: ClassVar[type]
    # The frozen dataclass of the task's other fields, which stand beside the config's sections.
    Settings: ClassVar[type] = NoSettings
    # The metrics of `summarize` that are compared with published figures, larger being better. The
    # first decides which checkpoint is the best. "loss" need not be among them.
    figures: ClassVar[tuple[str, ...]]
    # The axis labels of metrics, "loss" among them: {"top1": "top-1 (%)"}.
    labels: ClassVar[Mapping[str, str]] = {}
    # The keys of `entries` that a table of predictions shows.
    columns: ClassVar[tuple[str, ...]] = ()
    # The message for a config that leaves the head to the data, where no data is opened.
    open_head: ClassVar[str] = "the config leaves the head to the data, and no data is opened"
    # The name of the target that the task learns from, such as "label"; "" where any will do.
    target: ClassVar[str] = ""
    # Whether an example has one class, so that `class_logits` and `classified` exist.
    classifies: ClassVar[bool] = False
    # The word for a prediction that is an image of its own, such as "mask", so that `to_image`
    # exists; "" where a prediction is no image.
    image_of: ClassVar[str] = ""
    # Whether a prediction is a list of objects, each with a score, so that `confident` exists.
    finds_objects: ClassVar[bool] = False
    # What `agreement` counts: "classes", "pixels" or "boxes".
    agree_on: ClassVar[str] = "classes"
    # Whether `summarize` needs the rows of every example, and not only the sums.
    needs_rows: ClassVar[bool] = False

    # ---- What a run needs to know before it starts (on the host) ----

    @classmethod
    @abc.abstractmethod
    def for_training(cls, settings: Mapping[str, Any], source: "Source | None") -> "Task":
        """Returns the task that a config describes.

        Args:
          settings: the values of the config's fields that the task declares, by name, such as
            "model.num_classes".
          source: the training split, which decides whatever `settings` leaves open; None where no
            data is opened: then `head` is None if the settings leave it open.

        Raises:
          UserError: settings and data disagree, or the data has no targets of this kind.
        """

    @classmethod
    def for_model(cls, head: Any, classes: Sequence[str]) -> "Task":
        """Returns the task of a saved model, for evaluation and prediction."""
        return cls(head=head, classes=tuple(classes))

    @classmethod
    def split_fault(cls, train: "Source", evaluation: "Source") -> str:
        """Returns why two splits do not belong together; "" if they do.

        The text has two {}, for the names of the splits.
        """
        del train, evaluation
        return ""

    @classmethod
    def select(cls, settings: Mapping[str, Any], source: "Source") -> "Source":
        """Returns the examples of the training split that are trained on; by default all.

        Args:
          settings: as `for_training` takes them.
          source: the training split.

        Raises:
          UserError: none is left.
        """
        del settings
        return source

    @abc.abstractmethod
    def network(
        self, backbone: Backbone, mode: TrainingMode, *, folded: bool = False
    ) -> "nn.Module":
        """Returns the linen module: (N, H, W, 3) normalised images -> outputs.

        Args:
          backbone: the fields that change what is computed.
          mode: the fields that change how it is trained; `bn_group_size` is a number.
          folded: whether batch normalisations are part of the convolutions (models/folding.py).
        """

    def backbone(self, described: Backbone) -> Backbone:
        """Returns the backbone of this task's network.

        Args:
          described: the backbone of a config, or of the checkpoint that training starts from, which
            may have layers that this task's network does without.
        """
        return described

    def fold(
        self, params: Mapping[str, Any], batch_stats: Mapping[str, Any], backbone: Backbone
    ) -> dict[str, Any]:
        """Returns the parameters of the folded network, see models/folding.py.

        Here every normalisation has the backbone's epsilon.

        Args:
          params, batch_stats: of the network that is not folded.
          backbone: its fields.
        """
        return folding.fold(params, batch_stats, backbone.bn_epsilon)

    @abc.abstractmethod
    def batch_spec(self, size: tuple[int, int]) -> dict[str, ArraySpec]:
        """Returns the arrays that `collate` makes of one example, without the batch's axis.

        Args:
          size: (height, width) of the transformed image, in pixels.
        """

    @abc.abstractmethod
    def collate(self, samples: Sequence[Sample]) -> dict[str, "np.ndarray"]:
        """Returns transformed samples as arrays whose shapes do not depend on them; uses no jax.

        Args:
          samples: at least one; their images are (H, W, 3) uint8 arrays.

        Returns:
          Arrays (len(samples), ...) as `batch_spec` describes them.

        Raises:
          UserError: a sample has no target of this kind; the message begins with its id.
        """

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The names of the changes that `augment` makes, for people who look at the data."""
        return ()

    # ---- What runs on the devices (pure functions, traced) ----

    def augment(self, key: "jax.Array", batch: Batch) -> Batch:
        """Augments a training batch before its images are normalised, as mixup and cutmix do."""
        del key
        return batch

    @abc.abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> tuple["jax.Array", dict[str, "jax.Array"]]:
        """Returns the loss of a training batch, (), and scalars to log; float32 or wider."""

    @abc.abstractmethod
    def evaluate(
        self, outputs: Any, batch: Batch
    ) -> tuple[dict[str, "jax.Array"], dict[str, "jax.Array"]]:
        """Scores a batch.

        Args:
          outputs: the network's outputs for N examples.
          batch: the arrays of `batch_spec`, and "mask", (N,) bool, False for padding.

        Returns:
          Sums over the examples that are not padding, of any shape, which add up over batches
          ("loss" among them); and arrays (N, ...), a row for each example.
        """

    def views(self, images: "jax.Array") -> "Sequence[jax.Array]":
        """Returns the views of normalised images, (N, H, W, 3), whose outputs --tta merges."""
        return (images, images[:, :, ::-1])

    def merge(self, outputs: Sequence[Any]) -> Any:
        """Merges the outputs of `views` into outputs for the images themselves."""
        raise NotImplementedError

    def class_logits(self, outputs: Any) -> "jax.Array":
        """Returns the logits of the classes, (N, classes), for class activation maps."""
        raise NotImplementedError

    def postprocess(self, outputs: Any) -> Any:
        """Applies the last operations before `decode`, such as a softmax or an argmax.

        Its rows must not depend on each other: on CPUs a batch goes through in pieces.
        """
        return outputs

    def exported(self, outputs: Any) -> "dict[str, jax.Array]":
        """Returns the network's outputs as the arrays of an exported file, (N, ...) by name."""
        raise NotImplementedError

    def from_exported(self, arrays: "Mapping[str, jax.Array]", size: tuple[int, int]) -> Any:
        """Returns what `postprocess` does, from the arrays of an exported file.

        Args:
          arrays: as `exported` returns them.
          size: (height, width) of the network's images.
        """
        raise NotImplementedError

    def decoding(self) -> dict[str, Any]:
        """Returns the facts with which another program decodes and draws the exported arrays.

        They are what JSON can hold. Of classes that are drawn in colours, "palette" has [R, G, B]
        for each class, 0 to 255.
        """
        return {}

    # ---- What a person sees (on the host, without jax) ----

    @abc.abstractmethod
    def summarize(
        self,
        sums: Mapping[str, "np.ndarray"],
        rows: Mapping[str, "np.ndarray"],
        source: "Source",
    ) -> Summary:
        """Returns the outcome of an evaluation.

        Args:
          sums: the sums over the whole split, float64, and "examples", their number.
          rows: the rows of all examples in the split's order, if `needs_rows`; else {}.
          source: the split, for targets as they are in its files.
        """

    def chance(self, sums: Mapping[str, "np.ndarray"]) -> Chance | None:
        """Returns the score that needs no network, by which a run that learned nothing is known.

        Args:
          sums: as `summarize` takes them.

        Returns:
          The score on the evaluated split; None where nothing is known.
        """
        del sums
        return None

    def standard_error(self, figure: str, result: Mapping[str, Any]) -> float:
        """Returns the standard error of a metric of `summarize`; 0 where it is not known."""
        del figure, result
        return 0.0

    def classified(self, rows: Mapping[str, "np.ndarray"]) -> Classified:
        """Returns the true and the predicted classes of the rows of `evaluate` and of its batch."""
        raise NotImplementedError

    def record(self, row: Mapping[str, "np.ndarray"]) -> dict[str, Any]:
        """Returns an example's row of `evaluate` and of its batch in JSON form."""
        raise NotImplementedError

    def records(self, rows: Mapping[str, "np.ndarray"], source: "Source") -> Iterator[str]:
        """Yields the text of the file of --out in pieces.

        Here it is a line of JSON for each example: "image", its name in the source, and the members
        of `record`.

        Args:
          rows: of all examples, in the source's order.
          source: the split that was evaluated.
        """
        for index in range(len(source)):
            row = self.record({name: values[index] for name, values in rows.items()})
            yield json.dumps({"image": source.describe(index)} | row) + "\n"

    @abc.abstractmethod
    def decode(self, outputs: Any, frames: Sequence[Frame]) -> list[dict[str, Any]]:
        """Returns the prediction of each image.

        Args:
          outputs: the outputs of `postprocess`, as numpy arrays; rows beyond `frames` are padding.
          frames: of each image, by which predictions are placed in the original picture.

        Raises:
          ValueError: the outputs are not numbers.
        """

    def agreement(self, ours: Any, theirs: Any) -> tuple[int, int]:
        """Compares two sets of outputs of `postprocess` for the same images.

        Returns:
          The number of predictions that are the same, and that of all; see `agree_on`.
        """
        raise NotImplementedError

    @property
    def most_entries(self) -> int:
        """The `limit` of `entries` and `draw` where a user gives none."""
        return 5

    def confident(self, prediction: Mapping[str, Any], least: float) -> dict[str, Any]:
        """Returns a prediction without the objects whose score is below `least`."""
        raise NotImplementedError

    def entries(self, prediction: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
        """Returns a prediction as rows of a table and of JSON, at most `limit`, the best first."""
        raise NotImplementedError

    def draw(
        self, picture: "Image.Image", prediction: Mapping[str, Any], limit: int
    ) -> "Image.Image":
        """Draws an image with its prediction, for a person to look at."""
        raise NotImplementedError

    def to_image(self, prediction: Mapping[str, Any]) -> "Image.Image":
        """Returns a prediction as an image of the picture's size, for other programs to read."""
        raise NotImplementedError

    # ---- From one model to another (on the host) ----

    def transfer(self, saved: "SavedModel", fresh: Mapping[str, Any]) -> Transferred:
        """Returns the variables to start from: a saved model's, and fresh ones where it has none.

        Here every layer is kept that has the same name and the same shapes in the saved model,
        whose task may be another one: those of the backbone always have.

        Args:
          saved: the model of --checkpoint.
          fresh: {"params", "batch_stats"}: random arrays, or shapes and dtypes alone
            (jax.ShapeDtypeStruct), for which the caller draws only the arrays that are returned.
        """
        import jax

        def shapes(layer: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.shape, layer)

        old = saved.variables()
        kept = {
            name
            for name, layer in fresh["params"].items()
            if name in old["params"] and shapes(old["params"][name]) == shapes(layer)
        }
        new = [name for name in fresh["params"] if name not in kept]
        # Beside the statistics of layers, a network that rounds to 8 bits has ranges of their
        # results.
        fitting = {name for name in fresh["batch_stats"] if name.removesuffix("_range") not in new}
        variables = {
            collection: {
                name: filled(layer, old[collection].get(name)) if name in kept | fitting else layer
                for name, layer in layers.items()
            }
            for collection, layers in fresh.items()
        }
        note = f" with a new {' and '.join(new)}" if new else ""
        return Transferred(variables, f"starting from {saved.path}{note}", new_head=bool(new))

    def features(self, network: "nn.Module", variables: Mapping[str, Any], images: Any) -> Any:
        """Returns the features from which `fit_head` fits the head; runs on the devices.

        Args:
          network: from `network`.
          variables: {"params", "batch_stats"}, from `transfer`.
          images: (N, H, W, 3), normalised.

        Returns:
          An array (N, ...).

        Raises:
          UserError: the head of this task cannot be fitted.
        """
        del network, variables, images
        raise UserError("fit_head is set, but this task cannot fit its head: set it to False")

    def fit_head(
        self, variables: Mapping[str, Any], rows: Mapping[str, "np.ndarray"]
    ) -> Transferred:
        """Returns the variables with a head that is fitted to the features of training examples.

        Args:
          variables: {"params", "batch_stats"}, from `transfer`.
          rows: "features", (N, ...), of the examples, and their targets that have one value each.
        """
        raise NotImplementedError

    def align(self, source: "Source", data: str, model: str) -> Aligned:
        """Returns an evaluation split whose targets use this task's classes.

        Args:
          source: the split.
          data, model: their names, for messages.

        Raises:
          UserError: the split has classes that the model does not have.
        """
        del data, model
        return Aligned(source, tuple(range(len(self.classes))))

    def unlike_published(self, aligned: Aligned) -> str:
        """Returns why a split is not the one that published figures are for; "" if it may be.

        The text is the reason in "not compared, since ...".

        Args:
          aligned: a split with the same number of examples as the published one.
        """
        del aligned
        return ""


def filled(fresh: Mapping[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the variables of a network with the arrays of another where it has some.

    A network that rounds to 8 bits has ranges beside its statistics, and others do not.

    Args:
      fresh: a tree of arrays or of their shapes, which decides the structure.
      old: the other network's tree; None has no arrays.
    """

    def choose(new: Any, known: Any) -> Any:
        if isinstance(new, Mapping):
            return filled(new, known)
        return new if known is None else known

    return {name: choose(part, (old or {}).get(name)) for name, part in fresh.items()}
