"""Fits a classifier to the features of a trained model, which takes seconds: a linear probe.

    python -m mbv2_jax.main --config=probe --workdir=runs/probe \\
        --config.data.source=folder:PHOTOS --checkpoint=runs/mm

PHOTOS holds CLASS/*.jpg, of which a fifth is held out, or train/CLASS/*.jpg and val/CLASS/*.jpg.
Every photo goes through the network once. The classifier is ridge regression, in closed form; the
photos decide its regularisation, each time without the one that is predicted. Nothing else changes.
hardware: any; 1,000 photos at 224 px take ten seconds on 2 CPU cores.
expected: depends on the photos; `finetune_folder` is mostly better, see docs/finetuning.md.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import finetune_folder


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = finetune_folder.get_config()
    config.num_epochs = 0.0
    return config
