"""The head of a new run, fitted to the features of the checkpoint's backbone (config.fit_head)."""

import contextlib
import sys
from collections.abc import Generator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tqdm

from mbv2_jax.data import loader
from mbv2_jax.data.workers import Batch
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.spec import Preprocessing
from mbv2_jax.tasks.task import Task, Transferred
from mbv2_jax.training import evaluation
from mbv2_jax.training.plan import Plan

# The features of this many images take 100 MB, and more of them hardly improve a linear head.
LIMIT = 20_000


def fit_head(run: Plan, variables: Mapping[str, Any]) -> Transferred:
    """Returns a run's first variables, with a head fitted to its training images.

    The images are prepared as for evaluation, and normalised with the running statistics. Of more
    than `LIMIT` images, that many are drawn with the run's seed.

    Args:
      run: the plan of the run.
      variables: {"params", "batch_stats"} of numpy or jax arrays, with any head.

    Raises:
      UserError: the task cannot fit its head, or an image is unreadable and data.corrupt is
        "raise".
    """
    count = min(len(run.train_source), LIMIT)
    extract = _jitted_features(run.task, run.evaluation.network, run.spec.preprocessing, run.mesh)
    everywhere = mesh_lib.replicated(run.mesh)
    placed = jax.device_put(dict(variables), everywhere)
    found = []
    hidden = not sys.stderr.isatty()
    bar = tqdm.tqdm(total=count, unit="image", desc="extracting features", disable=hidden)
    batches = _batches(run, count)
    with contextlib.closing(batches), bar:
        for batch in mesh_lib.prefetch(batches, run.mesh):
            found.append(jax.device_get(extract(placed, batch)))
            bar.update(int(found[-1]["mask"].sum()))
    rows = evaluation.in_order(found, count)
    fitted = run.task.fit_head(variables, rows)
    # Hosts may round differently: all of them start from the first one's head.
    return fitted._replace(variables=mesh_lib.from_first(fitted.variables))


def _batches(run: Plan, count: int) -> Generator[Batch, None, None]:
    """Yields this process's rows of the first `count` training examples of the first epoch."""
    data, batch_size, process = run.settings.data, run.evaluation.batch_size, mesh_lib.process()
    batches = loader.train_batches(
        run.train_source,
        run.evaluation.transform,
        run.task,
        batch_size=batch_size,
        seed=run.settings.run.seed,
        start=0,
        stop=-(-count // batch_size),
        workers=data.workers,
        corrupt=data.corrupt,
        **process,
    )
    with contextlib.closing(batches):
        for number, batch in enumerate(batches):
            batch.pop("skipped", None)
            rows = len(batch["image"])
            first = number * batch_size + process["process_index"] * rows
            positions = np.arange(first, first + rows, dtype=np.int32)
            # The last batch is filled up with examples that come again.
            yield batch | {"index": positions, "mask": positions < count}


def _jitted_features(
    task: Task, network: nn.Module, preprocessing: Preprocessing, mesh: Any
) -> Any:
    """Returns the jitted function (variables, batch) -> rows of features and targets."""

    def extract(
        variables: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        images = preprocessing.normalize(batch["image"], network.dtype)
        single = {name: array for name, array in batch.items() if array.ndim == 1}
        return single | {"features": task.features(network, variables, images)}

    everywhere = mesh_lib.replicated(mesh)
    shardings = (everywhere, mesh_lib.split(mesh))
    return jax.jit(extract, in_shardings=shardings, out_shardings=everywhere)
