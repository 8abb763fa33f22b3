"""Fine-tunes a trained classifier so that its 8-bit file is as good as its floats.

    python -m mbv2_jax.main --config=finetune_int8 --workdir=runs/mine_int8 \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/mine
    python -m mbv2_jax.export runs/mine_int8 --to=litert --precision=int8 --output=mine.tflite \\
        --check PHOTOS

Give the data with which the model was trained, and its classes are kept. Weights and activations
are rounded to 8 bits in every step, as the file rounds them, and the evaluation rounds them, too,
so that its figures are the file's. The other tasks do the same with their own recipes and
--config.model.quantize=int8 --config.model.norm_eval=true. docs/export.md explains it.
hardware: any; a CPU takes minutes.
expected: depends on the photos.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config()
    config.batch_size = 32
    config.num_epochs = 5.0

    config.model.quantize = "int8"
    config.model.norm_eval = True  # normalisations are part of the 8-bit weights

    config.data.source = "folder:"  # to be given on the command line, with its path
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.train_transforms = (
        "random_resized_crop(size, crop_ratio_range=(0.6, 1.0))|random_flip(0.5)"
    )

    config.optimizer.momentum = 0.9
    config.optimizer.clip_units = 0.02  # without it, norm_eval needs a far lower rate
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.001

    config.log.every_steps = 10
    return config
