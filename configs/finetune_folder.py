"""Fine-tunes a trained model on your own photos, with a new head.

    python -m mbv2_jax.main --config=finetune_folder --workdir=runs/mine \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/mm

PHOTOS holds CLASS/*.jpg, of which a fifth is held out, or train/CLASS/*.jpg and val/CLASS/*.jpg.
Width, strides, padding, image size and pixel statistics are the checkpoint's. The head begins as a
linear probe; then all layers train. docs/finetuning.md explains the choices.
hardware: any; a CPU takes minutes.
expected: depends on the photos.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config()
    config.batch_size = 32
    config.num_epochs = 20.0
    config.fit_head = True

    # Keep ImageNet's statistics: those of a few photos of another kind are worse.
    config.model.norm_eval = True

    config.data.source = "folder:"  # to be given on the command line, with its path
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.train_transforms = (
        "random_resized_crop(size, crop_ratio_range=(0.6, 1.0))|random_flip(0.5)"
    )

    config.optimizer.momentum = 0.9
    config.optimizer.clip_units = 0.02  # without it, norm_eval needs a far lower rate
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.01

    config.log.every_steps = 10
    return config
