"""RandAugment, as timm trains its EfficientNets; the recipe of mobilenetv2_100.ra_in1k.

    python -m mbv2_jax.main --config=configs/mobilenet_v2_timm_ra.py --workdir=runs/timm_ra

data: ImageNet-1k, TFDS `imagenet2012`. hardware of the source: 2 GPUs; time: not published.
steps: 450 epochs of 1,668 at batch 768.
expected: 72.910 top-1, 91.000 top-5 (timm's results-imagenet.csv), if this recipe is close enough.
measured: not run.
source: the recipe of these weights is not published. Their author describes it as "similar to
efficientnet with rand augment and random erasing"
(https://github.com/huggingface/pytorch-image-models/issues/355). Everything here is therefore taken
from the command for EfficientNet-B0 in hfdocs/source/training_script.mdx there, and its defaults
from train.py of April 2020, when the weights were released.
differences from the original:
- There is no stochastic depth (--drop-path 0.2), which this network does not have, and the
  computation is in float32, not --amp.
- The rate changes step by step, and the staircase also counts the warm-up. There, it changes only
  at the ends of epochs. At the beginning of each epoch after the warm-up, both are equal.
- Crops are resized bicubically; there, bilinearly or bicubically at random.
- The noise in an erased box is clipped to the range of a pixel: 3 to 4 % of its values change.
- The initial weights are mmpretrain's.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config()
    config.batch_size = 768  # 2 replicas x 384
    config.num_epochs = 450.0
    config.label_smoothing = 0.1

    config.model.width = 1.0
    config.model.num_classes = 1000
    config.model.dropout = 0.2
    config.model.bn_group_size = 384  # statistics per replica

    config.data.source = "imagenet2012"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.train_transforms = (
        'random_resized_crop(size, interpolation="bicubic")|random_flip(0.5)'
        "|timm_rand_augment(9, magnitude_std=0.5)"
        '|random_erasing(0.2, (0.02, 0.333333), (0.3, 3.333333), mode="noise")'
    )
    config.data.eval_transforms = 'resize_edge(256, interpolation="bicubic")|center_crop(size)'
    config.data.mean = (123.675, 116.28, 103.53)
    config.data.std = (58.395, 57.12, 57.375)
    config.data.last_batch = "drop"
    config.data.workers = 16

    config.optimizer.name = "rmsprop"
    config.optimizer.rms_decay = 0.9
    config.optimizer.momentum = 0.9
    config.optimizer.epsilon = 1e-3
    config.optimizer.weight_decay = 1e-5
    config.optimizer.decay_norm = False
    config.optimizer.decay_bias = False
    config.schedule.name = "exponential"
    config.schedule.base_lr = 0.048
    config.schedule.factor = 0.97
    config.schedule.decay_epochs = 2.4
    config.schedule.warmup_epochs = 3.0
    config.schedule.warmup_start = 1e-6 / 0.048
    config.ema.decay = 0.9999

    config.log.every_steps = 100
    return config
