"""mmdet's config of a detection network of ours: what differs from that of its model page."""

import math
from typing import Any

from mbv2_jax.model_dir import SavedModel
from mbv2_jax.models.mobilenet_v2 import endpoint_sizes, stage_endpoints
from mbv2_jax.tasks.detection.settings import Head

CONFIG = "configs/ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py"

# The values in that file, by their names there.
_VALUES: dict[str, Any] = {
    "model.backbone.widen_factor": 1.0,
    "model.backbone.out_indices": [4, 7],
    "model.neck.in_channels": [96, 1280],
    "model.neck.out_channels": [96, 1280, 512, 256, 256, 128],
    "model.neck.level_strides": [2, 2, 2, 2],
    "model.neck.level_paddings": [1, 1, 1, 1],
    "model.bbox_head.in_channels": [96, 1280, 512, 256, 256, 128],
    "model.bbox_head.num_classes": 80,
    "model.bbox_head.anchor_generator.strides": [16, 32, 64, 107, 160, 320],
    "model.bbox_head.anchor_generator.ratios": [[2, 3]] * 6,
    "model.bbox_head.anchor_generator.min_sizes": [48, 100, 150, 202, 253, 304],
    "model.bbox_head.anchor_generator.max_sizes": [100, 150, 202, 253, 304, 320],
    "model.test_cfg.nms_pre": 1000,
    "model.test_cfg.score_thr": 0.02,
    "model.test_cfg.nms.iou_threshold": 0.45,
    "model.test_cfg.max_per_img": 200,
    "model.data_preprocessor.mean": [123.675, 116.28, 103.53],
    "model.data_preprocessor.std": [58.395, 57.12, 57.375],
}


def options(saved: SavedModel) -> dict[str, Any]:
    """Returns the values of a model that differ from those of CONFIG, by their names there.

    Args:
      saved: a detection model whose taps are stages, and then "last".
    """
    head, images = saved.spec.head, saved.spec.preprocessing
    assert isinstance(head, Head)
    backbone, size = saved.spec.backbone, images.image_size
    ends = [*stage_endpoints(backbone), "last"]
    stages = [*(f"layer{i}" for i in range(1, 8)), "last"]
    places = [stages.index(tap) for tap in head.taps]
    taps = endpoint_sizes(backbone, [ends[place] for place in places])
    channels = [tap.channels for tap in taps]
    maps = [*channels, *head.extra_channels]
    positions = [math.ceil(size / tap.reduction) for tap in taps]
    for _ in head.extra_channels:
        positions.append(math.ceil(positions[-1] / 2))
    sides = [_whole(share * size) for share in head.anchor_sizes]
    ours = (
        backbone.width,
        places,
        channels,
        maps,
        [2] * len(head.extra_channels),
        [1] * len(head.extra_channels),
        maps,
        head.num_classes,
        [math.ceil(size / count) for count in positions],
        [[2, 3]] * len(maps),
        sides[:-1],
        sides[1:],
        head.candidates,
        head.score_threshold,
        head.nms_iou,
        head.max_detections,
        list(images.mean),
        list(images.std),
    )
    pairs = zip(_VALUES.items(), ours, strict=True)
    return {name: value for (name, theirs), value in pairs if value != theirs}


def _whole(pixels: float) -> float:
    """Returns a size in pixels without the noise of its share of the image's side."""
    return round(pixels) if abs(pixels - round(pixels)) < 1e-6 else pixels
