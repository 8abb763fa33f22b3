"""The demo: MobileNetV2 x0.35 learns handwritten digits (scikit-learn's, 1,797 real images).

    python -m mbv2_jax.main --config=configs/digits.py --workdir=runs/digits

hardware: 2 CPU cores; time: two and a half minutes; images: 8x8 grey, enlarged to 32x32.
expected: at least 97 % top-1 on the 360 held-out digits.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config()
    config.batch_size = 64
    config.num_epochs = 20.0

    config.model.width = 0.35
    config.model.strides = (1, 1, 2, 2, 2, 1, 1, 1)  # 32 px are too few for all five halvings

    config.data.source = "digits"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.train_transforms = "resize(size)|random_crop(size, padding=3)"
    config.data.eval_transforms = "resize(size)"

    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.1
    config.schedule.warmup_epochs = 1.0

    config.log.every_steps = 10
    return config
