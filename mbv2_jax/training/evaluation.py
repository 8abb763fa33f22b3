"""Exact evaluation: every example of a split is scored once, on any batch and device count."""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.data import loader, sources, transforms
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.tasks import classification
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import mesh as mesh_lib
from mbv2_jax.training import step as step_lib

Result = dict[str, float | int]
EXPECTED_WITHIN = 0.05  # percentage points that --expect allows


def evaluate(config: ConfigDict, checkpoint: str | None, overrides: Mapping[str, Any]) -> Result:
    """Evaluates a saved model on the evaluation split of `config`.

    Args:
      config: which data; the model itself, its normalisation and its transform are the
        checkpoint's, whatever the config says of them.
      checkpoint: a model directory or a workdir.
      overrides: --config.KEY=VALUE of the command line, which do count, and are said.

    Raises:
      UserError: no such checkpoint or data, or class counts that disagree.
    """
    config_lib.check(config)
    if not checkpoint:
        raise UserError("--mode=eval needs --checkpoint=PATH or --workdir=DIR")
    saved = model_dir.read(checkpoint)
    data = config.data
    source = sources.open_source(data.source, data.eval_split, data.data_dir)
    config = config_lib.as_saved(config, saved, overrides)
    if config.model.num_classes != len(source.class_names):
        raise UserError(
            f"{saved.path} knows {config.model.num_classes} classes, {data.source} has "
            f"{len(source.class_names)}"
        )
    _compare_classes(saved, source)
    mesh = mesh_lib.create()
    mesh_lib.check_batch(mesh, config.batch_size)
    return score(
        {"params": saved.params, "batch_stats": saved.batch_stats},
        source,
        transform(config.data.eval_transforms, config.data.image_size),
        model=config_lib.model(config),
        config=config,
        mesh=mesh,
        progress=True,
    )


def _compare_classes(saved: model_dir.SavedModel, source: sources.Source) -> None:
    """Refuses a model of other classes than the data's, as far as names can tell."""
    ours, theirs = saved.class_names, tuple(source.class_names)
    if ours == theirs:
        return
    i = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    what = f"class {i} is {ours[i]!r} in {saved.path} and {theirs[i]!r} in the data"
    if set(ours) & set(theirs):
        raise UserError(f"{what}: labels would be compared with those of other classes")
    # Other names throughout are another vocabulary (WordNet ids, say) as likely as other classes.
    print(
        f"{what}; no name is shared: taken as the same classes in the same order", file=sys.stderr
    )


def score(
    variables: Mapping[str, Any],
    source: sources.Source,
    transform: transforms.Transform,
    *,
    model: MobileNetV2,
    config: ConfigDict,
    mesh: Mesh,
    progress: bool = False,
) -> Result:
    """Scores every example of `source` exactly once.

    Args:
      variables: {"params", "batch_stats"}.
      source: the split.
      transform: of its images.
      model: the network.
      config: resolved; batch_size, data.mean, data.std and data.workers are read.
      mesh: the devices.
      progress: whether to show a bar.

    Returns:
      {"top1", "top5" (percent), "loss", "examples"}.

    Raises:
      RunFailed: an infinite or NaN loss, or a count of examples that is not the split's.
    """
    step = _jitted_eval_step(model, tuple(config.data.mean), tuple(config.data.std), mesh)
    batches = loader.eval_batches(
        source,
        transform,
        batch_size=config.batch_size,
        workers=config.data.workers,
        **mesh_lib.process(),
    )
    totals = {"loss": 0.0, "top1": 0.0, "top5": 0.0, "examples": 0.0}
    hidden = not (progress and sys.stderr.isatty())
    bar = tqdm.tqdm(total=len(source), unit="image", desc="evaluating", disable=hidden)
    with contextlib.closing(batches), bar:
        for batch in mesh_lib.prefetch(batches, mesh):
            sums = step(variables, batch)
            for name in totals:
                totals[name] += float(sums[name])
            bar.update(int(sums["examples"]))
    if totals["examples"] != len(source):
        raise RunFailed(
            f"evaluated {totals['examples']:.0f} examples of a split of {len(source)}: "
            "no result is reported"
        )
    if not np.isfinite(totals["loss"]):
        raise RunFailed(f"the loss of the evaluation is {totals['loss']}: no result is reported")
    return classification.summarize(totals)


@functools.lru_cache(maxsize=4)
def _jitted_eval_step(
    model: MobileNetV2, mean: tuple[float, ...], std: tuple[float, ...], mesh: Mesh
) -> Callable[..., classification.Sums]:
    """Compiled once for all the evaluations of a run."""
    everywhere = mesh_lib.replicated(mesh)
    return jax.jit(
        functools.partial(step_lib.eval_step, model=model, mean=mean, std=std),
        in_shardings=(everywhere, mesh_lib.split(mesh)),
        out_shardings=everywhere,
    )


def transform(spec: str, image_size: int) -> transforms.Transform:
    """Returns the transform of data.eval_transforms; raises UserError if it is random."""
    made = transforms.make_transform(spec, image_size)
    if made.random:
        raise UserError(f"data.eval_transforms {spec!r} is random: evaluation must not be")
    return made


def check_expected(result: Mapping[str, float], top1: float, top5: float) -> None:
    """Compares an evaluation with what was expected of it, in percent, and prints both.

    Raises:
      RunFailed: they differ by more than 0.05.
    """
    far = False
    for name, wanted in (("top1", top1), ("top5", top5)):
        difference = result[name] - wanted
        print(
            f"{name}: expected {wanted:.2f}, got {result[name]:.2f}, difference {difference:+.2f}"
        )
        # Percentages are stated with two digits: so is the comparison.
        far |= not abs(round(difference, 2)) <= EXPECTED_WITHIN
    if far:
        raise RunFailed(f"the result is not within {EXPECTED_WITHIN} of what was expected")
