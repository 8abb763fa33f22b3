"""MobileNetV2 in JAX: train, evaluate, convert and predict.

    >>> import mbv2_jax
    >>> mbv2_jax.enable_compilation_cache()  # optional: later processes need not compile
    >>> predictor = mbv2_jax.init_model("runs/digits")
    >>> mbv2_jax.inference_model(predictor, "seven.png")["pred_class"]
    '7'
    >>> predictor.extract_feat("seven.png").shape
    (1, 1280)

Names are resolved on first use (PEP 562), so that `--help` and the data workers need no jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a type checker cannot see what __getattr__ resolves
    from mbv2_jax.export.stablehlo import load_exported
    from mbv2_jax.inference import inference_model, init_model
    from mbv2_jax.library import LoadedModel, load, save
    from mbv2_jax.models.deeplabv3 import DeepLabV3
    from mbv2_jax.models.mobilenet_v2 import Backbone, MobileNetV2, trainable
    from mbv2_jax.runtime.compilation_cache import enable_compilation_cache
    from mbv2_jax.spec import Preprocessing
    from mbv2_jax.tasks.classification.scores import cross_entropy

__version__ = "0.1.0"

_EXPORTS = {
    "Backbone": "mbv2_jax.models.mobilenet_v2",
    "DeepLabV3": "mbv2_jax.models.deeplabv3",
    "LoadedModel": "mbv2_jax.library",
    "MobileNetV2": "mbv2_jax.models.mobilenet_v2",
    "Preprocessing": "mbv2_jax.spec",
    "cross_entropy": "mbv2_jax.tasks.classification.scores",
    "enable_compilation_cache": "mbv2_jax.runtime.compilation_cache",
    "inference_model": "mbv2_jax.inference",
    "init_model": "mbv2_jax.inference",
    "load": "mbv2_jax.library",
    "load_exported": "mbv2_jax.export.stablehlo",
    "save": "mbv2_jax.library",
    "trainable": "mbv2_jax.models.mobilenet_v2",
}

__all__ = [
    "Backbone",
    "DeepLabV3",
    "LoadedModel",
    "MobileNetV2",
    "Preprocessing",
    "__version__",
    "cross_entropy",
    "enable_compilation_cache",
    "inference_model",
    "init_model",
    "load",
    "load_exported",
    "save",
    "trainable",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
