"""mmdet's SSDLite, from its own config, and its arrays as ours."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mbv2_jax.models.layers import make_divisible
from tests.support import peers
from tests.support.torch_layers import Layer

CONFIG = ".mim/configs/ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py"


def config() -> Any:
    """Returns mmdet's recipe as an mmengine Config, read from its file."""
    from mmengine.config import Config

    return Config.fromfile(pathlib.Path(peers.mmdet().__path__[0]) / CONFIG)


def make(
    classes: int, size: int, shares: Sequence[float], width: float = 1.0, seed: int = 1
) -> Any:
    """Returns mmdet's model with random weights and statistics.

    Args:
      classes: their number.
      size: side of the images in pixels, for which the anchors' strides are: the config's are for
        320.
      shares: sizes of the anchors in shares of the side, seven.
      width: the width multiplier.
      seed: of the random values.
    """
    from mmdet.registry import MODELS

    settings = config().model
    sizes = [share * size for share in shares]
    maps = [-(-size // 16), -(-size // 32)]
    while len(maps) < 6:
        maps.append(-(-maps[-1] // 2))
    channels = (make_divisible(96 * width), 1280, *settings.neck.out_channels[2:])
    settings.backbone.widen_factor = width
    settings.neck.update(in_channels=channels[:2], out_channels=channels)
    settings.bbox_head.update(num_classes=classes, in_channels=channels)
    settings.bbox_head.anchor_generator.update(
        strides=[-(-size // side) for side in maps], min_sizes=sizes[:-1], max_sizes=sizes[1:]
    )
    with MODELS.switch_scope_and_registry("mmdet") as registry:  # other peers have scopes, too
        model = registry.build(settings)
    model.bbox_head.loss_cls = None  # which mmdet 3.3.0's SSDHead.predict asks for
    peers.randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for branches in (model.bbox_head.cls_convs, model.bbox_head.reg_convs):
        for _, predict in branches:
            predict.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return model


def layers(model: Any) -> Iterator[Layer]:
    """Yields our path of each layer with its convolution and its normalisation."""
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    found = [[m for m in model.backbone.modules() if isinstance(m, kind)] for kind in kinds]
    yield from zip(peers.layer_names(), *found, strict=True)
    for i, (reduce, separable) in enumerate(model.neck.extra_layers):
        yield f"extra{i}_reduce", reduce.conv, reduce.bn
        yield f"extra{i}_depthwise", separable.depthwise_conv.conv, separable.depthwise_conv.bn
        yield f"extra{i}_pointwise", separable.pointwise_conv.conv, separable.pointwise_conv.bn
    heads = (
        ("class_depthwise", "class_logits", model.bbox_head.cls_convs),
        ("box_depthwise", "box_codes", model.bbox_head.reg_convs),
    )
    for first, last, branches in heads:
        for i, (depthwise, predict) in enumerate(branches):
            yield f"{first}{i}", depthwise.conv, depthwise.bn
            yield f"{last}{i}", predict, None
