"""Model directories: Orbax arrays plus model.json, all that is needed to use a trained model.

    DIR/arrays/      {"params", "batch_stats"}: float32, named as models/mobilenet_v2.py names them
    DIR/model.json   architecture, conventions, preprocessing, class names, and where it came from

Whoever opens one needs nothing else. A training workdir can be opened too: its `model/`, or while
the run goes on, its newest checkpoint, which carries the same model.json. So can the weights of
another framework, which convert/ reads.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.models.mobilenet_v2 import MobileNetV2
from mbv2_jax.storage import atomic, bucket

FORMAT = 1

# Where model.json keeps what a config calls by another name: config field -> (section, key).
FIELDS = {
    "model.width": ("architecture", "width"),
    "model.strides": ("architecture", "strides"),
    "model.num_classes": ("architecture", "num_classes"),
    "model.dropout": ("conventions", "dropout"),
    "model.padding": ("conventions", "padding"),
    "model.bn_epsilon": ("conventions", "bn_epsilon"),
    "model.bn_momentum": ("conventions", "bn_momentum"),
    "data.image_size": ("preprocessing", "image_size"),
    "data.eval_transforms": ("preprocessing", "eval_transforms"),
    "data.mean": ("preprocessing", "mean"),
    "data.std": ("preprocessing", "std"),
}


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What a model directory holds.

    Attributes:
      params: nested dict of float32 numpy arrays; no "classifier" where there are features only.
      batch_stats: nested dict of float32 numpy arrays.
      info: model.json.
      path: what was opened, for messages.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    info: dict[str, Any]
    path: pathlib.Path

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the logits; none where there are features only."""
        return tuple(self.info["class_names"])

    @property
    def features_only(self) -> bool:
        """Whether this is a backbone without a classifier."""
        return self.info["architecture"]["num_classes"] is None

    @property
    def published(self) -> dict[str, Any] | None:
        """{"top1", "top5" (percent), "examples", "source"} as reported for these weights, if any.

        By whoever published them, on ImageNet's validation images, of which there are `examples`.
        """
        return self.info.get("published")

    def field(self, name: str) -> Any:
        """Returns what model.json says of the config field `name` (a key of FIELDS)."""
        section, key = FIELDS[name]
        value = self.info[section][key]
        return tuple(value) if isinstance(value, list) else value

    def module(self, **changes: Any) -> MobileNetV2:
        """Returns the network that these arrays belong to; `changes` override its attributes."""
        names = [name for name in FIELDS if name.startswith("model.")]
        attributes = {name.partition(".")[2]: self.field(name) for name in names}
        return MobileNetV2(**attributes | changes)


def describe(
    fields: Mapping[str, Any],
    class_names: tuple[str, ...],
    origin: Mapping[str, Any],
    published: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the model.json of a model.

    Args:
      fields: the values of FIELDS, by config field; "model.num_classes" None = features only.
      class_names: in the order of the logits.
      origin: what the model came from; a "sha256" identifies it.
      published: see SavedModel.published.
    """
    info: dict[str, Any] = {"format": FORMAT, "task": "classification"}
    info["architecture"] = {"name": "mobilenet_v2"}
    for name, (section, key) in FIELDS.items():
        info.setdefault(section, {})[key] = fields[name]
    info["class_names"] = list(class_names)
    info["origin"] = dict(origin)
    if published is not None:
        info["published"] = dict(published)
    return info


def write(path: pathlib.Path, params: Any, batch_stats: Any, info: Mapping[str, Any]) -> None:
    """Writes a model directory at `path`, replacing one that is there.

    model.json gets the SHA-256 of the files too, by which `read` notices damage. The new one is
    complete before the old one is moved away, and that is deleted last: a process that dies
    meanwhile leaves one of them whole, if only as `.NAME.new` beside `.NAME.old`.

    Raises:
      OSError, ValueError (Orbax's): it cannot be written, for want of space perhaps.
    """
    arrays = {"params": params, "batch_stats": batch_stats}
    with atomic.replace_folder(path, mark="model.json") as folder:
        atomic.check_space(folder, size(arrays))
        with _checkpointer() as checkpointer:
            checkpointer.save(folder / "arrays", args=ocp.args.PyTreeSave(arrays))
        info = dict(info) | {"arrays_sha256": _sha256(folder / "arrays")}
        (folder / "model.json").write_text(json.dumps(info, indent=2) + "\n")


def size(arrays: Any) -> int:
    """Returns the number of bytes of a tree of arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


def _checkpointer() -> ocp.Checkpointer:
    """Reads and writes in this process alone, whatever others the run has."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index} if jax.process_count() > 1 else None,
        barrier_sync_key_prefix=f"model_dir_{index}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@contextlib.contextmanager
def _without_hints() -> Iterator[None]:
    """Keeps from the user that the part of a checkpoint that is read is not a whole one."""
    logger = logging.getLogger("absl")  # Orbax's

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Metadata file does not exist")

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def read(path: str | os.PathLike[str]) -> SavedModel:
    """Opens a model directory, the model of a training workdir, or another framework's weights.

    Args:
      path: a model directory; a workdir with `model/`, or with a checkpoint; one checkpoint; or
        what `python -m convert` takes: a file, an https address, or the name of published weights.

    Raises:
      UserError: there is nothing of the kind at `path`, or arrays and model.json disagree.
    """
    source = os.path.expanduser(path)
    if bucket.is_address(source):
        return _read_from_bucket(source)
    if not os.path.isdir(source):
        from mbv2_jax.convert import importer  # here: convert/ imports this module

        imported = importer.load(source)
        for line in imported.warnings:
            print(f"{source}: {line}", file=sys.stderr)
        return imported.saved
    return _read_folder(pathlib.Path(source))


def _read_from_bucket(address: str) -> SavedModel:
    path = bucket.parse_path(address, "--checkpoint")
    try:
        with bucket.as_oserror(path):
            return _read_folder(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _read_folder(path: pathlib.Path) -> SavedModel:
    steps = training_steps(path)
    if (path / "model.json").is_file():
        saved = _read_model(path)
    elif (path / "state").is_dir() and (path / "model" / "metadata").is_file():
        if bucket.is_address(path) and not (path / "commit_success.txt").is_file():
            raise UserError(f"checkpoint {path} is incomplete: its saving was interrupted")
        saved = read_training_checkpoint(path)
    elif (path / "model" / "model.json").is_file() or steps:
        saved = _read_workdir(path, steps)
    else:
        raise UserError(
            f"{path} is neither a model directory (it would hold model.json) nor a workdir with a "
            "checkpoint"
        )
    _check(saved)
    return saved


def _read_workdir(path: pathlib.Path, steps: list[int]) -> SavedModel:
    """Reads `model/`, unless the run went on after it was written: then the newest checkpoint."""
    if (path / "model" / "model.json").is_file():
        saved = _read_model(path / "model")
        if not steps or saved.info.get("origin", {}).get("step", 0) >= max(steps):
            return saved
    return read_training_checkpoint(path / "checkpoints" / str(max(steps)))


def training_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a training workdir."""
    folder = workdir / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def _read_model(path: pathlib.Path) -> SavedModel:
    try:
        info = json.loads((path / "model.json").read_text())
        sha256 = _sha256(path / "arrays")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {first_line(error)}") from None
    except ValueError as error:
        raise UserError(f"{path / 'model.json'} is not JSON: {error}") from None
    found = info.get("format") if isinstance(info, dict) else None
    if found != FORMAT:
        raise UserError(f"{path / 'model.json'} has format {found!r}; this version reads {FORMAT}")
    # Before Orbax sees them: it reads some damaged files without complaint. (Models that were
    # written before model.json had the line are read as they are.)
    if info.get("arrays_sha256", sha256) != sha256:
        raise UserError(
            f"the arrays in {path / 'arrays'} cannot be read: by their SHA-256, which is in "
            "model.json, they are not the files that were written"
        )
    arrays = _read_arrays(path / "arrays")
    return SavedModel(arrays.get("params", {}), arrays.get("batch_stats", {}), info, path)


def _sha256(folder: pathlib.Path) -> str:
    """Returns the SHA-256 over the names, sizes and contents of a folder's files."""
    digest = hashlib.sha256()
    for name, content in bucket.contents(folder):
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def arrays_sha256(arrays: Any) -> str:
    """Returns the SHA-256 over the names, dtypes, shapes and values of a tree of numpy arrays."""
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    digest = hashlib.sha256()
    for name, array in sorted(named.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def read_training_checkpoint(path: pathlib.Path) -> SavedModel:
    """Reads a checkpoint of training/checkpoint.py: the averaged weights, where there are some."""
    try:
        info = json.loads((path / "model" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is incomplete or damaged: {error}") from None
    state = _read_arrays(path / "state")
    found = arrays_sha256(state)
    # (Checkpoints that were written before they had the line are read as they are.)
    if info.get("state_sha256", found) != found:
        raise UserError(
            f"the arrays in {path / 'state'} are damaged: by their SHA-256, they are not what was "
            "saved"
        )
    weights = state.get("ema") or state
    return SavedModel(weights["params"], weights["batch_stats"], info, path)


def _read_arrays(path: pathlib.Path) -> dict[str, Any]:
    path = bucket.absolute(path)
    try:
        with _checkpointer() as checkpointer:
            with _without_hints():
                metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:  # so Orbax says that it found nothing readable
                raise ValueError("files are missing or damaged")
            # As numpy: the devices that wrote it need not be here.
            restore = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
            )
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the arrays in {path} cannot be read: {str(error)[:200]}") from None


def _check(saved: SavedModel) -> None:
    """Refuses a model.json that lacks something, and arrays that are not of the network in it."""
    if isinstance(conventions := saved.info.get("conventions"), dict):
        conventions.setdefault("dropout", 0.0)  # models written before it was kept had none
    faults = info_faults(saved.info)
    if faults:
        raise UserError(f"{saved.path}: model.json is damaged: {'; '.join(faults)}")
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    wanted = jax.eval_shape(saved.module().init, key, image)
    found = {"params": saved.params, "batch_stats": saved.batch_stats}
    faults = shape_faults(wanted, found)
    if faults:
        raise UserError(f"{saved.path}: model.json and the arrays disagree: {'; '.join(faults)}")


def info_faults(info: Mapping[str, Any]) -> list[str]:
    """Returns one line for each thing in a model.json without which nothing can be predicted."""
    sections = {name: info.get(section) for name, (section, _) in FIELDS.items()}
    keys = {name: key for name, (_, key) in FIELDS.items()}
    fields = {
        name: section[keys[name]]
        for name, section in sections.items()
        if isinstance(section, dict) and keys[name] in section
    }
    faults = [f"{'.'.join(FIELDS[name])} is missing" for name in FIELDS if name not in fields]
    faults += field_faults(fields)
    architecture = sections["model.width"]
    if not isinstance(architecture, dict) or architecture.get("name") != "mobilenet_v2":
        faults.append("architecture.name is not 'mobilenet_v2'")
    names, classes = info.get("class_names"), fields.get("model.num_classes")
    if not isinstance(names, list):
        faults.append("class_names is missing")
    elif not all(isinstance(name, str) and name.isprintable() for name in names):
        faults.append("class_names are not all printable text")
    elif len(names) != (classes or 0):
        faults.append(f"class_names are {len(names)}, architecture.num_classes is {classes}")
    if "published" in info and not _is_card(info["published"]):
        faults.append("published is not {top1, top5, examples, source}")
    return faults


def _is_card(card: Any) -> bool:
    return (
        isinstance(card, dict)
        and all(_is_number(card.get(key)) for key in ("top1", "top5", "examples"))
        and isinstance(card.get("source"), str)
    )


def field_faults(fields: Mapping[str, Any]) -> list[str]:
    """Returns one line for each value that is impossible.

    Args:
      fields: some of FIELDS, by config field.
    """
    return [
        f"{name} is {value!r}: it must be {_WANTED[name][1]}"
        for name, value in fields.items()
        if not _WANTED[name][0](value)
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == count and all(map(_is_number, value))


# Config field -> whether a value is possible, and what possible ones are.
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model.width": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "model.strides": (
        lambda v: _are_numbers(v, 8) and all(stride in (1, 2) for stride in v),
        "8 numbers, each 1 or 2",
    ),
    "model.num_classes": (lambda v: v is None or _is_count(v), "a number of classes, or null"),
    "model.dropout": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "model.padding": (lambda v: v in ("torch", "same"), "'torch' or 'same'"),
    "model.bn_epsilon": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "model.bn_momentum": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "data.image_size": (_is_count, "a number of pixels"),
    "data.eval_transforms": (lambda v: isinstance(v, str), "a string: resize_edge(256)|..."),
    "data.mean": (lambda v: _are_numbers(v, 3), "three numbers, of R, G and B, 0-255"),
    "data.std": (
        lambda v: _are_numbers(v, 3) and min(v) > 0,
        "three numbers above 0, of R, G and B, 0-255",
    ),
}


def shape_faults(wanted: Any, found: Any) -> list[str]:
    """Returns one line for each array that is missing, superfluous or of another shape."""
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in flat}
        for flat in (jax.tree_util.tree_leaves_with_path(tree) for tree in (wanted, found))
    ]
    faults = [f"{name} is missing" for name in shapes[0] if name not in shapes[1]]
    faults += [f"{name} is not of this network" for name in shapes[1] if name not in shapes[0]]
    for name in shapes[0].keys() & shapes[1].keys():
        if shapes[0][name] != shapes[1][name]:
            faults.append(f"{name} is {shapes[1][name]}, not {shapes[0][name]}")
    return sorted(faults)
