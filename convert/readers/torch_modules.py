"""Whole models of PyTorch: the state of the modules in a pickle, as torch.save(model) writes it.

No module of theirs is imported: a `Made` has the class's name, and the attributes that
torch.nn.Module keeps, `_parameters`, `_buffers` and `_modules`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .contents import Dense
from .torch_pickle import Made, Name, Tensor

_DEEPEST = 50  # modules inside one another; a network has ten
_MOST = 10_000  # modules; one may stand in several places

_LONGEST = 1_000  # characters of a name; one may stand in many names

# The last part of a class's name -> the activation. The scores are those of softmax in any case.
_ACTIVATIONS = {"ReLU": "relu", "Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}
_IN_BACKBONE = ("ReLU6", "ReLU", "Hardtanh")  # nn.ReLU6 is a Hardtanh from 0 to 6

# The modules of torch.nn without arrays that change nothing in evaluation, or pool as is done here.
_PLAIN = ("container", "dropout", "flatten", "loss", "module")
_PLAIN_KINDS = ("Identity", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AvgPool2d")


class Model(NamedTuple):
    """A whole model.

    Attributes:
      state: its tensors by name, as state_dict() returns them.
      head: its dense layers in order, with the activations between them; those of a module with
        a `forward` of its own are not known.
      obstacles: the activations and other modules without arrays that no network here has.
    """

    state: dict[str, Tensor]
    head: tuple[Dense, ...] | None
    obstacles: tuple[str, ...]


def is_module(value: Any) -> bool:
    """Returns whether an object of a pickle is a torch.nn.Module."""
    return isinstance(value, Made) and isinstance(value.state, dict) and "_modules" in value.state


def find(value: Any) -> Model | None:
    """Returns a whole model; None for arrays by name.

    Raises:
      ValueError: modules lie inside one another without end, or are too many.
    """
    if not is_module(value):
        return None
    state: dict[str, Tensor] = {}
    dense: list[Dense] = []
    obstacles: list[str] = []
    in_head = False  # whether the last module with arrays is a dense one
    for count, (name, module, in_order) in enumerate(_walk(value, "", 0)):
        tensors = _tensors(name, module.state)
        state |= tensors
        if count == _MOST or len(state) > _MOST:
            raise ValueError(f"a model of more than {_MOST:,} modules or arrays")
        kind = module.name.name.rpartition(".")[2]
        activation = _ACTIVATIONS.get(kind)
        if tensors:
            in_head = kind == "Linear"
        if kind == "Linear":
            dense.append(Dense(name, "linear" if in_order else ""))
        elif activation == "relu" and in_head and not in_order:
            pass  # it may stand between any of them
        elif activation and in_head and dense[-1].activation in ("linear", ""):
            dense[-1] = dense[-1]._replace(activation=activation)
        elif not tensors and _is_obstacle(module.name, kind, after_dense=in_head):
            obstacles.append(f"{kind} ({name})")
    return Model(state, tuple(dense) or None, tuple(obstacles))


def _is_obstacle(name: Name, kind: str, *, after_dense: bool) -> bool:
    """Returns whether a module without arrays computes what no network here does."""
    package, _, file = name.module.rpartition(".")
    if package != "torch.nn.modules" or file in _PLAIN or kind in _PLAIN_KINDS:
        return False
    return after_dense or kind not in _IN_BACKBONE


def _walk(
    module: Made, name: str, depth: int, in_order: bool = False
) -> Iterator[tuple[str, Made, bool]]:
    """Yields the modules in one, and itself, in the order of state_dict().

    Each comes with its name, and whether it is called after the one before, as in nn.Sequential.
    """
    if depth > _DEEPEST or len(name) > _LONGEST:
        raise ValueError(f"modules inside one another without end: {name[:40]}...")
    yield name, module, in_order
    children = module.state["_modules"]
    in_order = module.name.name == "Sequential"
    for key, child in children.items() if isinstance(children, dict) else ():
        if is_module(child):
            yield from _walk(child, f"{name}.{key}" if name else str(key), depth + 1, in_order)


def _tensors(name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Returns a module's own parameters and persistent buffers by their whole names."""
    transient = state.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, list) else []
    found = {}
    for kind in ("_parameters", "_buffers"):
        entries = state.get(kind)
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if len(key) > _LONGEST:
                raise ValueError(f"an array whose name has {len(key):,} characters")
            if isinstance(value, Tensor) and key not in transient:
                found[f"{name}.{key}" if name else key] = value
    return found
