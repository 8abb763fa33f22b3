"""The size of a network: parameters and multiply-adds, layer by layer, without running it."""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbv2_jax.models.classifier import Classifier
from mbv2_jax.models.layers import Conv, ConvNorm


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
      model: a network of `ConvNorm`, `Conv` and `nn.Dense` layers, such as `MobileNetV2`.
      image_size: pixels.
    """
    params, calls = _trace(model, image_size)
    rows, page_count = [], 0
    for module, inputs, outputs in calls:
        if isinstance(module, Classifier):
            page_count += prod(inputs)  # its average pool
            continue
        tree = params
        for key in module.path:
            tree = tree[key]
        kernel = tree["conv"]["kernel"] if isinstance(module, ConvNorm) else tree["kernel"]
        positions = prod(outputs[:-1])  # how often the kernel is applied
        row = Row("/".join(module.path), outputs, _size(tree), positions * kernel.size)
        rows.append(row)
        if not isinstance(module, nn.Dense):
            page_count += row.multiply_adds
        if isinstance(module, ConvNorm):
            page_count += prod(outputs) * (3 if module.relu6 else 2)
    multiply_adds = sum(row.multiply_adds for row in rows)
    return Profile(_size(params), multiply_adds, page_count, tuple(rows))


class _Call(NamedTuple):
    """A call of a layer: the shapes of its input and output for one image."""

    module: nn.Module
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def _trace(model: nn.Module, image_size: int) -> tuple[Any, list[_Call]]:
    """Returns the shapes of a network's parameters, and its layers' calls in order."""
    calls: list[_Call] = []

    def watch(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = run(*args, **kwargs)
        module = context.module
        counted = isinstance(module, ConvNorm | Conv | nn.Dense | Classifier)
        # The convolution inside a ConvNorm is counted with it.
        counted = counted and not isinstance(module.parent, ConvNorm)
        if counted and context.method_name == "__call__":
            calls.append(_Call(module, args[0].shape[1:], result.shape[1:]))
        return result

    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(watch):
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return params, calls


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
