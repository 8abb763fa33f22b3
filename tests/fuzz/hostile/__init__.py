"""Files that were made to harm whoever opens them, container by container."""

from collections.abc import Callable

from . import keras, safetensors, tensorflow, tfjs, tflite, torch
from .files import Files, Originals

_MAKERS: dict[str, Callable[[Originals], Files]] = {
    "torch zip": torch.torch_zip,
    "torch legacy": torch.torch_legacy,
    "safetensors": safetensors.safetensors,
    "keras": keras.archive,
    "weights.h5": keras.weights,
    "h5": keras.whole_model,
    "tfjs": tfjs.description,
    "tfjs zip": tfjs.archive,
    "frozen graph": tensorflow.graph,
    "tgz": tensorflow.archive,
    "tflite": tflite.files,
}

CONTAINERS = tuple(_MAKERS)


def files(name: str, originals: Originals) -> Files:
    """Returns the hostile files of one container.

    Args:
      name: of the container.
      originals: real files of it.
    """
    return _MAKERS[name](originals)
