"""Training from a config: steps, evaluations and checkpoints, then the model."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.data import labels, loader
from mbv2_jax.errors import RunFailed
from mbv2_jax.models import profile
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import evaluation, input_wait
from mbv2_jax.training import mesh as mesh_lib
from mbv2_jax.training import optimizer as optimizer_lib
from mbv2_jax.training import state as state_lib
from mbv2_jax.training import step as step_lib
from mbv2_jax.training import workdir as workdir_lib
from mbv2_jax.training.checkpoint import Checkpoints
from mbv2_jax.training.evaluation import Result
from mbv2_jax.training.logging import RunLog
from mbv2_jax.training.plan import Plan, plan
from mbv2_jax.training.skipped import Skipped
from mbv2_jax.training.state import TrainState
from mbv2_jax.training.stop import StopRequest
from mbv2_jax.training.trace import Trace


def train(config: ConfigDict, workdir: str | None, checkpoint: str | None = None) -> Result | None:
    """Trains as `config` says, in `workdir`, and evaluates the outcome.

    Args:
      config: from a recipe; what it leaves open is the checkpoint's or the data's.
      workdir: goes on from its newest checkpoint if it holds one.
      checkpoint: else the weights to start from: whatever model_dir.read opens.

    Returns:
      {"top1", "top5", "loss", "examples"} of the last evaluation; None if SIGTERM or SIGINT asked
      the run to stop, which then can be continued.

    Raises:
      UserError: see `plan`. RunFailed: the loss became infinite or NaN, or an evaluation failed.
    """
    run = plan(config, workdir, checkpoint)
    workdir_lib.make_writable(run.workdir)
    with (
        workdir_lib.alone_in(run.workdir) as still_ours,
        StopRequest() as stop,
        Checkpoints(run.workdir, run.config.checkpoint) as checkpoints,
    ):
        state, step_fn = prepare(run, checkpoints)
        workdir_lib.write_json(run.workdir / "config.json", run.config.to_dict())
        result: Result | None = None
        if int(state.step) < run.total_steps:
            if run.resumed_step is not None:
                print(f"continuing after step {run.resumed_step}", file=sys.stderr)
            state, result = _run_logged(run, state, step_fn, checkpoints, stop, still_ours)
        else:
            done = f"step {int(state.step)} of {run.total_steps}"
            print(f"already finished ({done}): nothing to train", file=sys.stderr)
        if int(state.step) < run.total_steps:
            print(
                f"stopped after step {int(state.step)} of {run.total_steps}; it is saved: give the "
                "same command again to continue",
                file=sys.stderr,
            )
            return None
        result = result or _score(run, state)
        weights = jax.device_get(state.evaluated())
        still_ours()
        model_dir.write(run.workdir / "model", **weights, info=run.info(int(state.step)))
    print(f"model: {run.workdir / 'model'}   curves: {run.workdir / 'curves.png'}", file=sys.stderr)
    return result


def _run_logged(
    run: Plan,
    state: TrainState,
    step_fn: Callable[..., Any],
    checkpoints: Checkpoints,
    stop: StopRequest,
    still_ours: Callable[[], None],
) -> tuple[TrainState, Result | None]:
    """Does `_run_steps` with a log; a failure names the checkpoint from which to go on."""
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
        try:
            outcome = _run_steps(run, state, step_fn, checkpoints, log, stop)
        except RunFailed as failure:
            checkpoints.wait()
            last = checkpoints.latest()
            good = "none was saved yet" if last is None else checkpoints.directory / str(last)
            raise RunFailed(f"{failure}; last good checkpoint: {good}") from None
        log.draw(now=True)
    return outcome


def prepare(
    run: Plan, checkpoints: Checkpoints | None = None
) -> tuple[TrainState, Callable[..., Any]]:
    """Returns the state to begin with, on the devices, and the jitted training step.

    Only a run that goes on needs its checkpoints.
    """
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
        assert checkpoints is not None
        state = checkpoints.restore(run.resumed_step, like, config)
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
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        ema_decay=config.ema.decay,
        ema_every_steps=config.ema.every_steps,
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
        print(f"starting from {saved.path} with a new classifier: {why}", file=sys.stderr)
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
        Trace(
            config.profile,
            run.workdir,
            start=start,
            stop=run.total_steps,
            wait=log.flush,
            say=log.say,
        ) as trace,
    ):
        for step, batch in trace.around(enumerate(log.timed(batches), start=start + 1)):
            state, metrics = step_fn(state, batch)
            log.step(step, metrics | skipped.metrics())
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
