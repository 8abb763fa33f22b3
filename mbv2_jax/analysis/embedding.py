"""The images of a split on a plane: t-SNE of the features that the classifier gets."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import tqdm
from ml_collections import ConfigDict

from mbv2_jax import drawing, inference, model_dir
from mbv2_jax.analysis import output
from mbv2_jax.analysis.random_examples import random_examples
from mbv2_jax.data import classes, loader, sources
from mbv2_jax.data.sample import ArraySpec, Sample
from mbv2_jax.errors import UserError
from mbv2_jax.installed import require
from mbv2_jax.runtime import compilation_cache
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import splits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURED = 20  # classes with a colour of their own
PERPLEXITY = 30.0  # scikit-learn's; lower for few images
LEAST = 5  # images


def embedding(
    config: ConfigDict,
    checkpoint: str | None,
    out: str = "embedding.png",
    *,
    split: str = "eval",
    count: int = 2000,
) -> None:
    """Draws the images of a split, coloured by class, near each other where their features are.

    The classes are the data's, and need not be the model's: a model without a classifier will do.

    Args:
      config: names the data.
      checkpoint: anything that model_dir.read takes.
      out: the picture's file, replaced if it exists.
      split: "train" or "eval".
      count: the most images; of more, random ones are drawn with the config's seed.

    Raises:
      UserError: an argument, the config or the data is wrong, the data has no classes, or
        scikit-learn is not installed.
    """
    output.check_picture(out)
    if count < LEAST:
        raise UserError(f"--count={count}: give {LEAST} images or more")
    if not checkpoint:
        raise UserError("--checkpoint=PATH is missing: the model whose features to draw")
    require("t-SNE", "sklearn", extra="demo")
    compilation_cache.enable(config.compilation_cache)
    settings = config_lib.read(config_lib.without_groups(config))
    data = settings.data
    name = data.train_split if split == "train" else data.eval_split
    source = splits.open_split(settings, name)
    if not source.class_names:
        raise UserError(f"{data.source} has no classes by which to colour its images")
    if "label" not in source[0].targets:  # such as a mask
        raise UserError(f"{data.source} gives an image no class by which to colour it")
    if len(source) < LEAST:
        raise UserError(f"{data.source}, {name} has {len(source)} images: {LEAST} are needed")
    predictor = inference.Predictor(model_dir.read(checkpoint))
    part = Part(source, random_examples(len(source), count, config.seed))
    features, labels = pooled(predictor, part, data.workers)
    if (labels < 0).any():
        raise UserError(f"{data.source}, {name} has images without a label: give another split")
    points = plane(features, config.seed)
    of = "" if len(part) == len(source) else f" of {len(source):,}"
    title = f"t-SNE of {checkpoint}'s features of {len(part):,}{of} images, {data.source}, {name}"
    output.write_figure(draw(points, labels, source.class_names, title), out)
    print(f"{out}: {len(part):,}{of} images of {len(np.unique(labels)):,} classes")


class Part:
    """Some examples of a source, as a source; also a collator of images with their labels."""

    def __init__(self, source: sources.Source, indices: np.ndarray):
        self.class_names, self.parts = source.class_names, source.parts
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[int(self._indices[index])]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    @staticmethod
    def batch_spec(size: tuple[int, int]) -> dict[str, ArraySpec]:
        return {"image": ArraySpec((*size, 3), np.uint8), "label": ArraySpec((), np.int32)}

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
        labels = [sample.targets.get("label", -1) for sample in samples]
        return {"image": np.stack([s.image for s in samples]), "label": np.array(labels, np.int32)}


def pooled(
    predictor: inference.Predictor, part: Part, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pooled features (N, C) and the labels (N,) of images."""
    size = inference.BATCH_SIZE
    batches = loader.eval_batches(part, predictor.transform, part, batch_size=size, workers=workers)
    features, labels = [], []
    hidden = not sys.stderr.isatty()
    bar = tqdm.tqdm(total=len(part), unit="image", desc="features", disable=hidden)
    with contextlib.closing(batches), bar:
        for batch in batches:
            mask = batch["mask"]
            # A copy, since the memory is the workers'.
            found = predictor.extract_feat(np.array(batch["image"]))
            features.append(np.asarray(found)[mask])
            labels.append(batch["label"][mask])
            bar.update(int(mask.sum()))
    return np.concatenate(features), np.concatenate(labels)


def plane(features: np.ndarray, seed: int) -> np.ndarray:
    """Returns points on a plane, (N, 2), whose neighbours are those of the features (N, C)."""
    from sklearn.manifold import TSNE  # here, because it takes a second

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)  # it must be below the number of images
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def draw(points: np.ndarray, labels: np.ndarray, names: Sequence[str], title: str) -> "Figure":
    """Draws points in the colours of their classes, at most 20; those of further classes are grey.

    Args:
      points: (N, 2).
      labels: (N,) integers.
      names: of all classes by label.
      title: a line above.

    Returns:
      A matplotlib figure.
    """
    counts = np.bincount(labels, minlength=len(names))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    coloured = sorted(order[:COLOURED])
    figure = output.new_figure(10.0, 7.5, title)
    axes = figure.subplots()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", "datalim")
    size = 12 if len(points) > 500 else 24
    others = ~np.isin(labels, coloured)
    if others.any():
        text = f"{len(order) - COLOURED:,} other classes"
        axes.scatter(points[others, 0], points[others, 1], size, color="#dadce0", label=text)
    colours = matplotlib.colormaps["tab20" if len(coloured) > 10 else "tab10"].colors  # type: ignore[attr-defined]
    for colour, label in zip(colours, coloured, strict=False):
        name = classes.english(names[label])
        x, y = points[labels == label].T
        axes.scatter(x, y, size, color=[colour], label=name)
    legend = figure.legend(loc="outside right upper", fontsize=9, markerscale=1.5)
    for text_ in legend.get_texts():
        text_.set(font=drawing.font_file(text_.get_text()), size=9)
    return figure
