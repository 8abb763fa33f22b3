"""TensorFlow Model Garden's recipe for TPUs: batch 4096 in bfloat16.

    python -m mbv2_jax.main --config=configs/mobilenet_v2_tpu_4096.py --workdir=runs/tpu

data: ImageNet-1k, TFDS `imagenet2012`. hardware of the original: TPUs; their kind and number, and
the time: not published.
steps: 500 epochs of 312 at batch 4096.
expected: 72.72 top-1, 91.05 top-5 (the first line of the file named below).
measured: not run.
source: official/vision/configs/experiments/image_classification/imagenet_mobilenetv2_tpu.yaml and
`mobilenet_imagenet` in official/vision/configs/image_classification.py of
https://github.com/tensorflow/models
differences from the original:
- BatchNorm's statistics are over each device's share of the batch, as there; the size of that share
  is not published.
- Weight decay includes the kernels of depthwise convolutions.
- RMSProp's mean squares start at 1; there, at 0.
- The staircase also counts the warm-up, so that the rate is up to 8.5 % higher until its end, and
  equal afterwards.
- There are 1000 classes; there, 1001, one of them for the background. The initial weights are
  mmpretrain's.
- Images are resized with antialiasing; in evaluation, to a short side of 256, and then cropped.
  There, the central 87.5 % are cropped, and then resized.
"""

from ml_collections import ConfigDict

from mbv2_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the config; it takes no argument."""
    config = default.get_config()
    config.batch_size = 4096
    config.num_epochs = 500.0
    config.label_smoothing = 0.1

    config.model.width = 1.0
    config.model.num_classes = 1000
    config.model.dropout = 0.2
    config.model.padding = "same"
    config.model.bn_epsilon = 1e-3
    config.model.bn_momentum = 0.997
    config.model.bn_group_size = "device"
    config.model.dtype = "bfloat16"

    config.data.source = "imagenet2012"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.train_transforms = "inception_crop(size)|random_flip(0.5)"
    config.data.eval_transforms = "resize_edge(256)|center_crop(size)"
    config.data.mean = (123.675, 116.28, 103.53)
    config.data.std = (58.395, 57.12, 57.375)
    config.data.last_batch = "drop"
    config.data.workers = 64

    config.optimizer.name = "rmsprop"
    config.optimizer.rms_decay = 0.9
    config.optimizer.momentum = 0.9
    config.optimizer.epsilon = 0.002
    config.optimizer.weight_decay = 1e-5
    config.optimizer.decay_norm = False
    config.optimizer.decay_bias = False
    config.schedule.name = "exponential"
    config.schedule.base_lr = 0.256  # 0.008 for each 128 of the batch
    config.schedule.factor = 0.96
    config.schedule.decay_epochs = 2.5  # 780 steps
    config.schedule.warmup_epochs = 5.0  # 1,560 steps

    config.log.every_steps = 100
    return config
