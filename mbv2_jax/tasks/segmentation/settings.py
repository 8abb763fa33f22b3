"""The fields of semantic segmentation, declared as in spec.py; nothing here imports jax."""

import dataclasses

from mbv2_jax.spec import declare, flag, integer, is_integer, is_number, number, sequence


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of Mobile DeepLabv3: image pooling beside convolutions, then a logit per class."""

    num_classes: int | None = declare(
        None,
        integer(1, 255),  # 255 marks the pixels that do not count
        "classes of a pixel; None: as many as the data has",
        optional=True,
        shapes=True,
    )
    aspp_rates: tuple[int, ...] = declare(
        (),
        sequence(
            "whole numbers, 1 or more, such as (6, 12, 18)", lambda v: is_integer(v) and v > 0
        ),
        "dilations of the 3x3 convolutions of atrous spatial pyramid pooling at output stride 16 "
        "(at 8 they double, at 32 they are halved); (): none, as in the paper's first row",
        inherited=True,
        shapes=True,
    )
    align_corners: bool = declare(
        True,
        flag(),
        "how logits are resized to the image: True as TensorFlow's DeepLab, with the centres of "
        "the corner pixels upon each other; False as transformers, with their outer corners",
        inherited=True,
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields outside a config's sections that only segmentation reads."""

    label_smoothing: float = declare(
        0.0, number(0, 1), "share of each pixel's target spread evenly over the classes"
    )
    class_weights: tuple[float, ...] = declare(
        (),
        sequence("numbers, 0 or more, one for each class", lambda v: is_number(v) and v >= 0),
        "weight of each class in the loss, in the order of the classes; (): all 1",
    )
