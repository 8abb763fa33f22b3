"""The strides and dilations in a graph, as the fields of a network."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mbv2_jax.spec import Backbone


class Step(NamedTuple):
    """The stride and the dilation of a depthwise convolution."""

    stride: int
    dilation: int


def fields(stem: int, steps: Sequence[Step]) -> dict[str, Any] | None:
    """Returns the fields of the network with these strides.

    Args:
      stem: the stride of the first convolution.
      steps: those of the 17 depthwise convolutions.

    Returns:
      Values by their names in a config; None where no network here has these strides and dilations.
    """
    # Imported here, since it imports jax, which takes seconds.
    from mbv2_jax.models.mobilenet_v2 import STAGES, blocks

    def fits(backbone: Backbone) -> bool:
        expected = [Step(block.stride, block.dilation) for block in blocks(backbone)]
        return (stem, *steps) == (backbone.strides[0], *expected)

    for output_stride in (32, 16, 8):
        if fits(Backbone(output_stride=output_stride)):
            return {"model.output_stride": output_stride}
    firsts = [sum(stage.blocks for stage in STAGES[:index]) for index in range(len(STAGES))]
    if len(steps) <= firsts[-1]:
        return None
    strides = (stem, *(steps[first].stride for first in firsts))
    if not fits(Backbone(strides=strides)):
        return None
    return {"model.strides": strides, "model.output_stride": Backbone.output_stride}
