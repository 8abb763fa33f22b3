"""Anchors: the boxes at each position of a map from which those of objects are reckoned.

Two tables that weights are published for. `sizes` are shares of the image's side, one for each map,
and one more; map i has anchors of the size sizes[i], of ratios about it, and a square one between
sizes[i] and sizes[i + 1].

mmdet         6 at each position: square; square of the size between; then the ratios 2, 1/2, 3 and
              1/3 of width to height. Centres are half a stride from the edge, and strides are
              whole pixels: 107, not 106.67, at 320 pixels and 3 positions.
tensorflow    3 on the first map: square of half of sizes[0]; ratios 2 and 1/2. On the others 6:
              square; ratios 2, 1/2, 3, 1/3 (0.3333 in the config of the published weights, which
              shows in the fifth digit); square of the size between. Positions are spread evenly.

Sources: mmdet's `SSDAnchorGenerator` with `scale_major=False`, and `create_ssd_anchors` of
TensorFlow's object_detection with `reduce_boxes_in_lowest_layer`.
"""

import dataclasses
import math

import numpy as np

TABLES = ("mmdet", "tensorflow")
# The ratios of width to height after the first square one.
_MMDET_RATIOS = (2.0, 1 / 2, 3.0, 1 / 3)
_TENSORFLOW_RATIOS = (2.0, 1 / 2, 3.0, 0.3333)


@dataclasses.dataclass(frozen=True)
class AnchorTable:
    """The anchors of each map.

    Attributes:
      table: one of TABLES.
      sizes: shares of the image's side, one more than there are maps.
    """

    table: str
    sizes: tuple[float, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The anchors of a position of each map."""
        return tuple(len(self._shapes(i)) for i in range(len(self.sizes) - 1))

    def boxes(self, number: int, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Returns the anchors of a map in the order of rows, columns, and anchors of a position.

        Args:
          number: of the map, from 0.
          shape: (height, width) of the map.
          size: (height, width) of the image, in pixels.

        Returns:
          (h * w * k, 4) float32: x0, y0, x1, y1 in pixels; they may reach beyond the image.
        """
        y = self._centres(shape[0], size[0])[:, None, None]  # (h, 1, 1)
        x = self._centres(shape[1], size[1])[None, :, None]  # (1, w, 1)
        width, height = (np.array(self._shapes(number)) * size[::-1]).T / 2  # halves, (k,)
        corners = np.broadcast_arrays(x - width, y - height, x + width, y + height)
        return np.stack(corners, -1).reshape(-1, 4).astype(np.float32)

    def _centres(self, positions: int, side: int) -> np.ndarray:
        """Returns the centres along an axis, in pixels."""
        stride = side / positions
        if self.table == "mmdet":
            stride = math.ceil(stride)
        return (np.arange(positions) + 0.5) * stride

    def _shapes(self, i: int) -> list[tuple[float, float]]:
        """Returns (width, height) of a position's anchors, in shares of the image's sides."""
        size = self.sizes[i]
        between = (math.sqrt(size * self.sizes[i + 1]),) * 2
        if self.table == "mmdet":
            return [(size, size), between, *(_stretched(size, ratio) for ratio in _MMDET_RATIOS)]
        if i == 0:
            return [(size / 2,) * 2, *(_stretched(size, ratio) for ratio in _TENSORFLOW_RATIOS[:2])]
        return [(size, size), *(_stretched(size, ratio) for ratio in _TENSORFLOW_RATIOS), between]


def _stretched(size: float, ratio: float) -> tuple[float, float]:
    """Returns (width, height) of the area size * size, `ratio` of width to height."""
    return size * math.sqrt(ratio), size / math.sqrt(ratio)
