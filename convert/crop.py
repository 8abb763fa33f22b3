"""The evaluation crop of other frameworks: an image is resized, then its centre is cut out."""

import dataclasses

from mbv2_jax.data.transforms import resize_and_crop
from mbv2_jax.errors import UserError
from mbv2_jax.spec import Preprocessing


@dataclasses.dataclass(frozen=True)
class Crop:
    """A resize before the central crop of `data.image_size` pixels.

    Attributes:
      edge: pixels that the short side is resized to, or both are.
      interpolation: "bilinear" or "bicubic".
      both: whether both sides are resized, without keeping the aspect ratio.
    """

    edge: int
    interpolation: str = "bilinear"
    both: bool = False

    def transforms(self) -> str:
        """Returns the crop as a value of `data.eval_transforms`."""
        operation = "resize" if self.both else "resize_edge"
        how = "" if self.interpolation == "bilinear" else f", interpolation={self.interpolation!r}"
        return f"{operation}({self.edge}{how})|center_crop(size)"


def parse(preprocessing: Preprocessing) -> Crop:
    """Returns the crop that a model's preprocessing consists of.

    Raises:
      UserError: it has other operations, or another size than `data.image_size`.
    """
    size = preprocessing.image_size
    match preprocessing.transform.operations:
        case (resize_and_crop.Resize(int(edge), how),) if edge == size:
            return Crop(edge, how, both=True)
        case (resize_and_crop.Resize(int(edge), how), resize_and_crop.CenterCrop(crop)):
            both = True
        case (resize_and_crop.ResizeEdge(edge, how), resize_and_crop.CenterCrop(crop)):
            both = False
        case _:
            edge, how, crop, both = 0, "", 0, False
    if crop != size:
        raise UserError(
            f"data.eval_transforms is {preprocessing.eval_transforms!r} with size={size}, and a "
            "config knows a resize and then center_crop(size), nothing else: give a FILE, which "
            "holds the weights alone"
        )
    return Crop(edge, how, both)
