"""Trains Mobile DeepLabv3 on your own pictures and masks, from any trained MobileNetV2.

    python -m mbv2_jax.main --config=finetune_segmentation --workdir=runs/mine \\
        --config.data.source=pairs:PICTURES --checkpoint=runs/mm

PICTURES holds train/images/NAME.jpg, train/masks/NAME.png, the same in val/, and classes.txt
(docs/segmentation.md). The checkpoint may be a classifier, whose backbone is taken, or a
segmentation model. Width, padding and pixel statistics are the checkpoint's.
hardware: any; docs/segmentation.md has a measured run on 2 CPU cores.
expected: depends on the pictures.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default

# The head is new, and learns ten times as fast as the backbone, as in DeepLab v1 to v3.
HEAD_FIRST = (("(image_pooling|aspp|projection|logits)", 10.0),)


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config("segmentation")
    config.batch_size = 8
    config.num_epochs = 40.0

    config.model.output_stride = 16
    config.model.dropout = 0.1

    config.data.source = "pairs:"  # to be given on the command line, with its path
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.image_size = 321
    config.data.train_transforms = (
        "random_scale(0.5, 2.0)|pad(size)|random_crop(size, cat_max_ratio=0.75)"
        "|random_flip(0.5)|photometric_distortion()"
    )
    config.data.eval_transforms = "fit(size)|pad(size)"

    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.lr_multipliers = HEAD_FIRST
    config.schedule.name = "poly"
    config.schedule.base_lr = 0.01
    config.schedule.power = 0.9
    config.schedule.warmup_epochs = 1.0

    config.log.every_steps = 10
    config.log.eval_every_epochs = 5.0
    return config
