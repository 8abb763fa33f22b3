"""The tasks by name.

    >>> from mbv2_jax import tasks
    >>> tasks.find("classification").figures
    ('top1', 'top5')

A built-in task is a folder here, with its settings (plain data, so that configs load without jax)
and its class.
"""

import importlib
import types
from typing import TYPE_CHECKING

from mbv2_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from mbv2_jax.tasks.task import Task

# Name -> the class, in a module that imports jax.
BUILT_IN = {"classification": "mbv2_jax.tasks.classification.task:Classification"}
DEFAULT = "classification"


def find(name: str) -> "type[Task]":
    """Returns the class of a task.

    Args:
      name: the name of a built-in task, or 'module:Class' for a user's own class.

    Raises:
      UserError: there is no such task, or its module cannot be imported.
    """
    module_name, _, class_name = BUILT_IN.get(name, name).partition(":")
    if not (module_name and class_name):
        raise UserError(
            f"task is {name!r}: {nearest(name, BUILT_IN)}; or name a class of your own, as "
            "'module:Class'"
        )
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"task is {name!r}, which cannot be imported: {error}") from None


def settings(name: str) -> types.ModuleType:
    """Returns the settings of a built-in task: a module with the dataclasses Head and Settings."""
    return importlib.import_module(f"mbv2_jax.tasks.{name}.settings")


def head(name: str) -> type:
    """Returns the dataclass of a task's head, without importing jax where the task is built in."""
    return settings(name).Head if name in BUILT_IN else find(name).Head
