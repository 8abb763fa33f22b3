"""The widths 0.25, 0.35, 0.5 and 0.75 with milder crops: PaddleClas's recipe.

    python -m mbv2_jax.main --config=configs/mobilenet_v2_small.py:0.25 --workdir=runs/x0_25

data: ImageNet-1k, TFDS `imagenet2012`. hardware of the original: not published (the documentation's
examples use 4 GPUs); time: not published.
steps: 240 epochs of 5,005 at batch 256.
expected: 0.25: 53.18 top-1, 76.14 top-5; with crops of the usual area, from 0.08 on: 52.35 and
75.65 (docs/en/models_training/train_strategy_en.md: such a small network underfits). The published
weights, whose crops are not documented: 0.25: 53.21, 0.5: 65.03, 0.75: 69.83 top-1. 0.35: not
published (60.09 with the other recipe that covers it, mobilenet_v2_dli14_150).
measured: not run.
source: ppcls/configs/ImageNet/MobileNetV2/MobileNetV2_{x0_25,x0_5,x0_75}.yaml of
https://github.com/PaddlePaddle/PaddleClas. The area for the other widths and everything for 0.35
are not published, and are those of 0.25.
differences from the original:
- Channels are rounded as in the paper's code: a quarter of 24 becomes 8; there, 6.
- Crops are those of random_resized_crop. There, the aspect ratio itself is uniform instead of its
  logarithm, and the area is drawn from those that fit.
- Images are resized with antialiasing. The initial weights are mmpretrain's.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default
from mbv2_jax.errors import UserError, nearest

WEIGHT_DECAY = {"0.25": 3e-5, "0.35": 3e-5, "0.5": 3e-5, "0.75": 4e-5}


def get_config(width: str = "0.25") -> ConfigDict:
    """Returns the config of a width: '0.25', '0.35', '0.5' or '0.75'."""
    if width not in WEIGHT_DECAY:
        raise UserError(f"mobilenet_v2_small.py has no {width!r}: {nearest(width, WEIGHT_DECAY)}")
    config = default.get_config()
    config.batch_size = 256  # 4 replicas x 64
    config.num_epochs = 240.0

    config.model.width = float(width)
    config.model.num_classes = 1000
    config.model.bn_group_size = 64  # statistics per replica

    config.data.source = "imagenet2012"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.train_transforms = (
        "random_resized_crop(size, crop_ratio_range=(0.2, 1.0))|random_flip(0.5)"
    )
    config.data.eval_transforms = "resize_edge(256)|center_crop(size)"
    config.data.mean = (123.675, 116.28, 103.53)
    config.data.std = (58.395, 57.12, 57.375)
    config.data.last_batch = "fill"
    config.data.workers = 16

    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = WEIGHT_DECAY[width]
    config.optimizer.decay_norm = True
    config.optimizer.decay_bias = True
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.045

    config.log.every_steps = 100
    return config
