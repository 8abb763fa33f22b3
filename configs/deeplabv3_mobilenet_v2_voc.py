"""Mobile DeepLabv3 on PASCAL VOC 2012 as in the paper (section 6.3, Table 7).

    python -m mbv2_jax.main --config=deeplabv3_mobilenet_v2_voc --workdir=runs/voc \\
        --config.data.source=voc:VOCdevkit --checkpoint=CLASSIFIER

data: VOC 2012 with the extra masks of SBD (SegmentationClassAug; 10,582 training images), 1,449 to
evaluate. CLASSIFIER is a MobileNetV2 that was trained on ImageNet.
variants: `:os8` has output stride 8, `:aspp` atrous spatial pyramid pooling, `:aspp_os8` both.
hardware of the original: not published; steps: 30,000 at batch 16.
expected: the paper's 75.32 mIoU (75.70 with `:aspp`) come from a backbone that was also trained on
COCO's segmentation; from ImageNet alone about 70.9 (TensorFlow Model Garden's
`mnv2_deeplabv3_pascal`). With output stride 8, flips and scales (--tta): 77.33 and 78.42.
measured: not run.
source: https://github.com/tensorflow/models research/deeplab (train.py, g3doc/pascal.md) and
official/vision/configs/semantic_segmentation.py.
differences from the original: weight decay is on depthwise kernels too; scaled images are
antialiased where they shrink.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default
from mbv2_jax.errors import UserError, nearest

VARIANTS = {"": (16, ()), "os8": (8, ()), "aspp": (16, (6, 12, 18)), "aspp_os8": (8, (6, 12, 18))}


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant: '', 'os8', 'aspp' or 'aspp_os8'."""
    if variant not in VARIANTS:
        raise UserError(
            f"deeplabv3_mobilenet_v2_voc has no variant {variant!r}: {nearest(variant, VARIANTS)}"
        )
    config = default.get_config("segmentation")
    config.batch_size = 16
    config.num_epochs = 30_000 / 662  # 662 steps of 16 images are an epoch

    config.model.num_classes = 21
    config.model.output_stride, config.model.aspp_rates = VARIANTS[variant]
    config.model.dropout = 0.1
    config.model.bn_momentum = None  # the checkpoint's; TensorFlow's deeplab has 0.9997
    config.model.align_corners = True

    config.data.source = "voc:"  # to be given on the command line, with its path
    config.data.train_split = "train_aug"
    config.data.eval_split = "val"
    config.data.image_size = 513
    config.data.train_transforms = (
        "random_scale(0.5, 2.0, step=0.25)|pad(size)|random_crop(size)|random_flip(0.5)"
    )
    config.data.eval_transforms = "fit(size)|pad(size)"  # no picture of VOC is larger than 500
    config.data.workers = 16

    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 4e-5
    config.optimizer.decay_norm = False
    config.optimizer.decay_bias = False
    config.optimizer.lr_multipliers = (("logits/bias", 2.0),)  # the only bias that is no norm's
    config.schedule.name = "poly"
    config.schedule.base_lr = 0.007
    config.schedule.power = 0.9

    config.log.every_steps = 100
    return config
