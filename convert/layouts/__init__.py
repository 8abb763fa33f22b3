"""Layouts: each framework's names for a network, one file for each network.

    layout.py          the parts of a layout
    mobilenet_v2.py    MobileNetV2 with a classifier, or its backbone alone

To add a layout, add its table to the file of its network, and the real network of that framework to
tests/parity/test_conversion.py. To add a network, add a file and its LAYOUTS here.
"""

from . import mobilenet_v2
from .layout import TORCH, Array, Framework, Layout

LAYOUTS: dict[str, Layout] = mobilenet_v2.LAYOUTS

# The values of --to -> the layout. Keras is absent: only Keras writes files that Keras loads.
TARGETS = {
    "safetensors": "mbv2_jax",
    **{name: name for name, layout in LAYOUTS.items() if layout.framework is TORCH},
}

__all__ = ["LAYOUTS", "TARGETS", "TORCH", "Array", "Framework", "Layout"]
