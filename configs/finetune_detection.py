"""Trains SSDLite on your own pictures and boxes, from any trained MobileNetV2.

    python -m mbv2_jax.main --config=finetune_detection --workdir=runs/mine \\
        --config.data.source=yolo:PICTURES --checkpoint=runs/mm

PICTURES is a folder in the layout of YOLO; coco:PICTURES and voc:PICTURES read the others
(docs/detection.md). The checkpoint may be a classifier, whose backbone is taken, or a detector,
whose boxes are kept, and whose classes if they are the same. Width, padding and pixel statistics
are the checkpoint's.
hardware: any; docs/detection.md has a measured run on 2 CPU cores.
expected: depends on the pictures.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config("detection")
    config.batch_size = 16
    config.num_epochs = 50.0

    config.data.source = "yolo:"  # to be given on the command line, with its path
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.image_size = 320
    # A canvas of up to twice the side, where SSD has four times, and no exchange of colours: a few
    # pictures are learned sooner.
    config.data.train_transforms = (
        "expand(high=2)|min_iou_crop()|resize(size)|random_flip(0.5)|photometric_distortion()"
    )
    config.data.eval_transforms = "resize(size)"

    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.base_lr = 0.001
    config.schedule.warmup_epochs = 1.0

    config.log.every_steps = 10
    config.log.eval_every_epochs = 5.0
    return config
