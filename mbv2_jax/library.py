"""Loads a network for your own JAX code, as a module with its variables, and saves it.

    >>> model = mbv2_jax.load("mmpretrain", num_classes=5)
    >>> module, variables = model
    >>> logits = module.apply(variables, model.preprocessing.normalize(pixels))

docs/library.md leads through training, evaluation, features and export.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mbv2_jax import inference, model_dir, model_json, tasks
from mbv2_jax import spec as spec_lib
from mbv2_jax.errors import UserError, first_line, listed, nearest
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.model_json import Description
from mbv2_jax.models.mobilenet_v2 import MobileNetV2, map_endpoints
from mbv2_jax.runtime import processes
from mbv2_jax.spec import PER_DEVICE, Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.storage import bucket
from mbv2_jax.tasks.task import filled


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A linen module with its variables; `module, variables = model` takes it apart.

    Attributes:
      module: (N, H, W, 3) normalised images -> outputs; see `MobileNetV2` and `DeepLabV3`.
      variables: {"params", "batch_stats"}, nested dicts of jax arrays on the default device:
        float32, or float64 where the module's dtype is.
      preprocessing: how an image becomes the module's input.
      class_names: in the order of the outputs; () where there are none, or they are not known.
    """

    module: nn.Module
    variables: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.module, self.variables))


def load(
    checkpoint: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    task: str | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    seed: int = 0,
    **architecture: Any,
) -> LoadedModel:
    """Loads a network for one's own code.

    Args:
      checkpoint: anything that `init_model` takes: a model directory, a training workdir, weights
        of another framework, the name of published weights, or of a variant with random weights.
      num_classes: of the head. Another number than the checkpoint's gives a fresh last layer, after
        the checkpoint's other layers of the head if it has some; None keeps the checkpoint's.
      task: another task than the checkpoint's: the name of a built-in one, or 'module:Class'. The
        network is that task's, with the checkpoint's backbone and a fresh head.
      features_only: whether to leave out the head and return feature maps.
      out_indices: with features_only, the maps to return: 0..6 = layer1..layer7, 7 = the last
        convolution, if the network has one; None returns the last of them. Layers after the last
        of them are left out. See `MobileNetV2.channels` and `MobileNetV2.reductions`.
      seed: of fresh parameters.
      **architecture: other values for fields of `spec.Backbone` that leave the arrays as they are
        (output_stride, strides), of `spec.TrainingMode` (frozen_stages, norm_eval, dropout, dtype,
        remat, bn_momentum, bn_group_size), and of the task's head (hidden; aspp_rates and
        align_corners). `quantize` of `spec.TrainingMode` adds or drops the ranges of activations.

    Returns:
      The module and its variables, with the checkpoint's preprocessing and class names.

    Raises:
      UserError: there is no such model, a field does not exist or has an impossible value, or it
        would change what the checkpoint's weights mean.
    """
    if features_only and (task is not None or num_classes is not None):
        raise UserError("features_only leaves out the head: give no task and no num_classes")
    if out_indices is not None and not features_only:
        raise UserError("out_indices chooses feature maps: give features_only=True too")
    saved = inference.open_model(checkpoint, seed)
    name = task or saved.spec.task
    given = architecture if num_classes is None else architecture | {"num_classes": num_classes}
    fields = _fields(name, given, features_only)
    backbone, mode = _backbone(saved, fields), _mode(saved, fields)
    head = _head(saved, name, fields)
    if features_only or head is None:
        return _features(saved, backbone, mode, inference.checked_indices(out_indices, backbone))
    theirs = (saved.spec.task, saved.spec.head, saved.spec.mode.quantize)
    if (name, head, mode.quantize) == theirs:
        classes, variables = saved.classes, saved.variables()
        network = saved.task().network(backbone, mode)
    else:
        # Another head of as many classes, such as one with hidden layers, is for the same ones.
        alike = (name, getattr(head, "num_classes", 0)) == (saved.spec.task, len(saved.classes))
        classes = saved.classes if alike else ()
        made_for = tasks.find(name).for_model(head, classes)
        network = made_for.network(made_for.backbone(backbone), mode)
        variables, note, _ = made_for.transfer(saved, model_dir.shapes_of(network))
        processes.say(note)
    variables = _fit(network, variables, saved, seed)
    return LoadedModel(network, variables, saved.spec.preprocessing, classes)


def _fields(task: str, given: Mapping[str, Any], features_only: bool) -> dict[str, dict[str, Any]]:
    """Returns the given fields by their dataclass: "backbone", "mode" and "head".

    Raises:
      UserError: a field does not exist, or its value is impossible.
    """
    parts = {"backbone": Backbone, "mode": TrainingMode}
    if not features_only:
        parts["head"] = tasks.settings(task).Head
    known = {f.name: part for part, cls in parts.items() for f in dataclasses.fields(cls)}
    found: dict[str, dict[str, Any]] = {"backbone": {}, "mode": {}, "head": {}}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"there is no field {name!r}: {nearest(name, known)}")
        if name == "dtype" and not isinstance(value, str):
            value = jnp.dtype(value).name
        found[known[name]][name] = spec_lib.frozen(value)
    for part, cls in parts.items():
        if faults := spec_lib.faults(cls, found[part]):
            raise UserError("; ".join(faults))
    return found


def _backbone(saved: SavedModel, fields: Mapping[str, Mapping[str, Any]]) -> Backbone:
    theirs = saved.spec.backbone
    for field in dataclasses.fields(Backbone):
        value, old = fields["backbone"].get(field.name), getattr(theirs, field.name)
        if field.metadata["convention"] and value not in (None, old):
            raise UserError(
                f"{saved.path} does not fit: {field.name} is {value}, the checkpoint's is {old}"
            )
    return dataclasses.replace(theirs, **fields["backbone"])


def _mode(saved: SavedModel, fields: Mapping[str, Mapping[str, Any]]) -> TrainingMode:
    mode = dataclasses.replace(saved.spec.mode, **fields["mode"])
    if mode.bn_group_size == PER_DEVICE:
        raise UserError(f"bn_group_size is {PER_DEVICE!r}: give a number of examples")
    if mode.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("dtype is 'float64': set JAX_ENABLE_X64=1 in the environment too")
    return mode


def _head(saved: SavedModel, task: str, fields: Mapping[str, Mapping[str, Any]]) -> Any:
    """Returns the head's fields: the checkpoint's with those given; None for a backbone alone."""
    if task == saved.spec.task and not fields["head"]:
        return saved.spec.head
    if task == saved.spec.task and saved.spec.head is not None:
        head = dataclasses.replace(saved.spec.head, **fields["head"])
    else:
        head = tasks.settings(task).Head(**fields["head"])
    if getattr(head, "num_classes", 0) is None:
        raise UserError(f"num_classes is missing: {saved.path} has no head for {task!r}")
    return head


def _features(
    saved: SavedModel, backbone: Backbone, mode: TrainingMode, out_indices: tuple[int, ...]
) -> LoadedModel:
    """Returns the layers up to the last of `out_indices`."""
    fields = dataclasses.asdict(backbone) | dataclasses.asdict(mode)
    fields["dtype"] = jnp.dtype(mode.dtype)
    network = MobileNetV2(num_classes=None, out_indices=out_indices, **fields)
    shapes = model_dir.shapes_of(network)
    variables = {
        "params": {name: saved.params[name] for name in shapes["params"] if name in saved.params},
        "batch_stats": filled(shapes["batch_stats"], saved.batch_stats),
    }
    return LoadedModel(
        network, _fit(network, variables, saved, seed=0), saved.spec.preprocessing, ()
    )


def _fit(network: nn.Module, variables: Any, saved: SavedModel, seed: int) -> dict[str, Any]:
    """Returns variables as jax arrays of the network's dtypes; draws those that are only shapes."""
    shapes = model_dir.shapes_of(network)
    if faults := model_dir.shape_faults(shapes, variables):
        raise UserError(f"{saved.path} does not fit the network: {listed(faults)}")
    leaves, tree = jax.tree.flatten(variables)
    fresh = tuple(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    drawn = iter(_draw(network, fresh, jax.random.key(seed)) if any(fresh) else ())
    leaves = [next(drawn) if new else leaf for new, leaf in zip(fresh, leaves, strict=True)]
    # Copies: the arrays of one model stay its own, also where a step is given the buffers.
    return jax.tree.map(
        lambda shape, leaf: jnp.array(leaf, shape.dtype), shapes, jax.tree.unflatten(tree, leaves)
    )


@functools.partial(jax.jit, static_argnames=("network", "chosen"))
def _draw(network: nn.Module, chosen: tuple[bool, ...], key: jax.Array) -> list[jax.Array]:
    """Returns some of a network's initial arrays: to draw them all would compile for long."""
    leaves = jax.tree.leaves(network.init(key, jnp.zeros((1, 32, 32, 3))))
    return [leaf for leaf, wanted in zip(leaves, chosen, strict=True) if wanted]


def save(
    path: str | os.PathLike[str],
    module: nn.Module,
    variables: Mapping[str, Any],
    class_names: Sequence[str] = (),
    *,
    preprocessing: Preprocessing,
    task: str = tasks.DEFAULT,
    **head: Any,
) -> None:
    """Writes a model directory, which `init_model`, `load` and every command open.

    In a program of several processes, each calls it with variables that it can read whole; the
    first one writes.

    Args:
      path: a new folder, on a disk or in a bucket; an old model directory is replaced.
      module: a `MobileNetV2` with its classifier or, for a backbone alone, with the network's last
        map among its `out_indices`; or the network of another `task`.
      variables: its {"params", "batch_stats"}, arrays of jax or numpy, of any float dtype. They are
        stored as float32.
      class_names: of the classes, in the order of the outputs; () for a backbone alone.
      preprocessing: how an image becomes the module's input, such as `LoadedModel.preprocessing`.
      task: the task of the module, where it is not a `MobileNetV2`, as `load` takes it.
      **head: the fields of that task's head, where the module has none of that name.

    Raises:
      UserError: the variables are not those of the module, or not finite; there are not as many
        names as classes; `path` holds something else than a model directory, or cannot be written.
    """
    spec = _spec_of(module, preprocessing, task, head)
    names = _class_names(class_names, spec.head)
    network = tasks.find(task).for_model(spec.head, names).network(spec.backbone, spec.mode)
    if type(network) is not type(module):
        raise UserError(
            f"module is a {type(module).__name__}, and the network of task={task!r} is a "
            f"{type(network).__name__}: give the task of the module"
        )
    arrays = _checked(variables, network)
    folder = bucket.parse_path(os.path.expanduser(path), "path")
    origin = {"kind": "mbv2_jax.save, sha256 of the arrays"}
    origin["sha256"] = model_dir.arrays_sha256(arrays)
    if processes.index():
        return
    try:
        with bucket.as_oserror(folder):
            _check_replaceable(folder)
            model_dir.write(folder, **arrays, description=Description(spec, names, origin))
    except (OSError, ValueError) as error:  # Orbax raises ValueError for a full disk
        raise UserError(f"{folder} cannot be written: {first_line(error)}") from None


def _spec_of(
    module: nn.Module, preprocessing: Preprocessing, task: str, head: Mapping[str, Any]
) -> ModelSpec:
    """Returns the model of which `module` is the network."""
    backbone, mode = (getattr(module, name, None) for name in ("architecture", "mode"))
    if not isinstance(backbone, Backbone) or not isinstance(mode, TrainingMode):
        raise UserError(
            f"module is a {type(module).__name__}: give a MobileNetV2, or a network whose fields "
            "`architecture` and `mode` are a spec.Backbone and a spec.TrainingMode"
        )
    if getattr(module, "folded", False):
        raise UserError("module is folded, for inference alone: give the one it was made from")
    cls = tasks.settings(task).Head
    known = [field.name for field in dataclasses.fields(cls)]
    # A network reads some of the head's fields, or keeps the whole of it.
    keeper = module.head if isinstance(getattr(module, "head", None), cls) else module
    own = {field.name for field in dataclasses.fields(keeper)} & set(known)
    head = {name: spec_lib.frozen(getattr(keeper, name)) for name in own} | dict(head)
    for name in head:
        if name not in known:
            raise UserError(f"the head has no field {name!r}: {nearest(name, known)}")
    faults = spec_lib.faults(cls, head)
    faults += spec_lib.faults(Preprocessing, dataclasses.asdict(preprocessing), "preprocessing")
    if faults:
        raise UserError("; ".join(faults))
    if preprocessing.transform.random:
        raise UserError(f"eval_transforms {preprocessing.eval_transforms!r} is random")
    features_only = isinstance(module, MobileNetV2) and module.num_classes is None
    last = len(map_endpoints(backbone)) - 1
    if features_only and last not in inference.checked_indices(module.out_indices, backbone):
        raise UserError(
            f"module returns the maps {module.out_indices}, and ends before the last one: a "
            f"backbone is saved whole, with {last} among its out_indices"
        )
    return ModelSpec(task, backbone, None if features_only else cls(**head), preprocessing, mode)


def _class_names(class_names: Sequence[str], head: Any) -> tuple[str, ...]:
    """Returns the names of the classes.

    Raises:
      UserError: they are not text, or not as many as the classes.
    """
    if isinstance(class_names, str):
        raise UserError(f"class_names is the text {class_names!r}: give a list of names")
    names = tuple(class_names)
    odd = [name for name in names if not isinstance(name, str) or not name.isprintable()]
    if odd:
        raise UserError(f"class_names holds {odd[0]!a}: give printable text")
    count = 0 if head is None else getattr(head, "num_classes", len(names))
    if len(names) != count:
        raise UserError(
            f"class_names holds {len(names)} names, and the module has {count} classes: name them "
            "in the order of its outputs"
        )
    return names


def _checked(variables: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """Returns variables as nested dicts of finite float32 numpy arrays, which fit the network."""
    if not isinstance(variables, Mapping) or set(variables) != {"params", "batch_stats"}:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise UserError(f'variables must be {{"params": ..., "batch_stats": ...}}, not {found}')
    arrays = jax.device_get(flax.core.unfreeze(dict(variables)))
    if faults := model_dir.shape_faults(model_dir.shapes_of(network), arrays):
        raise UserError(f"variables are not those of the module: {listed(faults)}")
    faults = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            faults.append(f"{name} is {leaf.dtype}, not floating")
        elif not np.isfinite(np.asarray(leaf, np.float32)).all():
            faults.append(f"{name} is not finite")
    if faults:
        raise UserError(f"variables cannot be saved: {listed(faults)}")
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), arrays)


def _check_replaceable(folder: pathlib.Path) -> None:
    """Refuses a path that holds anything else than a model directory."""
    if not folder.exists() or model_json.is_model(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(f"{folder} exists, and is not a model directory: give another path")
