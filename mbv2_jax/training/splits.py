"""The splits of a config's data, opened for its task."""

from mbv2_jax.data import sources
from mbv2_jax.data.sources import Source
from mbv2_jax.training.config import Settings


def open_split(settings: Settings, split: str) -> Source:
    """Opens a split whole, as an evaluation needs it.

    Args:
      settings: of a config.
      split: as `sources.open_source` takes it.

    Raises:
      UserError: as `sources.open_source`.
    """
    data = settings.data
    return sources.open_source(data.source, split, data.data_dir, target=settings.task.target)


def open_training(settings: Settings) -> Source:
    """Opens the examples of the training split that the task trains on.

    Raises:
      UserError: as `sources.open_source` and `Task.select`.
    """
    split = open_split(settings, settings.data.train_split)
    return settings.task.select(settings.given, split)
