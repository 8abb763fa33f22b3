"""A run's plan: every part of it opened and checked before anything is compiled or written."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.data import fast_decoding, loader, sources
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.runtime import processes, shared_folder
from mbv2_jax.runtime.processes import Group
from mbv2_jax.storage import bucket, lock
from mbv2_jax.training import checkpoint as checkpoints_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import evaluation
from mbv2_jax.training import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run whose every part was checked; nothing of it is compiled or written yet."""

    config: ConfigDict
    workdir: pathlib.Path
    train_source: sources.Source
    eval_source: sources.Source
    train_transform: pipeline.Transform
    eval_transform: pipeline.Transform
    start_from: model_dir.SavedModel | None  # weights to start from; None: random, or a resumed run
    resumed_step: int | None
    damaged: tuple[int, ...]  # steps of later checkpoints, which cannot be read
    mesh: Mesh
    model: MobileNetV2
    steps_per_epoch: int
    total_steps: int

    def info(self, step: int) -> dict[str, Any]:
        """Returns the model.json of this run after `step`."""
        text = json.dumps(self.config.to_dict(), sort_keys=True)
        config_hash = hashlib.sha256(text.encode()).hexdigest()
        origin = {
            "kind": "trained, sha256 of the config",
            "sha256": config_hash,
            "step": step,
            "train_examples": len(self.train_source),
            "processes": processes.count(),
            "devices": self.mesh.size,
        }
        fields = config_lib.model_fields(self.config)
        return model_dir.describe(fields, tuple(self.train_source.class_names), origin)

    def due(self, step: int, every_steps: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens at `step`."""
        return step % every_steps == 0 or step == self.total_steps

    def steps(self, epochs: float) -> int:
        """Turns an interval in epochs into steps, 1 at least."""
        return max(1, loader.epochs_to_steps(epochs, self.steps_per_epoch))


def plan(config: ConfigDict, workdir: str | None, checkpoint: str | None, group: Group) -> Plan:
    """Checks all that can be checked before anything is compiled or written.

    Raises:
      UserError: whatever is wrong with the config, the data, the checkpoint or the workdir.
    """
    config_lib.check(config)
    if not workdir:
        raise UserError("--workdir=DIR is missing: training keeps its checkpoints and logs there")
    path = bucket.parse_path(workdir, "--workdir")
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir {path} is a file: give a directory")
    mesh = mesh_lib.create()
    mesh_lib.check_batch(mesh, config.batch_size)
    with workdir_lib.reading(path):
        if group.index == 0:
            lock.check_free(path)
    train_source, eval_source = _open_data(config.data, group)
    # Where a run begins, in this order: the newest checkpoint in its workdir; the weights of
    # --checkpoint; random weights.
    with workdir_lib.reading(path):
        resumed, damaged = _newest_checkpoint(path, group)
        previous = checkpoints_lib.saved_config(path, resumed) if resumed is not None else None
    start_from = None
    if checkpoint and resumed is None:
        start_from = evaluation.read_checkpoint(checkpoint, group)
    config = config_lib.resolve(config, train_source.class_names, start_from, previous)
    if config.model.frozen_stages >= 0 and resumed is None and start_from is None:
        raise UserError(
            f"model.frozen_stages is {config.model.frozen_stages}: frozen layers would stay "
            "random. Give --checkpoint=PATH to start from, or --config.model.frozen_stages=-1"
        )
    if previous is not None and checkpoint:
        processes.say(f"{path} holds a checkpoint: --checkpoint is not read")
    if resumed is not None and previous is not None:
        _compare_data(path, resumed, train_source)
        _compare_devices(path, resumed, config, mesh)
        for line in checkpoints_lib.differences(previous, config.to_dict()):
            processes.say(f"changed since step {resumed}: {line}")
    return assemble(
        config,
        train_source,
        eval_source,
        mesh,
        workdir=path,
        start_from=start_from,
        resumed_step=resumed,
        damaged=damaged,
    )


def check_current(run: Plan) -> None:
    """Raises RunFailed if another run saved a checkpoint while this one was planned.

    It may have been at its end, and have given the workdir back since.
    """
    planned = max((*run.damaged, -1 if run.resumed_step is None else run.resumed_step))
    newest = max(model_dir.training_steps(run.workdir), default=-1)
    if newest != planned:
        raise RunFailed(
            f"another run saved step {newest} in {run.workdir} while this one started: give the "
            "same command again to go on from there"
        )


def assemble(
    config: ConfigDict,
    train_source: sources.Source,
    eval_source: sources.Source,
    mesh: Mesh,
    *,
    workdir: pathlib.Path = pathlib.Path(),
    start_from: model_dir.SavedModel | None = None,
    resumed_step: int | None = None,
    damaged: tuple[int, ...] = (),
) -> Plan:
    """Makes the parts of a run that a resolved config describes.

    Raises:
      UserError: a transform or the batch size is not possible, or a library is missing.
    """
    data = config.data
    if data.train_decode == "fast":
        fast_decoding.require()
    steps_per_epoch = loader.steps_per_epoch(len(train_source), config.batch_size, data.last_batch)
    return Plan(
        config=config,
        workdir=workdir,
        train_source=train_source,
        eval_source=eval_source,
        train_transform=pipeline.make_transform(data.train_transforms, data.image_size),
        eval_transform=evaluation.transform(data.eval_transforms, data.image_size),
        start_from=start_from,
        resumed_step=resumed_step,
        damaged=damaged,
        mesh=mesh,
        model=config_lib.model(config, mesh.size),
        steps_per_epoch=steps_per_epoch,
        total_steps=max(1, loader.epochs_to_steps(config.num_epochs, steps_per_epoch)),
    )


def _open_data(data: ConfigDict, group: Group) -> tuple[sources.Source, sources.Source]:
    """Returns the training and the evaluation split: different images of the same classes."""
    train_source = sources.open_source(data.source, data.train_split, data.data_dir)
    eval_source = sources.open_source(data.source, data.eval_split, data.data_dir)
    if train_source.class_names != eval_source.class_names:
        odd = sorted(set(train_source.class_names) ^ set(eval_source.class_names))
        raise UserError(
            f"{data.source}: the classes of {data.train_split!r} and {data.eval_split!r} differ; "
            f"in only one of them: {', '.join(odd[:5])}"
        )
    if sources.overlap(train_source, eval_source):
        raise UserError(
            f"{data.source}: {data.train_split!r} and {data.eval_split!r} hold the same images, or "
            "some of them; name two splits (of a folder: PATH/train/CLASS and PATH/val/CLASS), or "
            "parts of one that share none, such as 'train[10%:]' and 'train[:10%]'"
        )
    seen = _summary("training", train_source) | _summary("evaluation", eval_source)
    remedy = "Every host must read the same, from a bucket, a shared disk, or copies of its own"
    group.check_same("data", seen, f"{data.source}: {remedy}")
    return train_source, eval_source


def _summary(name: str, source: sources.Source) -> dict[str, Any]:
    """What tells a split from another one, without reading its images."""
    names = hashlib.sha256("\n".join(source.class_names).encode()).hexdigest()
    ends = [source.describe(index) for index in (0, len(source) - 1)]
    return {
        f"{name} examples": len(source),
        f"SHA-256 of {name} classes": names,
        f"first and last of {name}": [pathlib.Path(end).name for end in ends],
    }


def _compare_data(workdir: pathlib.Path, step: int, source: sources.Source) -> None:
    """Refuses to go on with other classes, and says when there are more or fewer examples."""
    info = checkpoints_lib.saved_info(workdir, step)
    if list(source.class_names) != info["class_names"]:
        odd = sorted(set(source.class_names) ^ set(info["class_names"])) or ["their order"]
        raise UserError(
            f"{workdir} was trained on other classes ({', '.join(odd[:5])} differ): start a new "
            f"run, with --checkpoint={workdir} and another --workdir"
        )
    before = info["origin"]["train_examples"]
    if before != len(source):
        processes.say(
            f"changed since step {step}: training examples: {before} -> {len(source)}; epochs are "
            "counted anew by their number, and the learning rate follows"
        )


def _compare_devices(workdir: pathlib.Path, step: int, config: ConfigDict, mesh: Mesh) -> None:
    """Says when the run goes on on another number of devices, and what that changes."""
    before = checkpoints_lib.saved_info(workdir, step)["origin"].get("devices", mesh.size)
    if before == mesh.size:
        return
    text = (
        f"changed since step {step}: devices: {before} -> {mesh.size}; state, batches and their "
        "order stay the same, sums are taken in another order, which is seen in their last digits"
    )
    if config.model.bn_group_size == "device":
        groups = f"{config.batch_size / before:g} -> {config.batch_size / mesh.size:g} examples"
        text += f"; model.bn_group_size='device': BatchNorm's statistics are over {groups}"
    processes.say(text)


def _newest_checkpoint(workdir: pathlib.Path, group: Group) -> tuple[int | None, tuple[int, ...]]:
    """Returns the step of the newest checkpoint that is whole, and those of later, damaged ones.

    The first process looks, for all: on NFS another host's listing may be a minute old.

    Raises:
      UserError: another process does not see the checkpoint, or none that is there is whole.
      RunFailed: one that is there cannot be read now.
    """
    steps: list[int] = []
    faults: dict[int, str] = {}
    if group.index == 0:
        steps = model_dir.training_steps(workdir)
        faults = checkpoints_lib.newest_faults(workdir, steps)
    found = (steps, sorted(faults))
    steps, damaged = group.exchange("checkpoints", found)[0]
    whole = max(set(steps) - set(damaged), default=None)
    if whole is not None:
        shared_folder.check_seen(workdir, f"checkpoints/{whole}", group)
    for step, fault in faults.items():
        processes.say(f"checkpoint of step {step} is damaged, and not used: {fault}")
    if steps and whole is None:
        raise UserError(
            f"no checkpoint in {workdir / 'checkpoints'} is whole; to begin anew, give another "
            "--workdir"
        )
    return whole, tuple(damaged)
