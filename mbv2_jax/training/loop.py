"""Training and evaluation from a config: checks first, then steps, then the model."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.data import loader, sources, transforms
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.models import profile
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.tasks import classification
from mbv2_jax.training import checkpoint as checkpoints_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import mesh as mesh_lib
from mbv2_jax.training import optimizer as optimizer_lib
from mbv2_jax.training import state as state_lib
from mbv2_jax.training import step as step_lib
from mbv2_jax.training.checkpoint import Checkpoints
from mbv2_jax.training.logging import RunLog
from mbv2_jax.training.state import TrainState

Result = dict[str, float | int]
EXPECTED_WITHIN = 0.05  # percentage points that --expect allows


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run whose every part was checked; nothing of it is compiled or written yet."""

    config: ConfigDict
    workdir: pathlib.Path
    train_source: sources.Source
    eval_source: sources.Source
    train_transform: transforms.Transform
    eval_transform: transforms.Transform
    start_from: model_dir.SavedModel | None  # weights to start from; None: random, or a resumed run
    resumed_step: int | None
    mesh: Mesh
    model: MobileNetV2
    steps_per_epoch: int
    total_steps: int

    def info(self, step: int) -> dict[str, Any]:
        """Returns the model.json of this run after `step`."""
        text = json.dumps(self.config.to_dict(), sort_keys=True)
        origin = {
            "kind": "trained by mbv2_jax",
            "step": step,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        fields = config_lib.model_fields(self.config)
        return model_dir.describe(fields, tuple(self.train_source.class_names), origin)

    def due(self, step: int, every_steps: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens at `step`."""
        return step % every_steps == 0 or step == self.total_steps

    def steps(self, epochs: float) -> int:
        """Turns a duration in epochs into steps: the one place where this is done."""
        return max(1, round(epochs * self.steps_per_epoch))


def plan(config: ConfigDict, workdir: str | None, checkpoint: str | None) -> Plan:
    """Checks all that can be checked before anything is compiled or written.

    Raises:
      UserError: whatever is wrong with the config, the data, the checkpoint or the workdir.
    """
    config_lib.check(config)
    if not workdir:
        raise UserError("--workdir=DIR is missing: training keeps its checkpoints and logs there")
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir {path} is a file: give a directory")
    mesh = mesh_lib.create()
    mesh_lib.check_batch(mesh, config.batch_size)
    data = config.data
    train_source = sources.open_source(data.source, data.train_split, data.data_dir)
    eval_source = sources.open_source(data.source, data.eval_split, data.data_dir)
    if train_source.class_names != eval_source.class_names:
        odd = sorted(set(train_source.class_names) ^ set(eval_source.class_names))
        raise UserError(
            f"{data.source}: the classes of {data.train_split!r} and {data.eval_split!r} differ; "
            f"in only one of them: {', '.join(odd[:5])}"
        )
    # Where a run begins, in this order: the newest checkpoint in its workdir; the weights of
    # --checkpoint; random weights.
    resumed = max(model_dir.training_steps(path), default=None)
    previous = checkpoints_lib.saved_config(path, resumed) if resumed is not None else None
    start_from = model_dir.read(checkpoint) if checkpoint and resumed is None else None
    config = config_lib.resolve(config, train_source.class_names, start_from, previous)
    if previous is not None:
        for line in checkpoints_lib.differences(previous, config.to_dict()):
            print(f"changed since step {resumed}: {line}", file=sys.stderr)
    steps_per_epoch = loader.steps_per_epoch(
        len(train_source), config.batch_size, config.data.last_batch
    )
    return Plan(
        config=config,
        workdir=path,
        train_source=train_source,
        eval_source=eval_source,
        train_transform=transforms.make_transform(data.train_transforms, config.data.image_size),
        eval_transform=_eval_transform(config.data.eval_transforms, config.data.image_size),
        start_from=start_from,
        resumed_step=resumed,
        mesh=mesh,
        model=config_lib.model(config),
        steps_per_epoch=steps_per_epoch,
        total_steps=max(1, round(config.num_epochs * steps_per_epoch)),
    )


def train(config: ConfigDict, workdir: str | None, checkpoint: str | None = None) -> Result | None:
    """Trains as `config` says, in `workdir`, and evaluates the outcome.

    Args:
      config: from a recipe; what it leaves open is the checkpoint's or the data's.
      workdir: goes on from its newest checkpoint if it holds one.
      checkpoint: else the weights to start from: a model directory or a workdir.

    Returns:
      {"top1", "top5", "loss", "examples"} of the last evaluation; None if SIGTERM or SIGINT asked
      the run to stop, which then can be continued.

    Raises:
      UserError: see `plan`. RunFailed: the loss became infinite or NaN, or an evaluation failed.
    """
    run = plan(config, workdir, checkpoint)
    config = run.config
    run.workdir.mkdir(parents=True, exist_ok=True)
    with (
        StopRequest() as stop,
        Checkpoints(run.workdir, config.checkpoint) as checkpoints,
    ):
        state, step_fn = _prepare(run, checkpoints)
        start = int(state.step)
        _write_json(run.workdir / "config.json", config.to_dict())
        log = RunLog(
            run.workdir,
            start=start,
            stop=run.total_steps,
            steps_per_epoch=run.steps_per_epoch,
            batch_size=config.batch_size,
            every_steps=config.log.every_steps,
        )
        with log:
            try:
                state, result = _run_steps(run, state, step_fn, checkpoints, log, stop)
            except RunFailed as failure:
                checkpoints.wait()
                last = checkpoints.latest()
                good = "none was saved yet" if last is None else checkpoints.directory / str(last)
                raise RunFailed(f"{failure}; last good checkpoint: {good}") from None
            log.draw(now=True)
            if int(state.step) < run.total_steps:
                log.say(
                    f"stopped after step {int(state.step)} of {run.total_steps}; it is saved: give "
                    "the same command again to continue"
                )
                return None
            result = result or _score(run, state)
            model_dir.write(
                run.workdir / "model",
                **jax.device_get(state.evaluated()),
                info=run.info(int(state.step)),
            )
            log.say(f"model: {run.workdir / 'model'}   curves: {run.workdir / 'curves.png'}")
    return result


def _prepare(run: Plan, checkpoints: Checkpoints) -> tuple[TrainState, Callable[..., Any]]:
    """Returns the state to begin with, on the devices, and the jitted training step."""
    config, everywhere = run.config, mesh_lib.replicated(run.mesh)
    key = jax.random.key(config.seed)
    image = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), np.float32)
    shapes = jax.eval_shape(run.model.init, key, image)["params"]
    rate = optimizer_lib.schedule(config, run.steps_per_epoch, run.total_steps)
    optimizer = optimizer_lib.create(config, rate, shapes)
    with_ema = config.ema.decay is not None
    create = functools.partial(
        state_lib.create,
        model=run.model,
        optimizer=optimizer,
        image_size=config.data.image_size,
        with_ema=with_ema,
    )
    if run.resumed_step is not None:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(create, key),
        )
        state = checkpoints.restore(run.resumed_step, like, config)
        print(f"continuing after step {run.resumed_step}", file=sys.stderr)
    else:
        state = jax.jit(create, out_shardings=everywhere)(key)
        if run.start_from is not None:
            variables = _with_weights(run, state.evaluated())
            restart = functools.partial(
                state_lib.from_variables, optimizer=optimizer, with_ema=with_ema
            )
            state = jax.jit(restart, out_shardings=everywhere)(variables)
    step = functools.partial(
        step_lib.train_step,
        model=run.model,
        optimizer=optimizer,
        learning_rate=rate,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema.decay,
    )
    split = mesh_lib.split(run.mesh)
    jitted = jax.jit(
        step,
        in_shardings=(everywhere, split, everywhere),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )
    return state, lambda state, batch: jitted(state, batch, key)


def _with_weights(run: Plan, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `fresh` variables with the checkpoint's in their place.

    The classifier comes along only where its classes are the same ones, name by name.
    """
    saved = run.start_from
    assert saved is not None
    params = dict(saved.params)
    names = tuple(run.train_source.class_names)
    if saved.class_names != names:
        params["classifier"] = fresh["params"]["classifier"]
        print(
            f"starting from {saved.path} with a new classifier: its {len(saved.class_names)} "
            f"classes are not these {len(names)}",
            file=sys.stderr,
        )
    else:
        print(f"starting from {saved.path}, classifier included", file=sys.stderr)
    variables = {"params": params, "batch_stats": saved.batch_stats}
    return jax.tree.map(lambda new, old: np.asarray(old, new.dtype), dict(fresh), variables)


def _run_steps(
    run: Plan,
    state: TrainState,
    step_fn: Callable[..., Any],
    checkpoints: Checkpoints,
    log: RunLog,
    stop: "StopRequest",
) -> tuple[TrainState, Result | None]:
    """Steps from where `state` is to the end, or until asked to stop.

    Returns the state and, if the last step was done here, its evaluation.
    """
    config, start = run.config, int(state.step)
    eval_every = run.steps(config.log.eval_every_epochs)
    save_every = config.checkpoint.every_steps or run.steps(config.checkpoint.every_epochs)
    result: Result | None = None
    with _train_batches(run, start) as batches:
        for step, batch in enumerate(batches, start=start + 1):
            state, metrics = step_fn(state, batch)
            log.step(step, metrics)
            result = None
            if run.due(step, eval_every):
                # Part of the step, also of the one that a signal makes the last: else the run that
                # goes on would lack this evaluation.
                log.flush()
                result = _score(run, state)
                log.evaluation(step, result)
                log.draw()
            if run.due(step, save_every) or stop.requested:
                log.flush()
                checkpoints.save(state, config, run.info(step), result)
            if stop.requested:
                break
    log.flush()
    return state, result


@contextlib.contextmanager
def _train_batches(run: Plan, start: int) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """The training batches from `start` on, on the devices; their workers end with the block."""
    data = run.config.data
    batches = loader.train_batches(
        run.train_source,
        run.train_transform,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        start=start,
        stop=max(start, run.total_steps),
        workers=data.workers,
        last_batch=data.last_batch,
        **mesh_lib.process(),
    )
    with contextlib.closing(batches):
        yield mesh_lib.prefetch(batches, run.mesh)


def _score(run: Plan, state: TrainState) -> Result:
    return score(
        state.evaluated(),
        run.eval_source,
        run.eval_transform,
        model=run.model.clone(frozen_stages=-1, remat=False),
        config=run.config,
        mesh=run.mesh,
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
    mesh = mesh_lib.create()
    mesh_lib.check_batch(mesh, config.batch_size)
    return score(
        {"params": saved.params, "batch_stats": saved.batch_stats},
        source,
        _eval_transform(config.data.eval_transforms, config.data.image_size),
        model=config_lib.model(config).clone(frozen_stages=-1, remat=False),
        config=config,
        mesh=mesh,
        progress=True,
    )


def info(config: ConfigDict) -> str:
    """Returns the layers, parameters and multiply-adds of a config's network as text."""
    config_lib.check(config)
    config = config_lib.with_defaults(config)
    measured = profile.profile(config_lib.model(config), config.data.image_size)
    lines = [
        profile.table(measured),
        "",
        f"image size     {config.data.image_size} x {config.data.image_size}",
        f"parameters     {measured.params:,}",
        f"multiply-adds  {measured.multiply_adds:,}",
        f"page's count   {measured.page_count / 1e9:.3f} G  (mmpretrain's: BatchNorm, ReLU6 and "
        "pooling counted, the classifier not)",
    ]
    if config.model.num_classes is None:
        lines.append("model.num_classes is not set: the classifier is left out")
    return "\n".join(lines)


def check_expected(result: Mapping[str, float], expect: str) -> None:
    """Compares an evaluation with "TOP1,TOP5" and prints both.

    Raises:
      UserError: `expect` is not two numbers. RunFailed: they differ by more than 0.05.
    """
    try:
        top1, top5 = (float(number) for number in expect.split(","))
    except ValueError:
        raise UserError(f"--expect={expect}: give TOP1,TOP5, such as 71.86,90.42") from None
    far = False
    for name, wanted in (("top1", top1), ("top5", top5)):
        difference = result[name] - wanted
        print(f"{name}: expected {wanted:.2f}, got {result[name]:.2f}, difference {difference:+.2f}")
        # Percentages are stated with two digits: so is the comparison.
        far |= not abs(round(difference, 2)) <= EXPECTED_WITHIN
    if far:
        raise RunFailed(f"the result is not within {EXPECTED_WITHIN} of what was expected")


class StopRequest:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one acts as it always does."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        del frame
        self.requested = True
        print(
            f"{signal.Signals(number).name}: finishing the step and saving; once more ends at once",
            file=sys.stderr,
        )
        for each, handler in self._before.items():
            signal.signal(each, handler)


def _eval_transform(spec: str, image_size: int) -> transforms.Transform:
    transform = transforms.make_transform(spec, image_size)
    if transform.random:
        raise UserError(f"data.eval_transforms {spec!r} is random: evaluation must not be")
    return transform


def _write_json(path: pathlib.Path, value: Any) -> None:
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps(value, indent=2) + "\n")
    fresh.replace(path)

