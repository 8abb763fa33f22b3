"""The plan of a run: every part opened and checked before anything is compiled or written."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.data import fast_decoding, loader, sources
from mbv2_jax.data.sources import Source
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.installed import require
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.model_json import Description
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.runtime import processes, shared_folder
from mbv2_jax.runtime.processes import Group
from mbv2_jax.spec import PER_DEVICE, ModelSpec
from mbv2_jax.storage import bucket, lock
from mbv2_jax.tasks.task import Task
from mbv2_jax.training import checkpoint as checkpoints_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import evaluation, splits
from mbv2_jax.training import workdir as workdir_lib
from mbv2_jax.training.best import Best
from mbv2_jax.training.config import Settings
from mbv2_jax.training.evaluation import Evaluation
from mbv2_jax.training.schedule import epochs_to_steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run whose parts have been opened and checked; nothing is compiled or written yet.

    Attributes:
      settings, spec, task: the resolved config.
      train_source, train_transform: the training split, and the operations on its images.
      evaluation: the evaluation of this run.
      workdir: on a disk or in a bucket.
      start_from: the model of --checkpoint; None for random weights and for a continued run.
      resumed_step: the step of the checkpoint from which the run continues; None for a new run.
      damaged: the steps of later checkpoints that cannot be read.
      mesh: the devices of all processes.
      group: the processes.
      steps_per_epoch, total_steps: of the whole run.
    """

    settings: Settings
    spec: ModelSpec
    task: Task
    train_source: Source
    train_transform: pipeline.Transform
    evaluation: Evaluation
    workdir: pathlib.Path
    start_from: SavedModel | None
    resumed_step: int | None
    damaged: tuple[int, ...]
    mesh: Mesh
    group: Group
    steps_per_epoch: int
    total_steps: int

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, nested, as config.json holds it."""
        return self.settings.to_dict(self.spec)

    def description(self, step: int, best: Best, **place: Any) -> Description:
        """Returns the model.json of this run after `step`.

        Args:
          step: whose weights it describes.
          best: the best evaluation so far.
          place: further entries of its origin.
        """
        text = json.dumps(self.config, sort_keys=True)
        origin = {
            "kind": "trained, sha256 of the config",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "step": step,
            "total_steps": self.total_steps,
            **place,
            "best": best.to_json(),
            "train_examples": len(self.train_source),
            "processes": self.group.count,
            "devices": self.mesh.size,
        }
        return Description(self.spec, self.task.classes, origin)

    def has_stalled(self, best: Best) -> bool:
        """Returns whether the last evaluations end the run early."""
        return best.has_stalled(self.settings.checkpoint.patience)

    def must_save(self, step: int, best: Best) -> bool:
        """Returns whether a checkpoint of `step` is due; with a patience, the best is saved too."""
        is_best = best.step == step and self.settings.checkpoint.patience is not None
        return is_best or self.is_due(step, self.save_every)

    def is_due(self, step: int, every_steps: int) -> bool:
        """Returns whether something that happens every so many steps, and at the end, is due."""
        return step % every_steps == 0 or step == self.total_steps

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations."""
        return self._steps(self.settings.log.eval_every_epochs)

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints."""
        checkpoint = self.settings.checkpoint
        return checkpoint.every_steps or self._steps(checkpoint.every_epochs)

    def _steps(self, epochs: float) -> int:
        return max(1, epochs_to_steps(epochs, self.steps_per_epoch))


def plan(config: ConfigDict, workdir: str | None, checkpoint: str | None, group: Group) -> Plan:
    """Opens and checks the parts of a run before anything is compiled or written.

    Args:
      config: the config of a recipe.
      workdir: as given with --workdir.
      checkpoint: as given with --checkpoint.
      group: the processes of the run.

    Raises:
      UserError: something is wrong with the config, the data, the checkpoint or the workdir.
    """
    require("training", "grain", "matplotlib", "tensorboardX")
    settings = config_lib.read(config)
    path = _workdir(workdir)
    mesh = mesh_lib.create()
    mesh_lib.check_batch(mesh, settings.run.batch_size)
    if group.index == 0:
        with workdir_lib.reading(path):
            lock.check_free(path)
    train_source, eval_source = _open_data(settings, group)
    # A run starts from the first of these that exists: the newest checkpoint in its workdir, the
    # weights of --checkpoint, random weights.
    with workdir_lib.reading(path):
        resumed, damaged = _newest_checkpoint(path, group)
        previous = checkpoints_lib.saved_config(path, resumed) if resumed is not None else None
    start_from = None
    if checkpoint and resumed is None:
        start_from = evaluation.read_checkpoint(checkpoint, group)
    spec, task = config_lib.resolve(settings, train_source, start_from, previous)
    if spec.mode.frozen_stages >= 0 and resumed is None and start_from is None:
        raise UserError(
            f"model.frozen_stages is {spec.mode.frozen_stages}: frozen layers would stay random. "
            "Give --checkpoint=PATH to start from, or --config.model.frozen_stages=-1"
        )
    if settings.run.num_epochs:
        config_lib.check_statistics(spec.mode)
    batch_size = settings.run.batch_size
    steps_per_epoch = loader.steps_per_epoch(
        len(train_source), batch_size, settings.data.last_batch
    )
    if settings.run.fit_head and resumed is None and start_from is None:
        raise UserError(
            "fit_head is set, and there is no backbone to fit a head to: give --checkpoint=PATH to "
            "start from, or --config.fit_head=false"
        )
    image_size = spec.preprocessing.image_size
    if settings.data.train_decode == "fast":
        fast_decoding.require()
    network = task.network(spec.backbone, config_lib.on_devices(spec.mode, batch_size, mesh.size))
    run = Plan(
        settings=settings,
        spec=spec,
        task=task,
        train_source=train_source,
        train_transform=pipeline.make_transform(settings.data.train_transforms, image_size),
        evaluation=Evaluation(
            task=task,
            network=network,
            preprocessing=spec.preprocessing,
            source=eval_source,
            transform=evaluation.eval_transform(spec.preprocessing),
            batch_size=batch_size,
            workers=settings.data.workers,
            mesh=mesh,
        ),
        workdir=path,
        start_from=start_from,
        resumed_step=resumed,
        damaged=damaged,
        mesh=mesh,
        group=group,
        steps_per_epoch=steps_per_epoch,
        total_steps=_total_steps(settings.run.num_epochs, steps_per_epoch),
    )
    if previous is not None:
        _compare_with_previous(run, previous, checkpoint)
    return run


def _total_steps(num_epochs: float, steps_per_epoch: int) -> int:
    """Returns the steps of a run: at least one, unless it is to train nothing."""
    return max(1 if num_epochs else 0, epochs_to_steps(num_epochs, steps_per_epoch))


def check_current(run: Plan) -> None:
    """Raises RunFailed if another run saved a checkpoint while this one was planned.

    The other run may have finished and left the workdir since.
    """
    planned = max((*run.damaged, -1 if run.resumed_step is None else run.resumed_step))
    newest = max(model_dir.training_steps(run.workdir), default=-1)
    if newest != planned:
        raise RunFailed(
            f"another run saved step {newest} in {run.workdir} while this one started: give the "
            "same command again to continue from there"
        )


def _workdir(workdir: str | None) -> pathlib.Path:
    if not workdir:
        raise UserError("--workdir=DIR is missing: training keeps its checkpoints and logs there")
    path = bucket.parse_path(workdir, "--workdir")
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir {path} is a file: give a directory")
    return path


def _open_data(settings: Settings, group: Group) -> tuple[Source, Source]:
    """Returns the training and the evaluation split: different images of the same classes."""
    data = settings.data
    train = splits.open_training(settings)
    held_out = splits.open_split(settings, data.eval_split)
    for note in sources.notes(train, held_out):
        processes.say(note)
    names = (repr(data.train_split), repr(data.eval_split))
    if fault := settings.task.split_fault(train, held_out):
        raise UserError(f"{data.source}: {fault.format(*names)}")
    if sources.overlap(train, held_out):
        raise UserError(
            f"{data.source}: {names[0]} and {names[1]} hold the same images, or some of them; name "
            "two splits, such as 'train' and 'val', or parts of one that share none, such as "
            "'train[10%:]' and 'train[:10%]'"
        )
    identities = sources.identity(train, "training") | sources.identity(held_out, "evaluation")
    remedy = "Every host must read the same, from a bucket, a shared disk, or copies of its own"
    group.check_same("data", identities, f"{data.source}: {remedy}")
    return train, held_out


def _newest_checkpoint(workdir: pathlib.Path, group: Group) -> tuple[int | None, tuple[int, ...]]:
    """Returns the step of the newest intact checkpoint, and those of later, damaged ones.

    The first process looks for all of them: on NFS another host's listing may be a minute old.

    Raises:
      UserError: another process does not see the checkpoint, or there are only damaged ones.
      RunFailed: a checkpoint cannot be read now.
    """
    steps: list[int] = []
    faults: dict[int, str] = {}
    if group.index == 0:
        steps = model_dir.training_steps(workdir)
        faults = checkpoints_lib.newest_faults(workdir, steps)
    steps, damaged = group.exchange("checkpoints", (steps, sorted(faults)))[0]
    newest = max(set(steps) - set(damaged), default=None)
    if newest is not None:
        shared_folder.check_seen(workdir, f"checkpoints/{newest}", group)
    for step, fault in faults.items():
        processes.say(f"checkpoint of step {step} is damaged, and not used: {fault}")
    if steps and newest is None:
        raise UserError(
            f"every checkpoint in {workdir / 'checkpoints'} is damaged; to begin anew, give "
            "another --workdir"
        )
    return newest, tuple(damaged)


def _compare_with_previous(run: Plan, previous: dict[str, Any], checkpoint: str | None) -> None:
    """Reports what changed since the checkpoint that a run continues from.

    Raises:
      UserError: the data has other classes.
    """
    step = run.resumed_step
    assert step is not None
    if checkpoint:
        processes.say(f"{run.workdir} holds a checkpoint: --checkpoint is not read")
    saved = checkpoints_lib.saved_description(run.workdir, step)
    if run.task.classes != saved.classes:
        odd = sorted(set(run.task.classes) ^ set(saved.classes)) or ["their order"]
        raise UserError(
            f"{run.workdir} was trained on other classes ({', '.join(odd[:5])} differ): start a "
            f"new run, with --checkpoint={run.workdir} and another --workdir"
        )
    before, examples = saved.origin["train_examples"], len(run.train_source)
    if before != examples:
        processes.say(
            f"changed since step {step}: training examples: {before} -> {examples}; epochs are "
            "counted anew by their number, and the learning rate follows"
        )
    _compare_devices(run, saved.origin.get("devices", run.mesh.size))
    for line in checkpoints_lib.differences(previous, run.config):
        processes.say(f"changed since step {step}: {line}")


def _compare_devices(run: Plan, before: int) -> None:
    """Reports that the run continues on another number of devices, and what that changes."""
    now, batch_size = run.mesh.size, run.settings.run.batch_size
    if before == now:
        return
    text = (
        f"changed since step {run.resumed_step}: devices: {before} -> {now}; state, batches and "
        "their order stay the same, sums are taken in another order, which shows in their last "
        "digits"
    )
    if run.spec.mode.bn_group_size == PER_DEVICE:
        groups = f"{batch_size / before:g} -> {batch_size / now:g} examples"
        text += f"; model.bn_group_size='device': BatchNorm's statistics are over {groups}"
    processes.say(text)
