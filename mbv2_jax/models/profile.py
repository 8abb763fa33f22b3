"""How large a network is: parameters and multiply-adds, layer by layer, without running it."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbv2_jax.models.layers import ConvNorm


@dataclass(frozen=True)
class Row:
    """A layer: convolution with its norm, or the classifier.

    Attributes:
      name: path in the parameter tree, 'layer2_0/expand'.
      output_shape: of one image: (H, W, C), or (classes,).
      params: learned values, statistics not counted.
      multiply_adds: of the convolution or the matrix product, for one image.
    """

    name: str
    output_shape: tuple[int, ...]
    params: int
    multiply_adds: int


@dataclass(frozen=True)
class Profile:
    """The size of a network at one image size.

    Attributes:
      params: learned values.
      multiply_adds: of all convolutions and the classifier, one image; the paper's count.
      page_count: what mmpretrain's model page calls FLOPs (0.319 G at width 1 and 224). mmcv 1.x's
        counter counts a convolution's multiply-adds once, 2 for each element a BatchNorm puts out,
        1 for each of ReLU6 and 1 for each element the average pool takes in; the classifier is
        left out.
      rows: the layers in the order they run.
    """

    params: int
    multiply_adds: int
    page_count: int
    rows: tuple[Row, ...]


def profile(model: nn.Module, image_size: int) -> Profile:
    """Measures `model` on one image of (image_size, image_size, 3).

    Args:
      model: a `MobileNetV2`.
      image_size: pixels.
    """
    layers: list[tuple[nn.Module, tuple[int, ...]]] = []

    def watch(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = run(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, ConvNorm | nn.Dense):
            layers.append((context.module, result.shape[1:]))
        return result

    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(watch):
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]

    rows, extras, pooled = [], 0, 0
    for module, shape in layers:
        tree = params
        for key in module.path:
            tree = tree[key]
        is_conv = isinstance(module, ConvNorm)
        kernel = tree["conv"]["kernel"] if is_conv else tree["kernel"]
        positions = prod(shape[:-1])  # how often the kernel is applied
        rows.append(Row("/".join(module.path), shape, _size(tree), positions * kernel.size))
        if isinstance(module, ConvNorm):
            extras += prod(shape) * (3 if module.relu6 else 2)
            pooled = prod(shape)  # the last convolution's, in the end
        else:
            extras += pooled - rows[-1].multiply_adds  # the pool before the classifier; not itself
    total = sum(row.multiply_adds for row in rows)
    return Profile(_size(params), total, total + extras, tuple(rows))


def table(measured: Profile) -> str:
    """Returns the rows and the totals as aligned plain text, figures with thousands separators."""
    cells = [("layer", "output", "parameters", "multiply-adds")]
    for row in measured.rows:
        shape = " x ".join(str(n) for n in row.output_shape)
        cells.append((row.name, shape, f"{row.params:,}", f"{row.multiply_adds:,}"))
    cells.append(("total", "", f"{measured.params:,}", f"{measured.multiply_adds:,}"))
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {params:>{widths[2]}}  {madds:>{widths[3]}}"
        for name, shape, params, madds in cells
    ]
    ruler = "-" * len(lines[0])
    return "\n".join([lines[0], ruler, *lines[1:-1], ruler, lines[-1]])


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
