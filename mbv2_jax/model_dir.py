"""Model directories: Orbax arrays and model.json, which together are a trained model.

    DIR/arrays/      {"params", "batch_stats"}: float32, named as models/mobilenet_v2.py names them
    DIR/model.json   the network, its preprocessing, its classes, and where it came from

A model directory is all that is needed to use a model. A training workdir can be opened too: its
`model/` or, while the run continues, its newest checkpoint, which has the same model.json; and any
of its checkpoints by name (checkpoint_names.py). So can the weights of another framework, which
convert/ reads.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mbv2_jax import checkpoint_names, model_json, tasks
from mbv2_jax.errors import UserError, first_line
from mbv2_jax.model_json import Description
from mbv2_jax.ops import lowering
from mbv2_jax.spec import ModelSpec
from mbv2_jax.storage import atomic, bucket

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

    from mbv2_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """The arrays of a model with its description.

    Attributes:
      params: nested dict of float32 numpy arrays; a backbone alone has none of a head.
      batch_stats: nested dict of float32 numpy arrays.
      description: the contents of model.json.
      path: the file or folder that was opened, for messages.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    description: Description
    path: pathlib.Path

    @property
    def spec(self) -> ModelSpec:
        """The network and its preprocessing."""
        return self.description.spec

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of the outputs; () for a backbone alone."""
        return self.description.classes

    @property
    def features_only(self) -> bool:
        """Returns whether this is a backbone without a head."""
        return self.spec.head is None

    def with_spec(self, spec: ModelSpec) -> "SavedModel":
        """Returns the same arrays with another description of their network."""
        return dataclasses.replace(
            self, description=dataclasses.replace(self.description, spec=spec)
        )

    def variables(self) -> dict[str, Any]:
        """Returns {"params", "batch_stats"}, as linen takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def task(self) -> "Task":
        """Returns the task that the model was made for."""
        return tasks.find(self.spec.task).for_model(self.spec.head, self.classes)

    def module(self, *, folded: bool = False) -> nn.Module:
        """Returns the network that these arrays belong to.

        Args:
          folded: whether batch normalisations are part of the convolutions (models/folding.py).
        """
        return self.task().network(self.spec.backbone, self.spec.mode, folded=folded)


def write(path: pathlib.Path, params: Any, batch_stats: Any, description: Description) -> None:
    """Writes a model directory at `path`, replacing one that is there.

    model.json gets the SHA-256 of the array files too, by which `read` notices damage. The new
    directory is complete before the old one is moved away, and the old one is deleted last: a
    process that dies meanwhile leaves one of them complete, if only as `.NAME.new` beside
    `.NAME.old`.

    Raises:
      OSError, ValueError (Orbax's): it cannot be written, perhaps because the disk is full.
    """
    import orbax.checkpoint as ocp  # here, because it takes a fifth of a second

    arrays = {"params": params, "batch_stats": batch_stats}
    with atomic.replace_folder(path, mark="model.json") as folder:
        atomic.check_space(folder, size(arrays))
        with _checkpointer() as checkpointer:
            checkpointer.save(folder / "arrays", args=ocp.args.PyTreeSave(arrays))
        info = description.to_json() | {"arrays_sha256": _sha256(folder / "arrays")}
        (folder / "model.json").write_text(json.dumps(info, indent=2) + "\n")


def size(arrays: Any) -> int:
    """Returns the number of bytes of a tree of arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


def _checkpointer() -> "ocp.Checkpointer":
    """Returns a checkpointer that writes in this process alone."""
    import orbax.checkpoint as ocp

    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index} if jax.process_count() > 1 else None,
        barrier_sync_key_prefix=f"model_dir_{index}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def read(path: str | os.PathLike[str]) -> SavedModel:
    """Opens a model directory, the model of a training workdir, or another framework's weights.

    Args:
      path: a model directory; a workdir with `model/`, or with a checkpoint; one checkpoint, also
        as WORKDIR:best, WORKDIR:last or WORKDIR:STEP; or anything that `python -m convert` takes: a
        file, an https address, a repository of the Hugging Face Hub, a folder that timm or
        transformers wrote, or the name of published weights.

    Raises:
      UserError: there is no model at `path`, or its arrays and its model.json disagree.
    """
    source = os.path.expanduser(path)
    if bucket.is_address(source):
        return _read_from_bucket(source)
    run, name = checkpoint_names.split(source)
    if name and not os.path.lexists(source):
        return _read_named(pathlib.Path(run), name)
    from mbv2_jax.convert import hub_folder  # here: convert/ imports this module

    if not os.path.isdir(source) or hub_folder.has_weights(pathlib.Path(source)):
        from mbv2_jax.convert import importer

        imported = importer.load(source)
        for line in imported.warnings:
            print(f"{source}: {line}", file=sys.stderr)
        return imported.saved
    return _read_folder(pathlib.Path(source))


def _read_from_bucket(address: str) -> SavedModel:
    path = bucket.parse_path(address, "--checkpoint")
    try:
        with bucket.as_oserror(path):
            run, name = checkpoint_names.split(address)
            if name and not path.exists():
                return _read_named(bucket.parse_path(run, "--checkpoint"), name)
            return _read_folder(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _read_named(run: pathlib.Path, name: str) -> SavedModel:
    """Reads the checkpoint of a run that has this name (checkpoint_names.py)."""
    steps = training_steps(run)
    step = checkpoint_names.choose(run, steps, name)
    saved = read_training_checkpoint(run / "checkpoints" / str(step))
    _check(saved)
    return saved


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
    """Reads `model/`, or the newest checkpoint if the run continued after `model/` was written."""
    if (path / "model" / "model.json").is_file():
        saved = _read_model(path / "model")
        origin = saved.description.origin
        if not steps or origin.get("last_step", origin.get("step", 0)) >= max(steps):
            return saved
    return read_training_checkpoint(path / "checkpoints" / str(max(steps)))


def training_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a training workdir."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return []
    import orbax.checkpoint as ocp

    return sorted(ocp.utils.checkpoint_steps(folder))


def _read_model(path: pathlib.Path) -> SavedModel:
    file = path / "model.json"
    try:
        info = json.loads(file.read_text())
        sha256 = _sha256(path / "arrays")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {first_line(error)}") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    description = _parse(info, file)
    # Checked before Orbax opens the files, since it reads some damaged ones without complaint. Old
    # models have no "arrays_sha256", and are read as they are.
    if info.get("arrays_sha256", sha256) != sha256:
        raise UserError(
            f"the arrays in {path / 'arrays'} cannot be read: by their SHA-256, which is in "
            "model.json, they are not the files that were written"
        )
    arrays = _read_arrays(path / "arrays")
    return SavedModel(arrays.get("params", {}), arrays.get("batch_stats", {}), description, path)


def _parse(info: Any, file: pathlib.Path) -> Description:
    """Reads the contents of `file`; raises UserError with its path."""
    try:
        return model_json.parse(info)
    except UserError as error:
        raise UserError(f"{file} {error}") from None


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
    # Old checkpoints have no "state_sha256", and are read as they are.
    if info.get("state_sha256", found) != found:
        raise UserError(
            f"the arrays in {path / 'state'} are damaged: by their SHA-256, they are not what was "
            "saved"
        )
    weights = state.get("ema") or state
    description = _parse(info, path / "model" / "metadata")
    return SavedModel(weights["params"], weights["batch_stats"], description, path)


def _read_arrays(path: pathlib.Path) -> dict[str, Any]:
    """Returns the arrays of a folder that Orbax wrote, as nested dicts of numpy arrays.

    Each is an array of tensorstore, and `_METADATA` lists their names. tensorstore reads a network
    in a tenth of a second; Orbax, import included, would take four times as long.
    """
    try:
        metadata = json.loads((path / "_METADATA").read_text())
        names = [
            [key["key"] for key in entry["key_metadata"]]
            for entry in metadata["tree_metadata"].values()
            if not entry["value_metadata"].get("skip_deserialize")  # None, or an empty dict
        ]
        arrays: dict[str, Any] = {}
        for keys, array in zip(names, _read_tensorstore(path, metadata, names), strict=True):
            tree = arrays
            for key in keys[:-1]:
                tree = tree.setdefault(key, {})
            tree[keys[-1]] = array
        return arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the arrays in {path} cannot be read: {str(error)[:200]}") from None


def _read_tensorstore(
    path: pathlib.Path, metadata: Mapping[str, Any], names: Iterable[Sequence[str]]
) -> list[np.ndarray]:
    """Returns the arrays of the given names, in their order.

    Args:
      path: the folder.
      metadata: the contents of its `_METADATA`.
      names: the keys that lead to each array.

    Raises:
      OSError, ValueError: an array, or a part of it, is missing or damaged.
    """
    import tensorstore

    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        # Otherwise a chunk that is missing would be read as zeros.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
    }
    base = bucket.kvstore(bucket.absolute(path))
    opened = [
        tensorstore.open(
            spec | {"kvstore": {"driver": "ocdbt", "base": base, "path": f"{'.'.join(keys)}/"}},
            open=True,
            read=True,
        )
        for keys in names
    ]
    reads = [array.result().read() for array in opened]
    return [read.result() for read in reads]


def _check(saved: SavedModel) -> None:
    """Refuses arrays that do not fit the network that model.json describes."""
    faults = shape_faults(shapes_of(saved.module()), saved.variables())
    if faults:
        raise UserError(f"{saved.path}: model.json and the arrays disagree: {'; '.join(faults)}")


def shapes_of(network: nn.Module) -> Any:
    """Returns the shapes and dtypes of a network's variables, as a tree of ShapeDtypeStructs."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)  # they do not depend on its size
    key = jax.eval_shape(jax.random.key, 0)
    with lowering.plain_lowering():  # the shapes are the same, and found in half the time
        return jax.eval_shape(network.init, key, image)


def shape_faults(wanted: Any, found: Any) -> list[str]:
    """Returns a line for each array that is missing, superfluous or of another shape."""
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
