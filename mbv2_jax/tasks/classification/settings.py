"""The fields of image classification, declared as in spec.py; nothing here imports jax."""

import dataclasses

from mbv2_jax.spec import declare, integer, is_integer, number, sequence


@dataclasses.dataclass(frozen=True)
class Head:
    """The classifier: average pool, dropout, dense layers."""

    num_classes: int | None = declare(
        None,
        integer(1),
        "classes of the classifier; None: as many as the data has",
        optional=True,
        shapes=True,
    )
    hidden: tuple[int, ...] = declare(
        (),
        sequence("whole numbers, 1 or more, such as (256,)", lambda v: is_integer(v) and v >= 1),
        "widths of dense layers with ReLU between the pooled features and the classifier",
        inherited=True,
        shapes=True,
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields outside a config's sections that only classification reads."""

    label_smoothing: float = declare(
        0.0, number(0, 1), "share of the target spread evenly over the classes"
    )
    mixup_alpha: float = declare(
        0.0,
        number(0, 100),  # 1 is the largest published value; 100 mixes about half and half
        "parameter of the Beta distribution from which a step draws how much of a second image to "
        "mix in; 0: never. With cutmix_alpha above 0 too, each step does one of the two",
    )
    cutmix_alpha: float = declare(
        0.0, number(0, 100), "the same for a box of a second image to paste in; 0: never"
    )
