"""The classes of ImageNet (ILSVRC 2012), PASCAL VOC and COCO, in the orders that all ports use.

ImageNet's 1000 are read from imagenet_classes.txt on first use: a line holds the WordNet id and the
synonyms. The ids are sorted, so that folders named by them give the same labels.
"""

import functools
import importlib.resources
from collections.abc import Sequence

IMAGENET_WNIDS: tuple[str, ...]  # 'n01440764', 'n01443537', ...
IMAGENET_NAMES: tuple[str, ...]  # 'tench, Tinca tinca', ...; 'crane' is both bird and machine

# The classes of a pixel in VOC's segmentation masks.
VOC_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

# COCO's 80 classes of objects, which have ids from 1 to 90 with gaps: such as mmdet's labels.
COCO_NAMES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
_COCO_GAPS = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))  # the ids that COCO does not use


def _with_gaps() -> tuple[str, ...]:
    names = iter(COCO_NAMES)
    return tuple(f"unused {i}" if i in _COCO_GAPS else next(names) for i in range(1, 91))


# A class for each id, as TensorFlow's detectors have them: label = id - 1.
COCO_ID_NAMES = _with_gaps()

# The share of positions in which names must agree. The first synonyms of mmpretrain's list and of
# torchvision's differ in 2 of 1000 ('crane', 'crane bird'), those of other classes nearly always.
_ENOUGH = 0.9


def imagenet_offset(names: Sequence[str]) -> int | None:
    """Returns the label at which ImageNet's classes begin: 0, or 1 after a background class.

    Args:
      names: class names in the order of the logits: WordNet ids, or English names in any common
        wording.

    Returns:
      0 or 1; None if the classes are not ImageNet's 1000 in order.
    """
    offset = len(names) - 1000
    if offset not in (0, 1):
        return None
    found = names[offset:]
    for ours in _table():
        same = sum(_first_synonym(a) == _first_synonym(b) for a, b in zip(found, ours, strict=True))
        if same >= _ENOUGH * len(ours):
            return offset
    return None


def english(name: str) -> str:
    """Returns 'tench' for 'n01440764', and any name that is not a WordNet id unchanged."""
    try:
        number = _table()[0].index(name)
    except ValueError:
        return name
    return _table()[1][number].partition(",")[0]


def _first_synonym(name: str) -> str:
    """Returns 'hen' for 'Hen, biddy': lists differ in later synonyms and in spelling."""
    return name.partition(",")[0].replace("_", " ").strip().lower()


@functools.cache
def _table() -> tuple[tuple[str, ...], tuple[str, ...]]:
    file = importlib.resources.files(__package__) / "imagenet_classes.txt"
    lines = file.read_text("utf-8").splitlines()
    wnids, _, names = zip(*(line.partition(" ") for line in lines), strict=True)
    return wnids, names


def __getattr__(name: str) -> tuple[str, ...]:
    if name in ("IMAGENET_WNIDS", "IMAGENET_NAMES"):
        return _table()[name == "IMAGENET_NAMES"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
