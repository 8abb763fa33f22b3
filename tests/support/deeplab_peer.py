"""transformers' Mobile DeepLabv3, also with atrous spatial pyramid pooling, and its arrays as ours.

transformers' head has no pyramid, so `Pyramid` adds TensorFlow deeplab's to the same layers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mbv2_jax.spec import Backbone
from tests.support import peers
from tests.support.torch_layers import Layer


class Pyramid(torch.nn.Module):
    """transformers' head with dilated 3x3 convolutions beside its 1x1 convolution."""

    def __init__(self, head: Any, channels: int, rates: Sequence[int]):
        super().__init__()
        self.head = head
        self.branches = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Conv2d(channels, 256, 3, padding=rate, dilation=rate, bias=False),
                torch.nn.BatchNorm2d(256, eps=1e-5),
                torch.nn.ReLU(),
            )
            for rate in rates
        )
        head.conv_projection.convolution = torch.nn.Conv2d(
            256 * (2 + len(rates)), 256, 1, bias=False
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pooled = self.head.conv_pool(features.mean((2, 3), keepdim=True))
        maps = [pooled.expand(-1, -1, *features.shape[2:]), self.head.conv_aspp(features)]
        maps += [branch(features) for branch in self.branches]
        return self.head.classifier(self.head.conv_projection(torch.cat(maps, 1)))


def make(backbone: Backbone, classes: int, rates: Sequence[int] = (), seed: int = 1) -> Any:
    """Returns the peer of a network, with random weights and statistics.

    Args:
      backbone: its width, padding, epsilon and output stride count.
      classes: their number.
      rates: the dilations of the 3x3 convolutions at this output stride.
      seed: of the random values.
    """
    transformers = peers.transformers()
    config = transformers.MobileNetV2Config(
        depth_multiplier=backbone.width,
        output_stride=backbone.output_stride,
        tf_padding=backbone.padding == "same",
        layer_norm_eps=backbone.bn_epsilon,
        num_labels=classes,
        classifier_dropout_prob=0.0,
    )
    model = transformers.MobileNetV2ForSemanticSegmentation(config)
    if rates:
        channels = model.segmentation_head.conv_pool.convolution.in_channels
        model.segmentation_head = Pyramid(model.segmentation_head, channels, rates)
    peers.randomize(model, seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # transformers has .997, TensorFlow's share that is kept
    return model.double()


def layers(model: Any) -> Iterator[Layer]:
    """Yields our path of each layer with its convolution and its normalisation."""
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    found = [[m for m in model.mobilenet_v2.modules() if isinstance(m, kind)] for kind in kinds]
    names = peers.layer_names()
    assert len(names) == len(found[0]) == len(found[1])
    for name, conv, norm in zip(names, *found, strict=True):
        if name != "last":  # transformers has it and does not use it
            yield name, conv, norm
    pyramid = model.segmentation_head
    head = pyramid.head if isinstance(pyramid, Pyramid) else pyramid
    for name, layer in (
        ("image_pooling", head.conv_pool),
        ("aspp0", head.conv_aspp),
        ("projection", head.conv_projection),
    ):
        yield name, layer.convolution, layer.normalization
    if isinstance(pyramid, Pyramid):
        for number, (conv, norm, _) in enumerate(pyramid.branches, start=1):
            yield f"aspp{number}", conv, norm
    yield "logits", head.classifier.convolution, None
