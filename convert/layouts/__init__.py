"""Layouts: each framework's names for a network, one file for each network.

    layout.py          the parts of a layout
    mobilenet_v2.py    MobileNetV2 with a classifier, or its backbone alone
    deeplabv3.py       Mobile DeepLabv3, for segmentation
    ssdlite.py         SSDLite, for detection

To add a layout, add its table to the file of its network, and the real network of that framework to
tests/parity/test_conversion.py. To add a network, add a file and its layouts to OF_TASK here.
"""

from collections.abc import Mapping

from . import deeplabv3, mobilenet_v2, ssdlite
from .layout import TORCH, Array, Framework, Layout

# The layouts of classifiers and of backbones, by which a file's backbone is recognised.
LAYOUTS: dict[str, Layout] = mobilenet_v2.LAYOUTS
# A task -> the layouts of its networks, by the names of LAYOUTS. Their backbones are the same.
OF_TASK: Mapping[str, Mapping[str, Layout]] = {
    "classification": {
        name: found for name, found in LAYOUTS.items() if "classifier" in found.table
    },
    "segmentation": deeplabv3.LAYOUTS,
    "detection": ssdlite.LAYOUTS,
}

# The values of --to -> the layout. Keras is absent: only Keras writes files that Keras loads.
TARGETS = {
    "safetensors": "mbv2_jax",
    **{name: name for name, layout in LAYOUTS.items() if layout.framework is TORCH},
}

__all__ = ["LAYOUTS", "OF_TASK", "TARGETS", "TORCH", "Array", "Framework", "Layout"]
