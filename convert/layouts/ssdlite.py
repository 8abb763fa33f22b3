"""The layouts of SSDLite: those of its backbone, with the names of the heads' layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from mbv2_jax.spec import Preprocessing, TrainingMode

from . import mobilenet_v2
from .layout import Layout


class Order(NamedTuple):
    """The order of the channels of the last layers of the heads.

    Attributes:
      background: the place of the background among the classes of an anchor: 0 or -1.
      codes: the places of x, y, width and height among the codes of an anchor.
    """

    background: int = -1
    codes: tuple[int, ...] = (0, 1, 2, 3)


# Of mmdet, and of this package.
_LAST = Order()
# TensorFlow's codes are those of y, x, height and width.
_FIRST = Order(background=0, codes=(1, 0, 3, 2))

# The order of each layout, by the names of LAYOUTS.
ORDERS: Mapping[str, Order] = {
    "mbv2_jax": _LAST,
    "mmdet": _LAST,
    "tf-slim": _FIRST,
    "tflite": _FIRST,
}

_WHOLE_PICTURE = "resize(size)"


def _on(name: str, rows: dict[str, tuple[str, ...]], **changes: Any) -> Layout:
    """Returns the layout of the whole network of which mobilenet_v2.py has the backbone."""
    base = mobilenet_v2.LAYOUTS[name]
    table = {row: names for row, names in base.table.items() if row != "classifier"} | rows
    marks = ("class_logits0", "box_codes0")
    return dataclasses.replace(base, task="detection", table=table, marks=marks, **changes)


# Of the conventions of TensorFlow's object_detection, and of its
# samples/configs/ssdlite_mobilenet_v2_coco.config; a graph may tell others.
_TENSORFLOW: dict[str, Any] = {
    "preprocessing": Preprocessing(
        image_size=300,
        eval_transforms=_WHOLE_PICTURE,
        mean=(127.5, 127.5, 127.5),
        std=(127.5, 127.5, 127.5),
    ),
    "mode": TrainingMode(bn_momentum=0.9997),
    "head": {
        "taps": ("layer6_0/expand", "last"),
        "anchors": "tensorflow",
        "anchor_sizes": (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0),
        "scores": "sigmoid",
        "score_threshold": 1e-8,
        "nms_iou": 0.6,
        "clip_first": False,
        "max_detections": 100,
    },
}
_MMDET_IMAGES = Preprocessing(image_size=320, eval_transforms=_WHOLE_PICTURE)

LAYOUTS: dict[str, Layout] = {
    "mbv2_jax": _on(
        "mbv2_jax",
        {
            "extra*_reduce": ("extra{index}_reduce/conv", "extra{index}_reduce/norm"),
            "extra*_depthwise": ("extra{index}_depthwise/conv", "extra{index}_depthwise/norm"),
            "extra*_pointwise": ("extra{index}_pointwise/conv", "extra{index}_pointwise/norm"),
            "class_depthwise*": ("class_depthwise{index}/conv", "class_depthwise{index}/norm"),
            "class_logits*": ("class_logits{index}",),
            "box_depthwise*": ("box_depthwise{index}/conv", "box_depthwise{index}/norm"),
            "box_codes*": ("box_codes{index}",),
        },
        preprocessing=_MMDET_IMAGES,
        guesses=(  # where a file of ours lost its model.json
            "model.padding",
            "model.bn_epsilon",
            "model.anchor_sizes",
            "model.scores",
        ),
    ),
    "mmdet": _on(
        "mmdet",
        {
            "extra*_reduce": (
                "neck.extra_layers.{index}.0.conv",
                "neck.extra_layers.{index}.0.bn",
            ),
            "extra*_depthwise": (
                "neck.extra_layers.{index}.1.depthwise_conv.conv",
                "neck.extra_layers.{index}.1.depthwise_conv.bn",
            ),
            "extra*_pointwise": (
                "neck.extra_layers.{index}.1.pointwise_conv.conv",
                "neck.extra_layers.{index}.1.pointwise_conv.bn",
            ),
            "class_depthwise*": (
                "bbox_head.cls_convs.{index}.0.conv",
                "bbox_head.cls_convs.{index}.0.bn",
            ),
            "class_logits*": ("bbox_head.cls_convs.{index}.1",),
            "box_depthwise*": (
                "bbox_head.reg_convs.{index}.0.conv",
                "bbox_head.reg_convs.{index}.0.bn",
            ),
            "box_codes*": ("bbox_head.reg_convs.{index}.1",),
        },
        owner="mmdet 2.x and 3.x, SSDLite",
        # Of its configs/ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py, as the head's are the
        # defaults of ours; torch's momentum is the share of the new statistics.
        backbone=dataclasses.replace(mobilenet_v2.LAYOUTS["mmdet"].backbone, bn_epsilon=1e-3),
        preprocessing=_MMDET_IMAGES,
        mode=TrainingMode(bn_momentum=0.97),
        head={"anchors": "mmdet", "scores": "softmax"},
    ),
    "tf-slim": _on(
        "tf-slim",
        {
            "extra*_reduce": (
                "FeatureExtractor/MobilenetV2/layer_19_1_Conv2d_{index+2}_1x1_{half}",
                "FeatureExtractor/MobilenetV2/layer_19_1_Conv2d_{index+2}_1x1_{half}/BatchNorm",
            ),
            "extra*_depthwise": (
                "FeatureExtractor/MobilenetV2/"
                "layer_19_2_Conv2d_{index+2}_3x3_s2_{channels}_depthwise",
                "FeatureExtractor/MobilenetV2/"
                "layer_19_2_Conv2d_{index+2}_3x3_s2_{channels}_depthwise/BatchNorm",
            ),
            "extra*_pointwise": (
                "FeatureExtractor/MobilenetV2/layer_19_2_Conv2d_{index+2}_3x3_s2_{channels}",
                "FeatureExtractor/MobilenetV2/"
                "layer_19_2_Conv2d_{index+2}_3x3_s2_{channels}/BatchNorm",
            ),
            "class_depthwise*": (
                "BoxPredictor_{index}/ClassPredictor_depthwise",
                "BoxPredictor_{index}/ClassPredictor_depthwise/BatchNorm",
            ),
            "class_logits*": ("BoxPredictor_{index}/ClassPredictor",),
            "box_depthwise*": (
                "BoxPredictor_{index}/BoxEncodingPredictor_depthwise",
                "BoxPredictor_{index}/BoxEncodingPredictor_depthwise/BatchNorm",
            ),
            "box_codes*": ("BoxPredictor_{index}/BoxEncodingPredictor",),
        },
        owner="TensorFlow's object_detection, in a frozen graph",
        **_TENSORFLOW,
    ),
    "tflite": _on(
        "tflite",
        {
            "extra*_reduce": ("extra{index}_reduce", "extra{index}_reduce/norm"),
            "extra*_depthwise": ("extra{index}_depthwise", "extra{index}_depthwise/norm"),
            "extra*_pointwise": ("extra{index}_pointwise", "extra{index}_pointwise/norm"),
            "class_depthwise*": ("class_depthwise{index}", "class_depthwise{index}/norm"),
            "class_logits*": ("class_logits{index}",),
            "box_depthwise*": ("box_depthwise{index}", "box_depthwise{index}/norm"),
            "box_codes*": ("box_codes{index}",),
        },
        guesses=("model.padding", "model.anchor_sizes", "model.scores"),
        **_TENSORFLOW,
    ),
}
