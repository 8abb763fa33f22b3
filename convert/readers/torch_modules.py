"""Whole models of PyTorch: the state of the modules in a pickle, as torch.save(model) writes it.

No module of theirs is imported: a `Made` has the class's name, and the attributes that
torch.nn.Module keeps, `_parameters`, `_buffers` and `_modules`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .contents import Dense
from .torch_pickle import Made, Tensor

_DEEPEST = 50  # modules inside one another; a network has ten
_MOST = 10_000  # modules; one may stand in several places

# The last part of a class's name -> the activation. Of others, the name itself is used.
_ACTIVATIONS = {"ReLU": "relu", "Softmax": "softmax", "Sigmoid": "sigmoid"}
_IN_BACKBONE = ("ReLU6", "ReLU", "Hardtanh")  # nn.ReLU6 is a Hardtanh from 0 to 6


class Model(NamedTuple):
    """A whole model.

    Attributes:
      state: its tensors by name, as state_dict() returns them.
      head: its dense layers in order, with the activations between them.
      obstacles: the activations that no network here has.
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
    for count, (name, module) in enumerate(_walk(value, "", 0)):
        if count == _MOST:
            raise ValueError(f"a model of more than {_MOST:,} modules")
        state |= _tensors(name, module.state)
        kind = module.name.name.rpartition(".")[2]
        if kind == "Linear":
            dense.append(Dense(name, "linear"))
        elif dense and kind in _ACTIVATIONS:
            dense[-1] = dense[-1]._replace(activation=_ACTIVATIONS[kind])
        elif module.name.module == "torch.nn.modules.activation" and (
            dense or kind not in _IN_BACKBONE
        ):
            obstacles.append(f"activation {kind} ({name})")
    return Model(state, tuple(dense) or None, tuple(obstacles))


def _walk(module: Made, name: str, depth: int) -> Iterator[tuple[str, Made]]:
    """Yields a module and those in it with their names, in the order of state_dict()."""
    if depth > _DEEPEST:
        raise ValueError(f"modules inside one another without end: {name[:40]}...")
    yield name, module
    children = module.state["_modules"]
    for key, child in children.items() if isinstance(children, dict) else ():
        if is_module(child):
            yield from _walk(child, f"{name}.{key}" if name else str(key), depth + 1)


def _tensors(name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Returns a module's own parameters and persistent buffers by their whole names."""
    transient = state.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, list) else []
    found = {}
    for kind in ("_parameters", "_buffers"):
        entries = state.get(kind)
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, Tensor) and key not in transient:
                found[f"{name}.{key}" if name else key] = value
    return found
