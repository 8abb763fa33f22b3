"""CIFAR-10 at 32x32 with the usual CIFAR strides (stem and layer2 keep the resolution).

    python -m mbv2_jax.main --config=configs/cifar10.py --workdir=runs/cifar10
    python -m mbv2_jax.main --config=configs/cifar10.py:smoke --workdir=runs/cifar10_smoke \\
        --config.data.source=folder:cifar10_jpeg --config.data.eval_split=test

data: TFDS `cifar10` in ArrayRecord form, or image folders with --config.data.source=folder:PATH.
hardware: one GPU. `:smoke` is a short run of a narrow network, under half an hour on 4 CPU cores.
expected: 94 % top-1 (the README of kuangliu/pytorch-cifar reports 94.43 for this network); at least
70 % for `:smoke`.
measured: `:smoke` 72.90 top-1 in 21.5 minutes on 4 CPU cores; the full run: not run.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default
from mbv2_jax.errors import UserError, nearest


def get_config(variant: str = "full") -> ConfigDict:
    """Returns the config of 'full' or of 'smoke'."""
    if variant not in ("full", "smoke"):
        raise UserError(
            f"cifar10.py has no variant {variant!r}: {nearest(variant, ['full', 'smoke'])}"
        )
    config = default.get_config()
    config.batch_size = 128
    config.num_epochs = 200.0

    config.model.width = 1.0
    config.model.num_classes = 10
    config.model.strides = (1, 1, 1, 2, 2, 1, 2, 1)

    config.data.source = "cifar10"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.train_transforms = "random_crop(size, padding=4)|random_flip(0.5)"
    config.data.eval_transforms = "center_crop(size)"
    config.data.mean = (125.31, 122.95, 113.87)  # of CIFAR-10's training images
    config.data.std = (51.59, 50.85, 51.26)

    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.1
    config.checkpoint.every_epochs = 10.0

    if variant == "smoke":
        config.num_epochs = 8.0
        config.model.width = 0.5
        config.model.strides = (2, 1, 1, 2, 2, 1, 1, 1)
        config.schedule.warmup_epochs = 0.5
        config.checkpoint.every_epochs = 1.0
    return config
