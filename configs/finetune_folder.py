"""Fine-tunes a trained model on your own photos, with a new head.

    python -m mbv2_jax.main --config=configs/finetune_folder.py --workdir=runs/finetune \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/digits

PHOTOS holds train/CLASS/*.jpg and val/CLASS/*.jpg. Width, strides, padding, image size and pixel
statistics are the checkpoint's. The stem, layer1 and layer2 stay frozen; the rest of the
backbone learns at a tenth of the head's rate.
hardware: any; 500 photos at 32 px take a minute on a CPU.
expected: depends on the photos.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config()
    config.batch_size = 32
    config.num_epochs = 20.0

    config.model.frozen_stages = 2
    config.model.dropout = 0.2

    config.data.source = "folder:"  # to be given on the command line, with its path
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.train_transforms = (
        "random_resized_crop(size, crop_ratio_range=(0.35, 1.0))|random_flip(0.5)"
    )

    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 4e-5
    config.optimizer.lr_multipliers = (("classifier", 1.0), (".*", 0.1))
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.05
    config.schedule.warmup_epochs = 1.0

    config.log.every_steps = 10
    return config
