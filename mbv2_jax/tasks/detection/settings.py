"""The fields of object detection, declared as in spec.py; nothing here imports jax."""

import dataclasses

from mbv2_jax.spec import choice, declare, flag, integer, is_integer, is_number, number, sequence


@dataclasses.dataclass(frozen=True)
class Head:
    """The heads of SSDLite, its anchors, and the choice of detections."""

    num_classes: int | None = declare(
        None,
        integer(1),
        "classes of objects, the background not among them; None: as many as the data has",
        optional=True,
        shapes=True,
    )
    taps: tuple[str, ...] = declare(
        ("layer5", "last"),
        sequence("names of maps, such as ('layer5', 'last')", lambda v: isinstance(v, str)),
        "maps of the backbone with a head each: a layer's output, or with /expand a block's "
        "expansion; ('layer6_0/expand', 'last') is the paper's",
        inherited=True,
        shapes=True,
    )
    extra_channels: tuple[int, ...] = declare(
        (512, 256, 256, 128),
        sequence("whole even numbers, 2 or more", lambda v: is_integer(v) and v > 0 and v % 2 == 0),
        "channels of each further map, half as large as the one before it",
        inherited=True,
        shapes=True,
    )
    anchors: str = declare(
        "mmdet",
        choice("mmdet", "tensorflow"),
        "table of anchors: 'mmdet' has 6 at each position; 'tensorflow' has 3 on the first map and "
        "6 on the others, and spreads them evenly",
        inherited=True,
        shapes=True,
    )
    anchor_sizes: tuple[float, ...] = declare(
        (0.15, 0.3125, 0.46875, 0.63125, 0.790625, 0.95, 1.0),
        sequence(
            "numbers above 0, in shares of the image's side", lambda v: is_number(v) and v > 0
        ),
        "size of the anchors of each map, and one more, in shares of the image's side",
        inherited=True,
    )
    scores: str = declare(
        "softmax",
        choice("softmax", "sigmoid"),
        "how logits become scores: softmax over the classes and the background, or each by itself",
        inherited=True,
    )
    score_threshold: float = declare(
        0.02, number(0, 1), "detections have a score above this", inherited=True
    )
    nms_iou: float = declare(
        0.45,
        number(0, 1),
        "of two detections of a class whose intersection over union is above this, the better one "
        "stays",
        inherited=True,
    )
    clip_first: bool = declare(
        True,
        flag(),
        "whether boxes are clipped to the image before intersections are taken, as in mmdet, or "
        "afterwards, as in TensorFlow",
        inherited=True,
    )
    candidates: int = declare(
        1000,
        integer(1),
        "pairs of a box and a class of each map among which detections are chosen",
        inherited=True,
    )
    max_detections: int = declare(
        200, integer(1), "detections of an image, at most", inherited=True
    )
    max_boxes: int = declare(
        100,
        integer(1),
        "objects of an image that training and evaluation have room for; more are an error",
        inherited=True,
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields outside a config's sections that only detection reads."""

    negative_ratio: float = declare(
        3.0,
        number(0),
        "negatives in the loss for each positive: those with the largest loss (hard negative "
        "mining)",
    )
    min_negatives: int = declare(
        0, integer(0), "negatives of an image in the loss, at least; also without an object"
    )
    skip_empty: bool = declare(True, flag(), "whether training leaves out images without objects")
    smallest_side: int = declare(
        32, integer(1), "training leaves out images with a side below this, in pixels"
    )
