"""d-li14's recipe: a cosine over 150 epochs, half the time of mmpretrain's, and more accurate.

    python -m mbv2_jax.main --config=configs/mobilenet_v2_dli14_150.py --workdir=runs/dli14

data: ImageNet-1k, TFDS `imagenet2012`. hardware of the original: 4 TITAN Xp GPUs, around 2 days.
steps: 150 epochs of 5,005 at batch 256.
expected: 72.192 top-1, 90.534 top-5 (its README). Top-1 with --config.model.width=0.75: 69.952;
0.5: 64.592; 0.35: 60.092; 0.25: 52.352.
measured: not run.
source: README, imagenet.py and utils/dataloaders.py of
https://github.com/d-li14/mobilenetv2.pytorch
differences from the original:
- Running statistics are averaged over the replicas; there, they are the first replica's.
- The last batch of an epoch is filled up; there, it is smaller.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config()
    config.batch_size = 256
    config.num_epochs = 150.0

    config.model.width = 1.0
    config.model.num_classes = 1000
    config.model.bn_group_size = 64  # 4 replicas

    config.data.source = "imagenet2012"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.train_transforms = "random_resized_crop(size)|random_flip(0.5)"
    config.data.eval_transforms = "resize_edge(256)|center_crop(size)"
    config.data.mean = (123.675, 116.28, 103.53)
    config.data.std = (58.395, 57.12, 57.375)
    config.data.last_batch = "fill"  # in the source, the last batch of an epoch is smaller
    config.data.workers = 16

    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 4e-5
    config.optimizer.decay_norm = True
    config.optimizer.decay_bias = True
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.05

    config.log.every_steps = 100
    return config
