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
        return tuple(len(self._kinds(i)) for i in range(len(self.sizes) - 1))

    def boxes(self, number: int, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Returns the anchors of a map in the order of rows, columns, and anchors of a position.

        Args:
          number: of the map, from 0.
          shape: (height, width) of the map.
          size: (height, width) of the image, in pixels.

        Returns:
          (h * w * k, 4) float32: x0, y0, x1, y1 in pixels; they may reach beyond the image.
        """
        strides = np.array([self._stride(*pair) for pair in zip(size, shape, strict=True)][::-1])
        half = self._shapes(number, size[::-1]) / 2  # (k, 2), of width and height
        middle = strides.astype(np.float32) / 2
        first = np.concatenate([middle - half, middle + half], 1)  # (k, 4), at the first position
        rows, columns = np.mgrid[: shape[0], : shape[1]]  # (h, w)
        moved = np.stack([columns, rows] * 2, -1) * np.tile(strides, 2)  # (h, w, 4)
        found = moved.astype(np.float32)[:, :, None] + first  # (h, w, k, 4)
        return found.reshape(-1, 4)

    def _stride(self, side: int, positions: int) -> float:
        """Returns the distance between two positions of an axis, in pixels."""
        return math.ceil(side / positions) if self.table == "mmdet" else side / positions

    def _kinds(self, number: int) -> list[tuple[float, float]]:
        """Returns the anchors of a position: scale of the map's size, and height to width."""
        between = math.sqrt(self.sizes[number + 1] / self.sizes[number])
        if self.table == "mmdet":
            return [(1, 1), (between, 1), *((1, ratio) for ratio in (1 / 2, 2, 1 / 3, 3))]
        if number == 0:
            return [(1 / 2, 1), (1, 1 / 2), (1, 2)]
        return [(1, 1), *((1, ratio) for ratio in (1 / 2, 2, 1 / 3, 1 / 0.3333)), (between, 1)]

    def _shapes(self, number: int, sides: tuple[int, int]) -> np.ndarray:
        """Returns width and height of a position's anchors in pixels, (k, 2) float32.

        Args:
          number: of the map.
          sides: width and height of the image.
        """
        # In float32 and in mmdet's order of operations: an anchor may overlap an object by exactly
        # the threshold, and the last digit decide.
        scales, ratios = np.array(self._kinds(number), np.float32).T  # (k,)
        stretch = np.sqrt(ratios)
        width, height = (np.float32(self.sizes[number] * side) * scales for side in sides)
        return np.stack([width * (1 / stretch), height * stretch], 1)
