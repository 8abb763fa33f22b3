"""MobileNetV2 written with Flax's own layers, the baseline of ours.

The modules have the names of `mbv2_jax.models.mobilenet_v2`, so that both take the same variables.
"""

import jax
from flax import linen as nn

# Expansion, channels, blocks, stride: Table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, and ReLU6 if `relu6` is set."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    relu6: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features)."""
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            self.stride,
            padding=self.kernel_size // 2,
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm")(x)
        return nn.relu6(x) if self.relu6 else x


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection, and the shortcut where shapes allow it."""

    channels: int
    expansion: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), channels)."""
        inner = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = ConvNorm(inner, name="expand")(y, train)
        y = ConvNorm(inner, 3, self.stride, groups=inner, name="depthwise")(y, train)
        y = ConvNorm(self.channels, relu6=False, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """The network of width 1."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(N, H, W, 3), normalised -> logits (N, num_classes)."""
        x = ConvNorm(32, 3, 2, name="stem")(x, train)
        for i, (expansion, channels, blocks, stride) in enumerate(STAGES, start=1):
            for j in range(blocks):
                block = InvertedResidual(
                    channels, expansion, stride if j == 0 else 1, name=f"layer{i}_{j}"
                )
                x = block(x, train)
        x = ConvNorm(1280, name="last")(x, train)
        return nn.Dense(self.num_classes, name="classifier")(x.mean((1, 2)))
