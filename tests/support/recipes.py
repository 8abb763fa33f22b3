"""The recipes and their learning rates."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mbv2_jax.data import loader
from mbv2_jax.training import config as config_lib
from mbv2_jax.training.schedule import epochs_to_steps, schedule

TRAIN_EXAMPLES = 1_281_167  # of ImageNet


def recipe(name: str, *arguments: str) -> ConfigDict:
    return importlib.import_module(f"mbv2_jax.configs.{name}").get_config(*arguments)


def steps_per_epoch(config: ConfigDict, examples: int = TRAIN_EXAMPLES) -> int:
    return loader.steps_per_epoch(examples, config.batch_size, config.data.last_batch)


def rates(config: ConfigDict, steps: Any, examples: int = TRAIN_EXAMPLES) -> np.ndarray:
    """Returns the learning rates of the given steps, in float64."""
    per_epoch = steps_per_epoch(config, examples)
    total = epochs_to_steps(config.num_epochs, per_epoch)
    with jax.enable_x64(True):
        section = config_lib.read(config).schedule
        rate = jax.jit(jax.vmap(schedule(section, config.batch_size, per_epoch, total)))
        return np.asarray(rate(jnp.asarray(steps)))
