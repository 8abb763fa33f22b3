"""Training from a config: steps, evaluations and checkpoints, then the model."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mbv2_jax import checkpoint_names, model_dir
from mbv2_jax.data import loader
from mbv2_jax.errors import RunFailed, UserError, first_line
from mbv2_jax.runtime import memory, processes, shared_folder
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.runtime.processes import Group
from mbv2_jax.runtime.profiler import StepTrace
from mbv2_jax.runtime.stop import StopRequest
from mbv2_jax.storage import atomic, bucket, lock
from mbv2_jax.training import checkpoint as checkpoints_lib
from mbv2_jax.training import ending, program
from mbv2_jax.training import workdir as workdir_lib
from mbv2_jax.training.best import Best
from mbv2_jax.training.checkpoint import Checkpoints
from mbv2_jax.training.evaluation import Result, Score
from mbv2_jax.training.fit_head import fit_head
from mbv2_jax.training.log import RunLog, read_lines
from mbv2_jax.training.plan import Plan, check_current, plan
from mbv2_jax.training.program import Program
from mbv2_jax.training.skipped import Skipped
from mbv2_jax.training.state import TrainState


def train(
    config: ConfigDict, workdir: str | None, checkpoint: str | None, group: Group
) -> Result | None:
    """Trains a config's network in `workdir`, and evaluates the result.

    Args:
      config: the config of a recipe; the checkpoint or the data decides the fields that it leaves
        open.
      workdir: the run's folder; the run continues from its newest checkpoint if there is one.
      checkpoint: the weights to start from otherwise: anything that model_dir.read opens.
      group: the processes of the run.

    Returns:
      The evaluation of the model; None if SIGTERM or SIGINT asked the run to stop, which can
      then be continued.

    Raises:
      UserError: see `plan`. RunFailed: the loss became infinite or NaN, an evaluation failed, or
        something cannot be written.
    """
    run = plan(config, workdir, checkpoint, group)
    key = jax.random.key(run.settings.run.seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_naming_last_checkpoint(run.workdir))
        still_ours = stack.enter_context(_claimed(run))
        checkpoints = stack.enter_context(Checkpoints(run.workdir, run.settings.checkpoint))

        functions = program.build(
            run.settings, run.spec, run.task, run.mesh, run.steps_per_epoch, run.total_steps
        )
        state = _first_state(run, functions, checkpoints)
        step = start = int(state.step)
        if group.index == 0:
            atomic.write_json(run.workdir / "config.json", run.config)
        best = _best_so_far(run)
        if start >= run.total_steps or run.has_stalled(best):
            processes.say(f"{_why_finished(run, start, best)}: nothing to train")
            return _finish(run, state, best, None, still_ours)
        _announce(run)

        # Until here there is nothing to save, and a signal ends the process.
        stop = stack.enter_context(StopRequest())
        log = stack.enter_context(RunLog(run, start, still_ours))
        skipped = Skipped(run.train_source, log.say_everywhere)
        batches = stack.enter_context(_train_batches(run, start, skipped))
        trace = stack.enter_context(_trace(run, start, log))
        log.say("compiling the training step: seconds to minutes")
        score: Score | None = None
        for step, batch in trace.around(enumerate(log.timed(batches), start=start + 1)):
            state, metrics = functions.step(state, batch, key)
            if step == start + 1:
                memory.release_freed_memory()  # that compiling used
            log.step(step, metrics | skipped.metrics())
            checkpoints.check()
            stopping, score = stop.reached(step), None
            if run.is_due(step, run.eval_every):
                # This is part of the step, even if a signal makes it the last one: the run that
                # continues from here will not repeat this evaluation.
                log.flush()
                score = run.evaluation.score(state.evaluated())
                best = best.after(step, score.result)
                log.evaluation(step, score.result)
                log.draw()
            ended = step == run.total_steps or run.has_stalled(best)
            if run.must_save(step, best) or stopping or ended:
                log.flush()
                result = score.result if score else None
                checkpoints.save(state, run.config, run.description(step, best), result)
            if stopping or ended:
                break
        log.flush()
        skipped.summary()
        log.draw(now=True)
        log.close()
        checkpoints.finish()
        if ended:
            if step < run.total_steps:
                processes.say(
                    f"ended early after step {step} of {run.total_steps}: {_why_early(run, best)}"
                )
            return _finish(run, state, best, score, still_ours)
        processes.say(
            f"stopped after step {step} of {run.total_steps}; it is saved: give the same command "
            "again to continue"
        )
        return None


@contextlib.contextmanager
def _naming_last_checkpoint(workdir: pathlib.Path) -> Iterator[None]:
    """Re-raises a failure, such as a full disk, with the path of the last checkpoint appended."""
    try:
        with bucket.as_oserror(workdir):
            yield
    except (RunFailed, OSError) as failure:
        text = str(failure)
        if isinstance(failure, OSError):
            text = f"{failure.filename or workdir}: {first_line(failure)}"
        raise RunFailed(f"{text}; last good checkpoint: {_last_checkpoint(workdir)}") from None


def _last_checkpoint(workdir: pathlib.Path) -> str:
    try:
        with bucket.as_oserror(workdir):
            steps = model_dir.training_steps(workdir)
    except OSError:
        return "it cannot be seen now"
    return str(workdir / "checkpoints" / str(steps[-1])) if steps else "none was saved yet"


@contextlib.contextmanager
def _claimed(run: Plan) -> Iterator[Callable[[], None]]:
    """Locks the workdir for this run, after checking that all of its processes can write there.

    Yields:
      A function that raises RunFailed if the workdir is another run's by now.
    """
    workdir_lib.make_writable(run.workdir)
    shared_folder.check_shared(run.workdir, run.group)
    with lock.exclusive(run.workdir, acquire=run.group.index == 0) as still_ours:
        if run.group.index == 0:
            check_current(run)
            checkpoints_lib.set_aside(run.workdir, run.damaged)
        run.group.exchange("readiness of the workdir", True)
        yield still_ours


def _first_state(run: Plan, functions: Program, checkpoints: Checkpoints) -> TrainState:
    """Returns the state to begin with, on the devices."""
    if run.resumed_step is not None:
        return checkpoints.restore(run.resumed_step, functions.state, run.config)
    state = functions.create(jax.random.key(run.settings.run.seed))
    if run.start_from is None:
        return state
    fresh = state.evaluated()
    transferred = run.task.transfer(run.start_from, fresh)
    processes.say(transferred.note)
    if run.settings.run.fit_head:
        if transferred.new_head:
            transferred = fit_head(run, transferred.variables)
            processes.say(transferred.note)
        else:
            processes.say("fit_head: the checkpoint's head is kept, since it fits these data")
    return functions.restart(
        jax.tree.map(
            lambda new, old: np.asarray(old, new.dtype), dict(fresh), transferred.variables
        )
    )


def _why_finished(run: Plan, start: int, best: Best) -> str:
    if not run.total_steps:
        return "num_epochs is 0"
    how = f"; {_why_early(run, best)}" if start < run.total_steps else ""
    return f"already finished (step {start} of {run.total_steps}{how})"


def _announce(run: Plan) -> None:
    if run.resumed_step is not None:
        processes.say(f"continuing after step {run.resumed_step}")
    if run.mesh.size > 1:
        processes.say(f"training on {mesh_lib.describe(run.mesh)}")


@contextlib.contextmanager
def _train_batches(
    run: Plan, start: int, skipped: Skipped
) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """Yields the batches after step `start`, on the devices; their workers end with the block."""
    data = run.settings.data
    batches = loader.train_batches(
        run.train_source,
        run.train_transform,
        run.task,
        batch_size=run.settings.run.batch_size,
        seed=run.settings.run.seed,
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


def _trace(run: Plan, start: int, log: RunLog) -> StepTrace:
    return StepTrace(
        run.settings.run.profile,
        run.workdir,
        start=start,
        stop=run.total_steps,
        wait=log.flush,
        say=log.say,
        say_everywhere=log.say_everywhere,
    )


def _best_so_far(run: Plan) -> Best:
    """Returns the best evaluation up to the checkpoint from which the run continues."""
    metric = run.settings.checkpoint.best_metric
    assert metric is not None  # config.read names one
    if run.resumed_step is None:
        return Best(metric)
    config = checkpoints_lib.saved_config(run.workdir, run.resumed_step)
    if not checkpoint_names.same_evaluation(config, run.config):
        processes.say("the evaluation is another one now: what was the best before does not count")
        return Best(metric)
    saved = checkpoints_lib.saved_description(run.workdir, run.resumed_step)
    best = Best.continued(saved.origin, metric, run.total_steps)
    if best.step is None:  # an older version did not record it, or it was chosen by another metric
        steps = model_dir.training_steps(run.workdir)
        for step, result in checkpoint_names.results(run.workdir, steps, run.config).items():
            best = best.after(step, result)
    # All processes end the run at the same step, even if one of them sees an old listing.
    known = run.group.exchange("best step", [best.step, dict(best.result), best.stale])[0]
    return Best(metric, *known)


def _why_early(run: Plan, best: Best) -> str:
    return (
        f"{best.stale} evaluations, and checkpoint.patience allows "
        f"{run.settings.checkpoint.patience}, did not improve on {best.describe(best.result)} "
        f"(step {best.step})"
    )


def _finish(
    run: Plan, state: TrainState, best: Best, score: Score | None, still_ours: Callable[[], None]
) -> Result:
    """Writes the model of a finished run, and reports on it; returns its evaluation.

    The model is the last step; with checkpoint.patience, it is the best one.
    """
    last = int(state.step)
    score = score or run.evaluation.score(state.evaluated())
    if best.step is None:  # no other evaluation is known
        best = best.after(last, score.result)
    kept = _weights_of_best(run, best.step)
    has_best = run.group.exchange("checkpoint of the best step", kept is not None)[0]
    step, result = last, score.result
    if run.settings.checkpoint.patience is not None and has_best:
        assert best.step is not None
        step, result = best.step, dict(best.result)
    if run.group.index == 0:
        still_ours()
        place = {"checkpoint": "last" if step == last else "best", "last_step": last}
        weights = kept if kept and step != last else jax.device_get(state.evaluated())
        description = run.description(step, best, **place)
        model_dir.write(run.workdir / "model", **weights, description=description)
        processes.say(f"model: {run.workdir / 'model'}   curves: {run.workdir / 'curves.png'}")
        processes.say(
            ending.describe_model(run, best, step=step, last=last, result=result, has_best=has_best)
        )
        if score.details and result is score.result:
            processes.say(score.details, file=sys.stdout)
        for fault in ending.faults(run, last, result, score.chance, read_lines(run.workdir)):
            processes.say(fault)
    return result


def _weights_of_best(run: Plan, step: int | None) -> dict[str, Any] | None:
    """Returns {"params", "batch_stats"} of the best step, in the first process.

    None if it has no checkpoint, or a damaged one, which is reported; and in the other processes.
    """
    if run.group.index or step not in model_dir.training_steps(run.workdir):
        return None
    try:
        path = run.workdir / "checkpoints" / str(step)
        return model_dir.read_training_checkpoint(path).variables()
    except UserError as error:
        processes.say(f"the best checkpoint is left out: {error}")
        return None
