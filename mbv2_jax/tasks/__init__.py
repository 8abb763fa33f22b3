"""The tasks by name.

    >>> from mbv2_jax import tasks
    >>> tasks.find("classification").figures
    ('top1', 'top5')

A built-in task is a folder here, with its settings (plain data, so that configs load without jax)
and its class.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mbv2_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from mbv2_jax.tasks.task import Task

# Name -> the class, in a module that imports jax.
BUILT_IN = {
    "classification": "mbv2_jax.tasks.classification.task:Classification",
    "detection": "mbv2_jax.tasks.detection.task:Detection",
    "segmentation": "mbv2_jax.tasks.segmentation.task:Segmentation",
}
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


def settings(name: str) -> Any:
    """Returns the object whose attributes Head and Settings declare a task's fields.

    Of a built-in task it is a module that imports no jax, of a user's task the class itself.
    """
    if name in BUILT_IN:
        return importlib.import_module(f"mbv2_jax.tasks.{name}.settings")
    return find(name)
