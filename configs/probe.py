"""Fits a classifier to the features of a trained model: a linear probe.

    python -m mbv2_jax.main --config=probe --workdir=runs/probe \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/mm

PHOTOS holds CLASS/*.jpg, of which a fifth is held out, or train/CLASS/*.jpg and val/CLASS/*.jpg.
Each training photo (a random 20,000 where there are more) goes through the network once. The
classifier is ridge regression, in closed form; leave-one-out predictions choose its penalty. The
backbone stays as it is.
hardware: any.
expected: depends on the photos; docs/finetuning.md compares it with `finetune_folder` on a few.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import finetune_folder


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = finetune_folder.get_config()
    config.num_epochs = 0.0
    return config
