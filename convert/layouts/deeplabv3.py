"""The layouts of Mobile DeepLabv3: those of its backbone, with the names of the head's layers."""

import dataclasses
from typing import Any

from mbv2_jax.spec import Preprocessing

from . import mobilenet_v2
from .layout import Layout, of_width
from .mobilenet_v2 import WIDTHS

# TensorFlow's deeplab: VOC's pictures are at most 500 pixels wide and high, and are padded to 513.
_WHOLE_PICTURE = "fit(size)|pad(size)"
_IMAGES = Preprocessing(
    image_size=513,
    eval_transforms=_WHOLE_PICTURE,
    mean=(127.5, 127.5, 127.5),
    std=(127.5, 127.5, 127.5),
)
# The output stride of the paper's first row, and of the published figure.
_OUTPUT_STRIDE = 16
_DROPOUT = 0.1  # of TensorFlow's deeplab


def _on(name: str, rows: dict[str, tuple[str, ...]], **changes: Any) -> Layout:
    """Returns the layout of the whole network of which mobilenet_v2.py has the backbone."""
    base = mobilenet_v2.LAYOUTS[name]
    return dataclasses.replace(
        base,
        task="segmentation",
        table={row: names for row, names in base.table.items() if row != "classifier"} | rows,
        backbone=dataclasses.replace(
            base.backbone, output_stride=_OUTPUT_STRIDE, last_convolution=False
        ),
        mode=dataclasses.replace(base.mode, dropout=_DROPOUT),
        marks=("projection", "logits"),
        **changes,
    )


LAYOUTS: dict[str, Layout] = {
    "mbv2_jax": _on(
        "mbv2_jax",
        {
            "image_pooling": ("image_pooling/conv", "image_pooling/norm"),
            "aspp0": ("aspp0/conv", "aspp0/norm"),
            "aspp*": ("aspp{index}/conv", "aspp{index}/norm"),
            "projection": ("projection/conv", "projection/norm"),
            "logits": ("logits",),
        },
        preprocessing=dataclasses.replace(
            mobilenet_v2.LAYOUTS["mbv2_jax"].preprocessing,
            image_size=513,
            eval_transforms=_WHOLE_PICTURE,
        ),
        guesses=(  # where a file of ours lost its model.json
            "model.padding",
            "model.bn_epsilon",
            "model.output_stride",
            "model.align_corners",
        ),
    ),
    "tf-slim": _on(
        "tf-slim",
        {
            "image_pooling": ("image_pooling", "image_pooling/BatchNorm"),
            "aspp0": ("aspp0", "aspp0/BatchNorm"),
            "aspp*": ("aspp{index}", "aspp{index}/BatchNorm"),
            "projection": ("concat_projection", "concat_projection/BatchNorm"),
            "logits": ("logits/semantic",),
        },
        owner="TensorFlow's deeplab, in a frozen graph",
        preprocessing=_IMAGES,
        guesses=("model.output_stride", "model.align_corners"),
    ),
    "tflite": _on(
        "tflite",
        {
            "image_pooling": ("image_pooling", "image_pooling/norm"),
            "aspp0": ("aspp0", "aspp0/norm"),
            "aspp*": ("aspp{index}", "aspp{index}/norm"),
            "projection": ("projection", "projection/norm"),
            "logits": ("logits",),
        },
        preprocessing=_IMAGES,
        guesses=("model.padding", "model.output_stride", "model.align_corners"),
    ),
    "transformers": _on(
        "transformers",
        {
            "image_pooling": (
                "segmentation_head.conv_pool.convolution",
                "segmentation_head.conv_pool.normalization",
            ),
            "aspp0": (
                "segmentation_head.conv_aspp.convolution",
                "segmentation_head.conv_aspp.normalization",
            ),
            "projection": (
                "segmentation_head.conv_projection.convolution",
                "segmentation_head.conv_projection.normalization",
            ),
            "logits": ("segmentation_head.classifier.convolution",),
        },
        owner="Hugging Face transformers, MobileNetV2ForSemanticSegmentation",
        preprocessing=_IMAGES,
        # Its loss resizes the logits in the way that torch does by default.
        head={"align_corners": False},
        # config.json beside the file has the output stride and tf_padding.
        guesses=("model.padding", "model.output_stride"),
        unused=("last",),
        has_network=of_width(lambda width: width in WIDTHS),
        network="transformers.MobileNetV2ForSemanticSegmentation(transformers.MobileNetV2Config("
        "depth_multiplier={width}, num_labels={classes}, output_stride={output_stride}))",
    ),
}
