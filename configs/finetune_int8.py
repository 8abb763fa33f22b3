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

from mbv2_jax.configs import finetune_folder


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = finetune_folder.get_config()  # with norm_eval, which 8-bit weights need
    config.num_epochs = 5.0
    config.fit_head = False  # the head is trained already

    config.model.quantize = "int8"

    config.schedule.base_lr = 0.001
    return config
