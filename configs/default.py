"""The config of defaults, from which every recipe starts.

The fields are declared where they are used, each with its unit, its range and its meaning, in
mbv2_jax/spec.py (the network and its preprocessing), mbv2_jax/training/settings.py, and the
settings of each task (mbv2_jax/tasks/). `python -m mbv2_jax.main --help` prints them all.
"""

from ml_collections import ConfigDict

from mbv2_jax import tasks
from mbv2_jax.training import settings


def get_config(task: str = tasks.DEFAULT) -> ConfigDict:
    """Returns the locked config of defaults of a task."""
    return settings.make_config(task)
