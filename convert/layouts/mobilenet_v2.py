"""The layouts of MobileNetV2 with a classifier."""

import dataclasses

from mbv2_jax.models.variants import VARIANTS
from mbv2_jax.spec import Backbone, Preprocessing, TrainingMode

from .layout import KERAS, OURS, TF_SLIM, TFLITE, TORCH, Layout, of_width

# The widths at which every port rounds its channels alike.
WIDTHS = frozenset(v.backbone.width for v in VARIANTS.values() if not v.backbone.fixed_ends)

_TENSORFLOW = Backbone(padding="same", bn_epsilon=1e-3)
_FROM_MINUS_1_TO_1 = Preprocessing(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))
_COUNTERS = {
    r".*\.num_batches_tracked": "BatchNorm's counters of training steps",
    r"(.*\.)?(criterion|loss|loss_fn)\.(weight|pos_weight)": "the loss's weights of the classes",
}

# TF-slim's, whose evaluation crops 0.875 of each side and resizes that to a square; here the square
# is cropped after the resizing, as in the ports of these weights.
_TF_SLIM_IMAGES = dataclasses.replace(
    _FROM_MINUS_1_TO_1, eval_transforms="resize_edge(256)|center_crop(size)"
)
# TF-slim keeps 0.997 of the statistics and 0.8 of the features.
_TF_SLIM_MODE = TrainingMode(bn_momentum=0.997, dropout=0.2)

# The widths of timm's networks by their depth; the deeper ones have ends of fixed width.
_TIMM = {1.0: (0.35, 0.5, 0.75, 1.0, 1.4), 1.2: (1.1,), 1.4: (1.2,)}

# Above width 1 the last convolution has int(1280 * width) channels, divisible by 8 or not.
_in_openmmlab = of_width(lambda width: width <= 1 or int(1280 * width) % 8 == 0)

# tonylins's port, from which others were copied.
_TONYLINS = {
    "stem": ("features.0.0", "features.0.1"),
    "layer1_0/depthwise": ("features.1.conv.0", "features.1.conv.1"),
    "layer1_0/project": ("features.1.conv.3", "features.1.conv.4"),
    "layer*/expand": ("features.{index+1}.conv.0", "features.{index+1}.conv.1"),
    "layer*/depthwise": ("features.{index+1}.conv.3", "features.{index+1}.conv.4"),
    "layer*/project": ("features.{index+1}.conv.6", "features.{index+1}.conv.7"),
    "last": ("features.18.0", "features.18.1"),
    "classifier": ("classifier",),
}

LAYOUTS: dict[str, Layout] = {
    "mbv2_jax": Layout(
        owner="this package, in a .safetensors file",
        framework=OURS,
        table={
            "stem": ("stem/conv", "stem/norm"),
            "layer*/expand": (
                "layer{stage}_{block}/expand/conv",
                "layer{stage}_{block}/expand/norm",
            ),
            "layer*/depthwise": (
                "layer{stage}_{block}/depthwise/conv",
                "layer{stage}_{block}/depthwise/norm",
            ),
            "layer*/project": (
                "layer{stage}_{block}/project/conv",
                "layer{stage}_{block}/project/norm",
            ),
            "last": ("last/conv", "last/norm"),
            "classifier": ("classifier",),
        },
        guesses=("model.padding", "model.bn_epsilon"),  # where a file of ours lost its model.json
    ),
    "mmpretrain": Layout(
        owner="mmpretrain 1.x and mmcls 0.x, MobileNetV2",
        framework=TORCH,
        table={
            "stem": ("backbone.conv1.conv", "backbone.conv1.bn"),
            "layer1_0/depthwise": ("backbone.layer1.0.conv.0.conv", "backbone.layer1.0.conv.0.bn"),
            "layer1_0/project": ("backbone.layer1.0.conv.1.conv", "backbone.layer1.0.conv.1.bn"),
            "layer*/expand": (
                "backbone.layer{stage}.{block}.conv.0.conv",
                "backbone.layer{stage}.{block}.conv.0.bn",
            ),
            "layer*/depthwise": (
                "backbone.layer{stage}.{block}.conv.1.conv",
                "backbone.layer{stage}.{block}.conv.1.bn",
            ),
            "layer*/project": (
                "backbone.layer{stage}.{block}.conv.2.conv",
                "backbone.layer{stage}.{block}.conv.2.bn",
            ),
            "last": ("backbone.conv2.conv", "backbone.conv2.bn"),
            "classifier": ("head.fc",),
        },
        prefix="backbone.",
        ignored=_COUNTERS,
        remarks={
            r"(.*\.)?decode_head\..*": "mmseg's networks of output stride 8 dilate from the first "
            "block of a stage whose stride they leave out, and model.output_stride=8 here from the "
            "second one, as TensorFlow's do: the weights are the same, the maps are not"
        },
        has_network=_in_openmmlab,
        network="mmpretrain.get_model('mobilenet-v2_8xb32_in1k', "
        "backbone=dict(widen_factor={width}), "
        "head=dict(num_classes={classes}, in_channels={last}))",
    ),
    "mmdet": Layout(
        owner="mmdet 2.x and 3.x, MobileNetV2",
        framework=TORCH,
        table={
            "stem": ("backbone.conv1.conv", "backbone.conv1.bn"),
            "layer*/expand": (
                "backbone.layer{stage}.{block}.expand_conv.conv",
                "backbone.layer{stage}.{block}.expand_conv.bn",
            ),
            "layer*/depthwise": (
                "backbone.layer{stage}.{block}.depthwise_conv.conv",
                "backbone.layer{stage}.{block}.depthwise_conv.bn",
            ),
            "layer*/project": (
                "backbone.layer{stage}.{block}.linear_conv.conv",
                "backbone.layer{stage}.{block}.linear_conv.bn",
            ),
            "last": ("backbone.conv2.conv", "backbone.conv2.bn"),
        },
        prefix="backbone.",
        ignored=_COUNTERS,
        has_network=_in_openmmlab,
    ),
    "torchvision": Layout(
        owner="torchvision.models.mobilenet_v2",
        framework=TORCH,
        table={
            "stem": ("features.0.0", "features.0.1"),
            "layer1_0/depthwise": ("features.1.conv.0.0", "features.1.conv.0.1"),
            "layer1_0/project": ("features.1.conv.1", "features.1.conv.2"),
            "layer*/expand": ("features.{index+1}.conv.0.0", "features.{index+1}.conv.0.1"),
            "layer*/depthwise": ("features.{index+1}.conv.1.0", "features.{index+1}.conv.1.1"),
            "layer*/project": ("features.{index+1}.conv.2", "features.{index+1}.conv.3"),
            "last": ("features.18.0", "features.18.1"),
            "classifier": ("classifier.1",),
        },
        mode=TrainingMode(dropout=0.2),
        prefix="features.",
        ignored=_COUNTERS,
        network="torchvision.models.mobilenet_v2(width_mult={width}, num_classes={classes})",
    ),
    "timm": Layout(
        owner="timm, mobilenetv2_035 to mobilenetv2_140",
        framework=TORCH,
        table={
            "stem": ("conv_stem", "bn1"),
            "layer1_0/depthwise": ("blocks.0.0.conv_dw", "blocks.0.0.bn1"),
            "layer1_0/project": ("blocks.0.0.conv_pw", "blocks.0.0.bn2"),
            "layer*/expand": ("blocks.{stage-1}.{block}.conv_pw", "blocks.{stage-1}.{block}.bn1"),
            "layer*/depthwise": (
                "blocks.{stage-1}.{block}.conv_dw",
                "blocks.{stage-1}.{block}.bn2",
            ),
            "layer*/project": ("blocks.{stage-1}.{block}.conv_pwl", "blocks.{stage-1}.{block}.bn3"),
            "last": ("conv_head", "bn2"),
            "classifier": ("classifier",),
        },
        preprocessing=Preprocessing(
            eval_transforms="resize_edge(256, interpolation='bicubic')|center_crop(size)"
        ),
        ignored=_COUNTERS,
        has_network=lambda backbone: (
            backbone.width in _TIMM.get(backbone.depth, ())
            and backbone.fixed_ends == (backbone.depth != 1)
        ),
        network="timm.create_model('mobilenetv2_{percent:03d}{deeper}', num_classes={classes})",
    ),
    "tonylins": Layout(
        owner="tonylins/pytorch-mobilenet-v2",
        framework=TORCH,
        table=_TONYLINS,
        prefix="features.",
        ignored=_COUNTERS,
        has_network=of_width(
            lambda width: width == 1.0
        ),  # its other widths do not scale the first layers
        network="MobileNetV2.MobileNetV2(n_class={classes}, width_mult={width})",
    ),
    "d-li14": Layout(
        owner="d-li14/mobilenetv2.pytorch",
        framework=TORCH,
        table=_TONYLINS | {"last": ("conv.0", "conv.1")},
        ignored=_COUNTERS,
        has_network=of_width(lambda width: width != 0.1),  # its channels there are multiples of 4
        network="models.imagenet.mobilenetv2(num_classes={classes}, width_mult={width})",
    ),
    "keras": Layout(
        owner="keras.applications.MobileNetV2",
        framework=KERAS,
        table={
            "stem": ("Conv1", "bn_Conv1"),
            "layer1_0/depthwise": ("expanded_conv_depthwise", "expanded_conv_depthwise_BN"),
            "layer1_0/project": ("expanded_conv_project", "expanded_conv_project_BN"),
            "layer*/expand": ("block_{index}_expand", "block_{index}_expand_BN"),
            "layer*/depthwise": ("block_{index}_depthwise", "block_{index}_depthwise_BN"),
            "layer*/project": ("block_{index}_project", "block_{index}_project_BN"),
            "last": ("Conv_1", "Conv_1_bn"),
            "classifier": ("predictions",),
        },
        backbone=_TENSORFLOW,
        preprocessing=_FROM_MINUS_1_TO_1,
        mode=TrainingMode(bn_momentum=0.999),
        guesses=("data.eval_transforms",),  # Keras ships a normalisation, but no crop
    ),
    "tf-slim": Layout(
        owner="TensorFlow's TF-slim, in a frozen graph",
        framework=TF_SLIM,
        table={
            "stem": ("MobilenetV2/Conv", "MobilenetV2/Conv/BatchNorm"),
            "layer1_0/depthwise": (
                "MobilenetV2/expanded_conv/depthwise",
                "MobilenetV2/expanded_conv/depthwise/BatchNorm",
            ),
            "layer1_0/project": (
                "MobilenetV2/expanded_conv/project",
                "MobilenetV2/expanded_conv/project/BatchNorm",
            ),
            "layer*/expand": (
                "MobilenetV2/expanded_conv_{index}/expand",
                "MobilenetV2/expanded_conv_{index}/expand/BatchNorm",
            ),
            "layer*/depthwise": (
                "MobilenetV2/expanded_conv_{index}/depthwise",
                "MobilenetV2/expanded_conv_{index}/depthwise/BatchNorm",
            ),
            "layer*/project": (
                "MobilenetV2/expanded_conv_{index}/project",
                "MobilenetV2/expanded_conv_{index}/project/BatchNorm",
            ),
            "last": ("MobilenetV2/Conv_1", "MobilenetV2/Conv_1/BatchNorm"),
            "classifier": ("MobilenetV2/Logits/Conv2d_1c_1x1",),
        },
        backbone=_TENSORFLOW,
        preprocessing=_TF_SLIM_IMAGES,
        mode=_TF_SLIM_MODE,
        prefix="MobilenetV2/",
    ),
    "tflite": Layout(
        owner="a .tflite file of any program; the layers are named by the order of its operators",
        framework=TFLITE,
        table={
            "stem": ("stem", "stem/norm"),
            "layer*/expand": (
                "layer{stage}_{block}/expand",
                "layer{stage}_{block}/expand/norm",
            ),
            "layer*/depthwise": (
                "layer{stage}_{block}/depthwise",
                "layer{stage}_{block}/depthwise/norm",
            ),
            "layer*/project": (
                "layer{stage}_{block}/project",
                "layer{stage}_{block}/project/norm",
            ),
            "last": ("last", "last/norm"),
            "classifier": ("classifier",),
        },
        backbone=_TENSORFLOW,
        preprocessing=_TF_SLIM_IMAGES,
        mode=_TF_SLIM_MODE,
        guesses=("model.padding",),
    ),
    "transformers": Layout(
        owner="Hugging Face transformers, MobileNetV2",
        framework=TORCH,
        table={
            "stem": (
                "mobilenet_v2.conv_stem.first_conv.convolution",
                "mobilenet_v2.conv_stem.first_conv.normalization",
            ),
            "layer1_0/depthwise": (
                "mobilenet_v2.conv_stem.conv_3x3.convolution",
                "mobilenet_v2.conv_stem.conv_3x3.normalization",
            ),
            "layer1_0/project": (
                "mobilenet_v2.conv_stem.reduce_1x1.convolution",
                "mobilenet_v2.conv_stem.reduce_1x1.normalization",
            ),
            "layer*/expand": (
                "mobilenet_v2.layer.{index-1}.expand_1x1.convolution",
                "mobilenet_v2.layer.{index-1}.expand_1x1.normalization",
            ),
            "layer*/depthwise": (
                "mobilenet_v2.layer.{index-1}.conv_3x3.convolution",
                "mobilenet_v2.layer.{index-1}.conv_3x3.normalization",
            ),
            "layer*/project": (
                "mobilenet_v2.layer.{index-1}.reduce_1x1.convolution",
                "mobilenet_v2.layer.{index-1}.reduce_1x1.normalization",
            ),
            "last": (
                "mobilenet_v2.conv_1x1.convolution",
                "mobilenet_v2.conv_1x1.normalization",
            ),
            "classifier": ("classifier",),
        },
        backbone=_TENSORFLOW,
        preprocessing=_FROM_MINUS_1_TO_1,
        # transformers passes what TF-slim keeps to torch, which takes the numbers as the shares of
        # the *new* statistics and of the dropped features.
        mode=_TF_SLIM_MODE,
        guesses=("model.padding",),  # config.json beside the file has tf_padding
        prefix="mobilenet_v2.",
        ignored=_COUNTERS,
        has_network=of_width(lambda width: width in WIDTHS),
        network="transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config("
        "depth_multiplier={width}, num_labels={classes}))",
    ),
}
