"""The size of a network: parameters and multiply-adds, layer by layer, without running it."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbv2_jax.models.classifier import Classifier
from mbv2_jax.models.layers import Conv, ConvNorm

# The layers with a kernel. A `ConvNorm` is one layer with the `Conv` inside it.
LAYERS = (ConvNorm, Conv, nn.Dense)


@dataclass(frozen=True)
class Row:
    """A layer: a convolution, with its normalisation if it has one, or a dense layer.

    Attributes:
      name: path in the parameter tree, 'layer2_0/expand'.
      output_shape: shape for one image: (H, W, C), or (classes,).
      params: number of learned values; statistics are not counted.
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
      params: number of learned values.
      multiply_adds: of all convolutions and dense layers, for one image; the paper's count.
      page_count: mmpretrain's "FLOPs" on its model page (0.319 G at width 1 and 224). mmcv 1.x's
        counter counts a convolution's multiply-adds once, 2 for each element of a BatchNorm's
        output, 1 for each of ReLU6's and 1 for each element that the average pool takes in; the
        classifier is left out.
      rows: the layers in the order they run.
    """

    params: int
    multiply_adds: int
    page_count: int
    rows: tuple[Row, ...]


def profile(model: nn.Module, image_size: int) -> Profile:
    """Measures `model` on one image of (image_size, image_size, 3).

    Args:
      model: a network of the layers in LAYERS, such as `MobileNetV2`.
      image_size: pixels.
    """
    calls = _trace(model, image_size)
    params = calls.params
    rows, page_count = [], calls.pooled
    for layer, shape in calls.layers:
        tree = params
        for key in layer.path:
            tree = tree[key]
        kernel = tree["conv"]["kernel"] if isinstance(layer, ConvNorm) else tree["kernel"]
        positions = prod(shape[:-1])  # how often the kernel is applied
        row = Row("/".join(layer.path), shape, _size(tree), positions * kernel.size)
        rows.append(row)
        if not isinstance(layer, nn.Dense):
            page_count += row.multiply_adds
        if isinstance(layer, ConvNorm):
            page_count += prod(shape) * (3 if layer.relu6 else 2)
    multiply_adds = sum(row.multiply_adds for row in rows)
    return Profile(_size(params), multiply_adds, page_count, tuple(rows))


@dataclass
class _Calls:
    """The calls that a network makes.

    Attributes:
      params: its parameters' shapes.
      layers: each layer with the shape of its output for one image.
      pooled: number of elements that the classifier pools.
    """

    params: Any
    layers: list[tuple[nn.Module, tuple[int, ...]]]
    pooled: int = 0


def _trace(model: nn.Module, image_size: int) -> _Calls:
    calls = _Calls(None, [])
    inside: list[nn.Module] = []  # the layers whose calls are under way

    def watch(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__" or inside:
            return run(*args, **kwargs)
        if isinstance(module, Classifier):
            calls.pooled += prod(args[0].shape[1:])
        if not isinstance(module, LAYERS):
            return run(*args, **kwargs)
        inside.append(module)
        result = run(*args, **kwargs)
        inside.pop()
        calls.layers.append((module, result.shape[1:]))
        return result

    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(watch):
        calls.params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return calls


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
