"""The recipe of mmdet's SSDLite for COCO, ssdlite_mobilenetv2-scratch_8xb24-600e_coco.

    python -m mbv2_jax.main --config=ssdlite_mobilenet_v2_coco --workdir=runs/coco \\
        --config.data.source=coco:COCO

data: COCO 2017, of which COCO holds annotations/, train2017/ and val2017/: 117,266 training images
with objects, 5,000 to evaluate. It starts from random weights.
hardware of the original: 8 GPUs; steps: 600 epochs of 611 at batch 192.
expected: 21.3 mAP (mmdet's model zoo).
variant: `:tf` is TensorFlow's ssdlite_mobilenet_v2_coco, of the paper's network: 22.1 mAP in the
paper (Table 6), 22 in TensorFlow's model zoo. steps: 200,000 at batch 24, where its file stops; the
published weights may have had more. It too starts from random weights without --checkpoint.
measured: not run.
source: https://github.com/open-mmlab/mmdetection configs/ssd, and object_detection/samples/configs
in https://github.com/tensorflow/models.
differences from the original: the rate falls with each step, mmdet's every five epochs; mmdet's
120 epochs of five times each image have 366,480 steps, and 600 epochs here 366,600; the backbone is
initialised as in classification (He), mmdet's with a deviation of 0.03. `:tf` also: random crops
are mmdet's kind; depthwise kernels of the backbone decay too.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default
from mbv2_jax.errors import UserError, nearest

VARIANTS = ("", "tf")


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant: '' (mmdet's) or 'tf' (TensorFlow's)."""
    if variant not in VARIANTS:
        raise UserError(
            f"ssdlite_mobilenet_v2_coco has no variant {variant!r}: {nearest(variant, VARIANTS)}"
        )
    config = default.get_config("detection")
    config.model.num_classes = 80
    config.model.bn_epsilon = 1e-3

    config.data.source = "coco:"  # to be given on the command line, with its path
    config.data.train_split = "train2017"
    config.data.eval_split = "val2017"
    config.data.eval_transforms = "resize(size)"
    config.data.workers = 16

    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 4e-5

    config.log.every_steps = 100
    config.log.eval_every_epochs = 25.0
    if variant == "tf":
        _tensorflow(config)
    else:
        _mmdet(config)
    return config


def _mmdet(config: ConfigDict) -> None:
    config.batch_size = 192  # 8 GPUs x 24
    config.num_epochs = 600.0

    config.model.bn_momentum = 0.97
    config.model.bn_group_size = 24  # per GPU; running statistics are averaged over them

    config.data.image_size = 320
    config.data.train_transforms = (
        "expand()|min_iou_crop()|resize(size)|random_flip(0.5)|ssd_distortion()"
    )
    config.data.mean = (123.675, 116.28, 103.53)
    config.data.std = (58.395, 57.12, 57.375)

    config.optimizer.name = "sgd"
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.015
    config.schedule.warmup_steps = 500
    config.schedule.warmup_start = 0.001


def _tensorflow(config: ConfigDict) -> None:
    epoch = 4929  # steps of 24 images, of 118,287
    config.batch_size = 24
    config.num_epochs = 200_000 / epoch
    config.skip_empty = False
    config.min_negatives = 3

    config.model.taps = ("layer6_0/expand", "last")
    config.model.anchors = "tensorflow"
    # From 0.2 to 0.95 in equal steps.
    config.model.anchor_sizes = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
    config.model.scores = "sigmoid"
    config.model.score_threshold = 1e-8
    config.model.nms_iou = 0.6
    config.model.clip_first = False
    config.model.max_detections = 100
    config.model.padding = "same"
    config.model.bn_momentum = 0.9997

    config.data.image_size = 300
    config.data.train_transforms = "random_flip(0.5)|min_iou_crop()|resize(size)"
    config.data.mean = config.data.std = (127.5, 127.5, 127.5)

    config.optimizer.name = "rmsprop"
    config.optimizer.rms_decay = 0.9
    config.optimizer.epsilon = 1.0
    config.optimizer.decay_norm = False
    config.optimizer.decay_bias = False
    config.schedule.name = "exponential"
    config.schedule.base_lr = 0.004
    config.schedule.factor = 0.95
    config.schedule.decay_epochs = 800_720 / epoch  # beyond the end
