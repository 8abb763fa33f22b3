"""The demo of object detection: SSDLite x0.35 learns to find handwritten digits.

    python -m mbv2_jax.main --config=digit_scenes_detection --workdir=runs/digit_boxes

data: scenes of scikit-learn's digits with boxes, drawn as they are read; no scene comes twice, no
handwriting is in both splits. hardware: 2 CPU cores; time: two to five minutes.
expected: at least 60 mAP50 on the 200 test scenes.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config("detection")
    config.batch_size = 16
    config.num_epochs = 0.6

    config.model.width = 0.35
    # Digits have about half the side of a scene: two maps of 8 x 8 positions do.
    config.model.strides = (2, 1, 2, 2, 2, 1, 1, 1)
    config.model.extra_channels = ()
    config.model.anchor_sizes = (0.38, 0.48, 0.6)

    config.data.source = "digit_scenes"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.image_size = 128  # the scenes' own
    config.data.train_transforms = "resize(size)"
    config.data.eval_transforms = "resize(size)"

    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.01
    config.schedule.warmup_epochs = 0.03

    config.log.every_steps = 25
    config.log.eval_every_epochs = 0.2
    config.checkpoint.every_epochs = 0.2
    return config
