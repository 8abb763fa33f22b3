"""The demo of segmentation: Mobile DeepLabv3 x0.35 learns scenes of handwritten digits.

    python -m mbv2_jax.main --config=digit_scenes_segmentation --workdir=runs/digit_scenes

data: scenes of scikit-learn's digits with masks, drawn as they are read; no scene comes twice, no
handwriting is in both splits. hardware: 2 CPU cores; time: three minutes.
expected: at least 70 mIoU on the 200 test scenes.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config("segmentation")
    config.batch_size = 8  # small: in a few minutes, many steps count for more
    config.num_epochs = 1.0

    config.model.width = 0.35
    config.model.output_stride = 8  # strokes are 10 to 20 pixels wide

    config.data.source = "digit_scenes"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.image_size = 128  # the scenes' own
    config.data.train_transforms = "pad(size)"
    config.data.eval_transforms = "pad(size)"

    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.05
    config.schedule.warmup_epochs = 0.03

    config.log.every_steps = 25
    config.log.eval_every_epochs = 0.25
    config.checkpoint.every_epochs = 0.25
    return config
