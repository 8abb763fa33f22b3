"""Training from a config: steps, evaluations and checkpoints, then the model."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.data import labels, loader
from mbv2_jax.errors import RunFailed, first_line
from mbv2_jax.models import profile
from mbv2_jax.runtime import memory, processes, shared_folder
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.runtime.processes import Group
from mbv2_jax.runtime.profiler import StepTrace
from mbv2_jax.runtime.stop import StopRequest
from mbv2_jax.storage import atomic, bucket, lock
from mbv2_jax.training import checkpoint as checkpoints_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import evaluation, input_wait
from mbv2_jax.training import program as program_lib
from mbv2_jax.training import workdir as workdir_lib
from mbv2_jax.training.checkpoint import Checkpoints
from mbv2_jax.training.evaluation import Result
from mbv2_jax.training.log import RunLog
from mbv2_jax.training.plan import Plan, check_current, plan
from mbv2_jax.training.skipped import Skipped
from mbv2_jax.training.state import TrainState


def train(
    config: ConfigDict,
    workdir: str | None,
    checkpoint: str | None = None,
    group: Group | None = None,
) -> Result | None:
    """Trains as `config` says, in `workdir`, and evaluates the outcome.

    Args:
      config: from a recipe; what it leaves open is the checkpoint's or the data's.
      workdir: goes on from its newest checkpoint if it holds one.
      checkpoint: else the weights to start from: whatever model_dir.read opens.
      group: the processes of the run; None: this process has no others.

    Returns:
      {"top1", "top5", "loss", "examples"} of the last evaluation; None if SIGTERM or SIGINT asked
      the run to stop, which then can be continued.

    Raises:
      UserError: see `plan`. RunFailed: the loss became infinite or NaN, or an evaluation failed.
    """
    group = group or processes.single()
    run = plan(config, workdir, checkpoint, group)
    with _ending_in_a_line(run.workdir):
        workdir_lib.make_writable(run.workdir)
        shared_folder.check_shared(run.workdir, group)
        with lock.exclusive(run.workdir, acquire=group.index == 0) as still_ours:
            if group.index == 0:
                check_current(run)
                checkpoints_lib.set_aside(run.workdir, run.damaged)
            group.exchange("readiness of the workdir", True)
            return _train_here(run, still_ours)


@contextlib.contextmanager
def _ending_in_a_line(workdir: pathlib.Path) -> Iterator[None]:
    """Says of what ends a run, a disk that is full or gone perhaps, which checkpoint it left."""
    try:
        with bucket.as_oserror(workdir):
            yield
    except (RunFailed, OSError) as failure:
        text = str(failure)
        if isinstance(failure, OSError):
            text = f"{failure.filename or workdir}: {first_line(failure)}"
        raise RunFailed(f"{text}; last good checkpoint: {_last_good(workdir)}") from None


def _last_good(workdir: pathlib.Path) -> str:
    try:
        with bucket.as_oserror(workdir):
            steps = model_dir.training_steps(workdir)
    except OSError:
        return "it cannot be seen now"
    return str(workdir / "checkpoints" / str(steps[-1])) if steps else "none was saved yet"


def _train_here(run: Plan, still_ours: Callable[[], None]) -> Result | None:
    """Trains, and writes the model, in a workdir that is this run's alone."""
    with StopRequest() as stop, Checkpoints(run.workdir, run.config.checkpoint) as checkpoints:
        state, result = _go_on(run, checkpoints, stop, still_ours)
    step = int(state.step)
    if step < run.total_steps:
        processes.say(
            f"stopped after step {step} of {run.total_steps}; it is saved: give the same command "
            "again to continue"
        )
        return None
    result = result or _score(run, state)
    if processes.index() == 0:
        still_ours()
        weights = jax.device_get(state.evaluated())
        model_dir.write(run.workdir / "model", **weights, info=run.info(step))
    processes.say(f"model: {run.workdir / 'model'}   curves: {run.workdir / 'curves.png'}")
    return result


def _go_on(
    run: Plan, checkpoints: Checkpoints, stop: StopRequest, still_ours: Callable[[], None]
) -> tuple[TrainState, Result | None]:
    """Trains from where the run is to its end; returns what `_run_steps` does."""
    state, step_fn = prepare(run, checkpoints)
    if processes.index() == 0:
        atomic.write_json(run.workdir / "config.json", run.config.to_dict())
    step = int(state.step)
    if step >= run.total_steps:
        processes.say(f"already finished (step {step} of {run.total_steps}): nothing to train")
        return state, None
    if run.resumed_step is not None:
        processes.say(f"continuing after step {run.resumed_step}")
    if run.mesh.size > 1:
        processes.say(f"training on {mesh_lib.describe(run.mesh)}")
    return _run_logged(run, state, step_fn, checkpoints, stop, still_ours)


def _run_logged(
    run: Plan,
    state: TrainState,
    step_fn: Callable[..., Any],
    checkpoints: Checkpoints,
    stop: StopRequest,
    still_ours: Callable[[], None],
) -> tuple[TrainState, Result | None]:
    """Does `_run_steps` with a log."""
    log = RunLog(
        run.workdir,
        start=int(state.step),
        stop=run.total_steps,
        steps_per_epoch=run.steps_per_epoch,
        batch_size=run.config.batch_size,
        every_steps=run.config.log.every_steps,
        remedy=input_wait.remedy(run.config.data),
        still_ours=still_ours,
    )
    with log:
        outcome = _run_steps(run, state, step_fn, checkpoints, log, stop)
        log.draw(now=True)
    return outcome


def prepare(
    run: Plan, checkpoints: Checkpoints | None = None
) -> tuple[TrainState, Callable[..., Any]]:
    """Returns the state to begin with, on the devices, and the jitted training step.

    Only a run that goes on needs its checkpoints.
    """
    config, key = run.config, jax.random.key(run.config.seed)
    program = program_lib.build(config, run.model, run.mesh, run.steps_per_epoch, run.total_steps)
    if run.resumed_step is not None:
        assert checkpoints is not None
        state = checkpoints.restore(run.resumed_step, program.state, config)
    else:
        state = program.create(key)
        if run.start_from is not None:
            state = program.restart(_with_weights(run, state.evaluated()))
    return state, lambda state, batch: program.step(state, batch, key)


def _with_weights(run: Plan, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `fresh` variables with the checkpoint's in their place.

    The classifier comes along only where its classes are the same ones.
    """
    saved = run.start_from
    assert saved is not None
    params = dict(saved.params)
    names = run.train_source.class_names
    if not labels.same(names, saved.class_names):
        params["classifier"] = fresh["params"]["classifier"]
        why = f"its {len(saved.class_names)} classes are not these {len(names)}"
        if saved.features_only:
            why = "it has none"
        processes.say(f"starting from {saved.path} with a new classifier: {why}")
    else:
        processes.say(f"starting from {saved.path}, classifier included")
    variables = {"params": params, "batch_stats": saved.batch_stats}
    return jax.tree.map(lambda new, old: np.asarray(old, new.dtype), dict(fresh), variables)


def _run_steps(
    run: Plan,
    state: TrainState,
    step_fn: Callable[..., Any],
    checkpoints: Checkpoints,
    log: RunLog,
    stop: StopRequest,
) -> tuple[TrainState, Result | None]:
    """Steps from where `state` is to the end, or until asked to stop.

    Returns the state and, if the last step was done here, its evaluation.
    """
    config, start = run.config, int(state.step)
    eval_every = run.steps(config.log.eval_every_epochs)
    save_every = config.checkpoint.every_steps or run.steps(config.checkpoint.every_epochs)
    result: Result | None = None
    log.say("compiling the training step: seconds to minutes")
    skipped = Skipped(run.train_source, log.say_everywhere)
    with (
        _train_batches(run, start, skipped) as batches,
        StepTrace(
            config.profile,
            run.workdir,
            start=start,
            stop=run.total_steps,
            wait=log.flush,
            say=log.say,
            say_everywhere=log.say_everywhere,
        ) as trace,
    ):
        for step, batch in trace.around(enumerate(log.timed(batches), start=start + 1)):
            state, metrics = step_fn(state, batch)
            if step == start + 1:
                memory.release_freed_memory()  # it was compiled
            log.step(step, metrics | skipped.metrics())
            checkpoints.check()
            stopping, result = stop.reached(step), None
            if run.due(step, eval_every):
                # Part of the step, also of the one that a signal makes the last: else the run that
                # goes on would lack this evaluation.
                log.flush()
                result = _score(run, state)
                log.evaluation(step, result)
                log.draw()
            if run.due(step, save_every) or stopping:
                log.flush()
                checkpoints.save(state, config, run.info(step), result)
            if stopping:
                break
    log.flush()
    skipped.summary()
    return state, result


@contextlib.contextmanager
def _train_batches(
    run: Plan, start: int, skipped: Skipped
) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """The training batches from `start` on, on the devices; their workers end with the block."""
    data = run.config.data
    batches = loader.train_batches(
        run.train_source,
        run.train_transform,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        start=start,
        stop=run.total_steps,
        workers=data.workers,
        last_batch=data.last_batch,
        repeats=data.repeats,
        corrupt=data.corrupt,
        decode_as=data.train_decode,
        **mesh_lib.process(),
    )
    with contextlib.closing(batches):
        yield mesh_lib.prefetch(map(skipped.take_out, batches), run.mesh)


def _score(run: Plan, state: TrainState) -> Result:
    return evaluation.score(
        state.evaluated(),
        run.eval_source,
        run.eval_transform,
        model=run.model,
        config=run.config,
        mesh=run.mesh,
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
