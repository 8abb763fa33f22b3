"""Training checkpoints: state, config and model.json together, saved by Orbax in the background.

    WORKDIR/checkpoints/STEP/state/     the TrainState
    WORKDIR/checkpoints/STEP/config/    the config it was trained with
    WORKDIR/checkpoints/STEP/model/     model.json, so that model_dir.py can open the workdir
    WORKDIR/checkpoints/STEP/metrics/   the evaluation of this state, if there was one

Orbax writes into a temporary directory and renames it when it is complete: a process that dies in
the middle of a save leaves the earlier checkpoints, and nothing that looks like a new one.
"""

import contextlib
import errno
import gc
import json
import logging
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import checkpoint_managers

from mbv2_jax import checkpoint_names, model_dir, model_json, spec
from mbv2_jax.command_line import flatten
from mbv2_jax.errors import RunFailed, UserError, first_line
from mbv2_jax.model_json import Description
from mbv2_jax.runtime import processes
from mbv2_jax.storage import atomic, bucket
from mbv2_jax.training import settings as settings_lib
from mbv2_jax.training import workdir as workdir_lib
from mbv2_jax.training.settings import Checkpoint
from mbv2_jax.training.state import TrainState

_MESSAGES_WITHIN = 3.0  # seconds
_POLL = 0.02  # seconds


def _save_arrays_whole() -> None:
    """Configures Orbax to write each replicated array from one device.

    By default each device writes a part, and cutting it out takes a program for every shape: 4 s at
    the first save, for 50 MB in all.
    """
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns about the override
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    absl_logging.set_verbosity(level)


class _OneLine(logging.Filter):
    """Removes tracebacks from Orbax's log, which has one for each thread of a failed save.

    Its warning about a checkpoint without metrics is left out: not every one is evaluated.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).endswith("did not provide metrics."):
            return False
        if record.exc_info and "orbax" in record.pathname:
            record.msg, record.args = record.getMessage().partition("\n")[0], ()
            record.exc_info = None
        return True


_ONE_LINE = _OneLine()


def _print_unraisable(unraisable: Any) -> None:
    """Calls Python's hook, except for tensorstore's errors about arrays that nobody waits for."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which reports a failed save at once and leaves preemption to stop.py.

    If a process cannot write its part of a checkpoint, Orbax's thread waits 20 minutes for the
    other processes, which wait for that part, before it raises; and its callers wait with it.
    """

    _failure: BaseException | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self._failure = error
            raise

    def check_for_errors(self) -> None:
        """Raises the error of the save in the background, if it failed.

        The saving thread is not asked: it raises its error only once, and the finalizing thread
        must see it, or it would delete the old checkpoints in favour of the failed one.
        """
        if self._failure is not None:
            raise self._failure

    def wait_until_finished(self) -> None:
        """Waits for the save in the background; raises its error if it failed."""
        while self._finalize_thread.map(lambda thread: thread is not None and thread.is_alive()):
            if self._failure is not None:
                raise self._failure
            time.sleep(_POLL)
        super().wait_until_finished()

    def metrics(self, step: int) -> Any:
        """Returns the evaluation of a checkpoint; None if it has none, or a damaged one."""
        try:
            return super().metrics(step)
        except ValueError as error:  # of JSON
            processes.say(f"the evaluation of step {step} is damaged, and ignored: {error}")
            return None

    def reached_preemption(self, step: int) -> bool:
        """Returns False: otherwise Orbax would ask JAX, in the background, with a save's step.

        JAX would take that for the step that this process has reached, and processes could stop
        after different steps.
        """
        del step
        return False


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for a running save.

    Args:
      workdir: the run's directory; `checkpoints/` is made in it.
      settings: how many checkpoints are kept, and by which metric the best are chosen.
    """

    def __init__(self, workdir: pathlib.Path, settings: Checkpoint):
        self.directory = bucket.absolute(workdir) / "checkpoints"
        metric = settings.best_metric
        assert metric is not None  # config.read names one

        def rank(metrics: Mapping[str, Any]) -> float:
            return checkpoint_names.rank(metric, metrics[metric])

        keep: list[checkpoint_managers.PreservationPolicy] = [
            checkpoint_managers.LatestN(settings.keep_last)
        ]
        if settings.keep_best:
            best = checkpoint_managers.BestN(
                get_metric_fn=rank,
                n=settings.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            keep.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            best_fn=rank,  # with which Orbax writes the metrics, and has them in the next start too
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,  # on NFS another host's listing may be old
        )
        absl_logging.get_absl_logger().addFilter(_ONE_LINE)
        sys.unraisablehook = _print_unraisable
        if processes.count() == 1:
            _save_arrays_whole()
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
            "model": ocp.JsonCheckpointHandler(),
        }
        self._manager = _Manager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            with self._writing():
                self._manager.close()
        elif processes.count() == 1:  # Orbax would wait for other processes, which may be gone
            with contextlib.suppress(Exception):  # the failure under way matters more
                self._manager.close()

    def check(self) -> None:
        """Raises RunFailed if the save in the background failed."""
        with self._writing():
            self._manager.check_for_errors()

    def finish(self) -> None:
        """Waits for the save in the background; raises RunFailed if it failed."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Converts an error of writing a checkpoint to a RunFailed with one line."""
        try:
            with bucket.as_oserror(self.directory):
                yield
        except (OSError, RuntimeError, ValueError) as error:
            for each in (error, error.__cause__):  # Orbax wraps some in a TimeoutError
                if isinstance(each, jax.errors.JaxRuntimeError):  # another process is gone
                    raise each from None
            _wait_for_messages()
            reason = "the disk is full" if _no_space(error) else first_line(error)
            raise RunFailed(
                f"a checkpoint cannot be saved in {self.directory}: {reason}. The newest saved "
                "one stays: once that is fixed, the same command continues from it"
            ) from None

    def save(
        self,
        state: TrainState,
        config: Mapping[str, Any],
        description: Description,
        metrics: Mapping[str, Any] | None,
    ) -> None:
        """Starts saving `state`; returns once it has been copied, while writing continues.

        Args:
          state: after the step that names the checkpoint.
          config: the resolved config, nested.
          description: the contents of model.json.
          metrics: the result of evaluating this state, by which the best are kept; else None.

        Raises:
          RunFailed: this checkpoint or the previous one cannot be written.
        """
        info = description.to_json()
        if processes.index() == 0:
            info["state_sha256"] = model_dir.arrays_sha256(jax.device_get(state))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(dict(config)),
            model=ocp.args.JsonSave(info),
        )
        metrics = dict(metrics) if metrics else None
        with self._writing():
            atomic.check_space(self.directory, model_dir.size(state))
            self._manager.save(int(state.step), args=items, metrics=metrics, force=True)

    def restore(self, step: int, like: TrainState, config: Mapping[str, Any]) -> TrainState:
        """Returns the state of checkpoint `step`.

        Args:
          step: of an existing checkpoint.
          like: the shapes, dtypes and shardings that the state should have.
          config: the run's resolved config, to name the changed fields when shapes differ.

        Raises:
          UserError: the checkpoint is of another network or optimizer.
          RunFailed: it cannot be read now.
        """
        with _reading(self.directory / str(step)):
            saved = self._manager.item_metadata(step)["state"].tree
        faults = model_dir.shape_faults(like, saved)
        if faults:
            changed = differences(saved_config(self.directory.parent, step), config)
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit this config. "
                f"Changed since: {'; '.join(changed) or 'nothing'}. "
                f"Does not fit: {'; '.join(faults[:3])}{' ...' if len(faults) > 3 else ''}. "
                "Undo the change, or give another --workdir"
            )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        with _reading(self.directory / str(step)):
            return self._manager.restore(step, args=items)["state"]


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Converts an error of reading a checkpoint to a RunFailed with one line."""
    try:
        with workdir_lib.reading(path):
            yield
    except jax.errors.JaxRuntimeError:  # another process is gone
        raise
    except (RuntimeError, ValueError) as error:
        raise RunFailed(f"{path} cannot be read now: {first_line(error)}") from None


def newest_faults(workdir: pathlib.Path, steps: Sequence[int]) -> dict[int, str]:
    """Returns {step: fault} of the damaged checkpoints that are newer than the newest intact one.

    Args:
      workdir: the run's.
      steps: the steps of its checkpoints.

    Raises:
      RunFailed: a checkpoint cannot be read now, so that nobody can tell whether it is damaged.
    """
    faults: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        # Read the files first: Orbax does not tell unreadable files from damaged ones, and its
        # threads print a traceback for every array.
        _read_all(workdir / "checkpoints" / str(step))
        fault = _fault(workdir, step) and _fault(workdir, step)  # the first fault may be transient
        if not fault:
            break
        faults[step] = fault
    return faults


def _fault(workdir: pathlib.Path, step: int) -> str | None:
    """Returns the fault of a checkpoint; None if it is intact."""
    try:
        with bucket.as_oserror(workdir):
            saved_config(workdir, step)
            model_dir.read_training_checkpoint(workdir / "checkpoints" / str(step))
    except (UserError, OSError, ValueError) as error:
        return str(error)
    return None


def _read_all(folder: pathlib.Path) -> None:
    """Reads every file of a checkpoint, whatever its content; raises RunFailed if that fails."""
    with workdir_lib.reading(folder), contextlib.suppress(FileNotFoundError):  # a dangling link
        for _ in bucket.contents(folder):
            pass


def set_aside(workdir: pathlib.Path, steps: Sequence[int]) -> None:
    """Moves damaged checkpoints to WORKDIR/damaged/, out of the way of new ones."""
    for step in steps:
        source, target = workdir / "checkpoints" / str(step), workdir / "damaged" / str(step)
        if bucket.is_address(target):
            bucket.remove_tree(target)
            bucket.move_tree(source, target)
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)


def saved_config(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns the config that checkpoint `step` of a workdir was trained with."""
    return json.loads((workdir / "checkpoints" / str(step) / "config" / "metadata").read_text())


def saved_description(workdir: pathlib.Path, step: int) -> Description:
    """Returns the model.json of checkpoint `step` of a workdir."""
    file = workdir / "checkpoints" / str(step) / "model" / "metadata"
    return model_json.parse(json.loads(file.read_text()))


def _wait_for_messages() -> None:
    """Waits for Orbax's own messages about a failed save, so that our line comes after them."""
    time.sleep(_MESSAGES_WITHIN)
    # Its coroutines warn only when they are collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    gc.collect()


def _no_space(error: BaseException | None) -> bool:
    """Returns whether an error or its cause is about a full disk; tensorstore sets no errno."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns "KEY: OLD -> NEW" for each field in which two nested configs differ.

    A field that did not exist when the old config was written counts as its default there.
    """
    after = {name: spec.frozen(value) for name, value in flatten(new).items()}
    before = {name: spec.frozen(value) for name, value in flatten(old).items()}
    fields = settings_lib.declared(after["task"])
    defaults = {name: field.default for name, field in fields.items()}
    changes = []
    for name in sorted(before.keys() | after.keys()):
        was, now = (config.get(name, defaults.get(name)) for config in (before, after))
        if was != now:
            changes.append(f"{name}: {spec.plain(was)} -> {spec.plain(now)}")
    return changes
