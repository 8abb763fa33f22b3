"""Published weights, by the name that `python -m convert` takes.

The figures are the publishers' own, in percent. Those of classifiers are for ImageNet's 50,000
validation images: mmpretrain's model zoo, the `meta` of torchvision's weights, timm's
results-imagenet.csv, and the READMEs of d-li14/mobilenetv2.pytorch and of TF-slim
(tensorflow/models, research/slim/nets/mobilenet). That of DeepLab is for the 1,449 validation
images of PASCAL VOC 2012 (tensorflow/models, research/deeplab/g3doc/model_zoo.md). Those of SSDLite
are for COCO: mmdet's for the 5,000 images of val2017 (its configs/ssd), TensorFlow's for 8,059 of
val2014, which are others (tensorflow/models, research/object_detection/data/
mscoco_minival_ids.txt).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mbv2_jax.errors import nearest
from mbv2_jax.spec import Preprocessing

from .layouts import LAYOUTS, OF_TASK

_IMAGENET = 50_000  # validation images
_VOC = 1_449
_COCO = 5_000
_COCO_MINIVAL = 8_059

_ZOO = "https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/"
_TORCHVISION = "https://download.pytorch.org/models/"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"
_TENSORFLOW = "https://storage.googleapis.com/download.tensorflow.org/models/"
_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/"
_TF_SLIM = "https://storage.googleapis.com/mobilenet_v2/checkpoints/"
_D_LI14 = "https://github.com/d-li14/mobilenetv2.pytorch/raw/master/pretrained/"


@dataclasses.dataclass(frozen=True)
class PublishedWeights:
    """A weight file that can be downloaded, and the facts known about it.

    Attributes:
      address: of the file.
      figures: those that were published, percent, by the names of the task's metrics.
      source: the publisher and the name of the weights, for messages.
      preprocessing: of the evaluation that gave the figures.
      width: the network's width multiplier.
      examples: the number of images that were evaluated.
    """

    address: str
    figures: Mapping[str, float]
    source: str
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    width: float = 1.0
    examples: int = _IMAGENET

    @property
    def file(self) -> str:
        """The file's name."""
        return self.address.rpartition("/")[2]

    @property
    def sha256(self) -> str:
        """The first 8 hex digits of the file's SHA-256, with which its name ends.

        It is "" for TensorFlow's, whose names hold none, and which publishes none.
        """
        name, _, digits = self.file.rpartition("-")
        return digits.removesuffix(".pth") if name else ""

    def card(self) -> dict[str, Any]:
        """Returns the figures as model.json has them."""
        return dict(self.figures) | {"examples": self.examples, "source": self.source}


def figures(card: Mapping[str, Any]) -> str:
    """Returns published figures in words: "71.86 top-1, 90.42 top-5"."""
    names = {"top1": "top-1", "top5": "top-5"}
    numbers = {name: value for name, value in card.items() if name not in ("examples", "source")}
    return ", ".join(f"{value:.2f} {names.get(name, name)}" for name, value in numbers.items())


def _accuracy(top1: float, top5: float) -> dict[str, float]:
    return {"top1": top1, "top5": top5}


def _torchvision(file: str, top1: float, top5: float, edge: int, weights: str) -> PublishedWeights:
    return PublishedWeights(
        _TORCHVISION + file,
        _accuracy(top1, top5),
        f"torchvision, MobileNet_V2_Weights.{weights}",
        Preprocessing(eval_transforms=f"resize_edge({edge})|center_crop(size)"),
    )


def _d_li14(
    file: str, top1: float, top5: float, size: int = 224, width: float = 1.0
) -> PublishedWeights:
    transforms = f"resize_edge({int(size / 0.875)})|center_crop(size)"
    return PublishedWeights(
        _D_LI14 + file,
        _accuracy(top1, top5),
        "d-li14/mobilenetv2.pytorch",
        Preprocessing(image_size=size, eval_transforms=transforms),
        width,
    )


def _timm(file: str, top1: float, top5: float, model: str, width: float = 1.0) -> PublishedWeights:
    preprocessing = LAYOUTS["timm"].preprocessing
    return PublishedWeights(
        _TIMM + file, _accuracy(top1, top5), f"timm, {model}", preprocessing, width
    )


def _tf_slim(size: int, width: float, top1: float, top5: float) -> PublishedWeights:
    images = LAYOUTS["tf-slim"].preprocessing
    edge = int(size / 0.875)
    return PublishedWeights(
        f"{_TF_SLIM}mobilenet_v2_{width}_{size}.tgz",
        _accuracy(top1, top5),
        f"TF-slim, mobilenet_v2_{width}_{size}",
        dataclasses.replace(
            images, image_size=size, eval_transforms=f"resize_edge({edge})|center_crop(size)"
        ),
        width,
    )


# Width, size, top-1, top-5.
_TF_SLIM_FIGURES = (
    (1.4, 224, 75.0, 92.5),
    (1.3, 224, 74.4, 92.1),
    (1.0, 224, 71.8, 91.0),
    (1.0, 192, 70.7, 90.1),
    (1.0, 160, 68.8, 89.0),
    (1.0, 128, 65.3, 86.9),
    (1.0, 96, 60.3, 83.2),
    (0.75, 224, 69.8, 89.6),
    (0.75, 192, 68.7, 88.9),
    (0.75, 160, 66.4, 87.3),
    (0.75, 128, 63.2, 85.3),
    (0.75, 96, 58.8, 81.6),
    (0.5, 224, 65.4, 86.4),
    (0.5, 192, 63.9, 85.4),
    (0.5, 160, 61.0, 83.2),
    (0.5, 128, 57.7, 80.8),
    (0.5, 96, 51.2, 75.8),
    (0.35, 224, 60.3, 82.9),
    (0.35, 192, 58.2, 81.2),
    (0.35, 160, 55.7, 79.1),
    (0.35, 128, 50.8, 75.0),
    (0.35, 96, 45.5, 70.4),
)

# d-li14's width 0.1 is left out, since its channel counts are multiples of 4: another network.
PUBLISHED: dict[str, PublishedWeights] = {
    "mmpretrain": PublishedWeights(
        _ZOO + "mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth",
        _accuracy(71.86, 90.42),
        "mmpretrain, mobilenet-v2_8xb32_in1k",
    ),
    "torchvision": _torchvision("mobilenet_v2-b0353104.pth", 71.878, 90.286, 256, "IMAGENET1K_V1"),
    "torchvision_v2": _torchvision(
        "mobilenet_v2-7ebf99e0.pth", 72.154, 90.822, 232, "IMAGENET1K_V2"
    ),
    "timm": _timm("mobilenetv2_100_ra-b33bc2c4.pth", 72.910, 91.000, "mobilenetv2_100.ra_in1k"),
    "timm_0.5": _timm(
        "mobilenetv2_050-3d30d450.pth", 65.928, 86.114, "mobilenetv2_050.lamb_in1k", 0.5
    ),
    "timm_1.4": _timm(
        "mobilenetv2_140_ra-21a4e913.pth", 76.528, 93.008, "mobilenetv2_140.ra_in1k", 1.4
    ),
    "timm_110d": _timm(
        "mobilenetv2_110d_ra-77090ade.pth", 75.06, 92.19, "mobilenetv2_110d.ra_in1k", 1.1
    ),
    "timm_120d": _timm(
        "mobilenetv2_120d_ra-5987e2ed.pth", 77.30, 93.52, "mobilenetv2_120d.ra_in1k", 1.2
    ),
    "d-li14": _d_li14("mobilenetv2-c5e733a8.pth", 72.834, 91.060),
    "d-li14_1.0": _d_li14("mobilenetv2_1.0-0c6065bc.pth", 72.192, 90.534),
    "d-li14_0.75": _d_li14("mobilenetv2_0.75-dace9791.pth", 69.952, 88.986, width=0.75),
    "d-li14_0.5": _d_li14("mobilenetv2_0.5-eaa6f9ad.pth", 64.592, 85.392, width=0.5),
    "d-li14_0.35": _d_li14("mobilenetv2_0.35-b2e15951.pth", 60.092, 82.172, width=0.35),
    "d-li14_0.25": _d_li14("mobilenetv2_0.25-b61d2159.pth", 52.352, 75.932, width=0.25),
    "d-li14_192": _d_li14("mobilenetv2_192x192-e423d99e.pth", 71.076, 89.760, 192),
    "d-li14_160": _d_li14("mobilenetv2_160x160-64dc7fa1.pth", 69.504, 88.848, 160),
    "d-li14_128": _d_li14("mobilenetv2_128x128-fd66a69d.pth", 66.740, 86.952, 128),
    "d-li14_96": _d_li14("mobilenetv2_96x96-ff0e83d8.pth", 62.696, 84.046, 96),
    **{
        f"tf-slim_{width}_{size}": _tf_slim(size, width, top1, top5)
        for width, size, top1, top5 in _TF_SLIM_FIGURES
    },
    # At output stride 16 and one scale; the graph in the archive is for output stride 8.
    "deeplabv3_voc": PublishedWeights(
        _TENSORFLOW + "deeplabv3_mnv2_pascal_train_aug_2018_01_29.tar.gz",
        {"mIoU": 75.32},
        "TensorFlow's deeplab, mobilenetv2_coco_voc_trainaug",
        OF_TASK["segmentation"]["tf-slim"].preprocessing,
        examples=_VOC,
    ),
    "mmdet_ssdlite_coco": PublishedWeights(
        _MMDET + "ssd/ssdlite_mobilenetv2_scratch_600e_coco/"
        "ssdlite_mobilenetv2_scratch_600e_coco_20210629_110627-974d9307.pth",
        {"mAP": 21.3},
        "mmdet, ssdlite_mobilenetv2-scratch_8xb24-600e_coco",
        OF_TASK["detection"]["mmdet"].preprocessing,
        examples=_COCO,
    ),
    "tf_ssdlite_coco": PublishedWeights(
        _TENSORFLOW + "object_detection/ssdlite_mobilenet_v2_coco_2018_05_09.tar.gz",
        {"mAP": 22.0},
        "TensorFlow's object_detection, ssdlite_mobilenet_v2_coco",
        OF_TASK["detection"]["tf-slim"].preprocessing,
        examples=_COCO_MINIVAL,
    ),
}


def looks_like_network(name: str) -> bool:
    """Returns whether `name` is that of a network in any port: mobilenetv2_110d, mobilenet_v2_1.0.

    Names of files end in other letters, and are not among these.
    """
    pattern = r"mobile_?net[-_]?v2[-_.0-9]*d?(\.\w+_in\d+k)?"
    return bool(re.fullmatch(pattern, name, re.IGNORECASE))


def width_in(name: str) -> float:
    """Returns the width in the name of a network: 0.5 in mobilenet_v2_0.5_160; 1.0 by default."""
    found = re.search(r"[0-9]\.[0-9]+", name)
    percent = re.search(r"_(0[0-9]{2}|1[0-4]0)(?![0-9])", name)  # as timm writes it
    return float(found[0]) if found else int(percent[1]) / 100 if percent else 1.0


def suggest(name: str) -> str:
    """Returns a hint for the user after a `name` that is not one of PUBLISHED.

    After the name of a network it lists the weights of its width, of which the names need not
    resemble it; after another one it names the nearest.
    """
    if not looks_like_network(name):
        return nearest(name, PUBLISHED)
    width = width_in(name)
    known = [repr(key) for key, weights in PUBLISHED.items() if weights.width == width]
    if not known:
        return f"no weights of width {width} are known"
    return f"published weights of width {width} are {', '.join(known[:4])}"


def identify(sha256: str) -> PublishedWeights | None:
    """Returns the entry of the file with this SHA-256 (hex); None without one."""
    for weights in PUBLISHED.values():
        if weights.sha256 and sha256.startswith(weights.sha256):
            return weights
    return None
