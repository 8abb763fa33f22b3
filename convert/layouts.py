"""How other frameworks name the network's arrays, lay them out, and what they take for granted.

A layout is a table: our layer -> the names of its convolution and its normalisation there. In a row
for all blocks (`layer*`) `{stage}` stands for 1..7, the rows of the paper's Table 2; `{block}` for
the block's number in its stage, from 0; `{index}` for its number among all 17, from 0; and
`{stage-1}` or `{index+1}` where others count from elsewhere. To add a layout, add its table here,
and its real network to tests/parity/test_conversion.py.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Array(NamedTuple):
    """Where an array of a file belongs.

    Attributes:
      path: in our tree, such as ("params", "layer2_0", "expand", "conv", "kernel").
      axes: the file's axes in our order: ours = theirs.transpose(axes).
    """

    path: tuple[str, ...]
    axes: tuple[int, ...]


class Variable(NamedTuple):
    """What a framework calls one array of a layer; `axes` as in Array."""

    name: str
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Framework:
    """What a framework calls the arrays of a layer, and how it lays them out.

    Attributes:
      separator: between a layer's name and its arrays'.
      conv, depthwise, norm, linear: our name (models/mobilenet_v2.py) -> theirs.
    """

    separator: str
    conv: Mapping[str, Variable]
    depthwise: Mapping[str, Variable]
    norm: Mapping[str, Variable]
    linear: Mapping[str, Variable]


TORCH = Framework(
    separator=".",
    conv={"kernel": Variable("weight", (2, 3, 1, 0))},  # OIHW -> HWIO
    depthwise={"kernel": Variable("weight", (2, 3, 1, 0))},  # (C, 1, 3, 3) -> (3, 3, 1, C)
    norm={
        "scale": Variable("weight", (0,)),
        "bias": Variable("bias", (0,)),
        "mean": Variable("running_mean", (0,)),
        "var": Variable("running_var", (0,)),
    },
    linear={"kernel": Variable("weight", (1, 0)), "bias": Variable("bias", (0,))},
)
KERAS = Framework(
    separator="/",
    conv={"kernel": Variable("kernel", (0, 1, 2, 3))},
    depthwise={"kernel": Variable("depthwise_kernel", (0, 1, 3, 2))},  # (3, 3, C, 1)
    norm={
        "scale": Variable("gamma", (0,)),
        "bias": Variable("beta", (0,)),
        "mean": Variable("moving_mean", (0,)),
        "var": Variable("moving_variance", (0,)),
    },
    linear={"kernel": Variable("kernel", (0, 1)), "bias": Variable("bias", (0,))},
)


OURS = Framework(
    separator="/",
    conv={"kernel": Variable("kernel", (0, 1, 2, 3))},
    depthwise={"kernel": Variable("kernel", (0, 1, 2, 3))},
    norm={name: Variable(name, (0,)) for name in ("scale", "bias", "mean", "var")},
    linear={"kernel": Variable("kernel", (0, 1)), "bias": Variable("bias", (0,))},
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to name the arrays of MobileNetV2, with what its files don't say.

    Attributes:
      owner: whose it is, for messages.
      framework: its array names.
      table: our layer -> (convolution, normalisation); the classifier has one name.
      conventions: the values of the config fields that no weight file holds.
      guesses: those of them which the framework itself leaves open.
      prefix: of all names but the classifier's; files that hold only a backbone may go without.
      ignored: what carries nothing for us: regular expression -> what it is.
      aliases: layers that some files call otherwise: name there -> name in the table.
      network: Python that makes the network there, with {width}, {percent} (of width 1), {classes}
        and {last} (channels of the last convolution) to fill in.
      has_width: whether its network of a width has the channels that ours has.
    """

    owner: str
    framework: Framework
    table: Mapping[str, tuple[str, ...]]
    conventions: Mapping[str, Any]
    guesses: tuple[str, ...] = ()
    prefix: str = ""
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    network: str = ""
    has_width: Callable[[float], bool] = lambda width: True

    def arrays(self) -> dict[str, Array]:
        """Returns where each array of a file belongs, by its name there."""
        found: dict[str, Array] = {}
        for layer, names in self._layers():
            scope = tuple(layer.split("/"))
            if layer == "classifier":
                found |= self._variables(names[0], scope, self.framework.linear)
                continue
            conv, norm = names
            depthwise = layer.endswith("depthwise")
            kernels = self.framework.depthwise if depthwise else self.framework.conv
            found |= self._variables(conv, (*scope, "conv"), kernels)
            found |= self._variables(norm, (*scope, "norm"), self.framework.norm)
        return found

    def _variables(
        self, name: str, scope: tuple[str, ...], variables: Mapping[str, Variable]
    ) -> dict[str, Array]:
        return {
            f"{name}{self.framework.separator}{variable.name}": Array(
                ("batch_stats" if ours in ("mean", "var") else "params", *scope, ours),
                variable.axes,
            )
            for ours, variable in variables.items()
        }

    def canonical(self, name: str) -> str:
        """Returns an array's name with its layer called as in the table."""
        layer, separator, variable = name.rpartition(self.framework.separator)
        return self.aliases.get(layer, layer) + separator + variable

    def without_prefix(self) -> "Layout":
        """Returns the layout of files that hold the backbone alone, under its own names."""
        table = {
            layer: tuple(name.removeprefix(self.prefix) for name in names)
            for layer, names in self.table.items()
        }
        return dataclasses.replace(self, table=table)

    def is_further_block(self, name: str) -> bool:
        """Whether an array is called like those of a block, whatever its number."""
        rows = [names for layer, names in self.table.items() if layer.startswith("layer*")]
        layers = "|".join(
            re.sub(r"\\\{[^}]*\}", r"\\d+", re.escape(row)) for names in rows for row in names
        )
        separator = re.escape(self.framework.separator)
        return re.fullmatch(rf"({layers}){separator}\w+", name) is not None

    def _layers(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields each layer of ours with its names there, in the network's order."""
        # Here: this imports jax, and --help, which lists the layouts, can do without.
        from mbv2_jax.models.mobilenet_v2 import STAGES

        yield "stem", self.table["stem"]
        index = 0
        for stage, row in enumerate(STAGES, start=1):
            for block in range(row.blocks):
                for part in ("expand", "depthwise", "project"):
                    layer = f"layer{stage}_{block}/{part}"
                    names = self.table.get(layer) or self.table[f"layer*/{part}"]
                    if part != "expand" or row.expansion != 1:
                        yield layer, tuple(_number(name, stage, block, index) for name in names)
                index += 1
        yield "last", self.table["last"]
        yield "classifier", self.table["classifier"]


def _number(name: str, stage: int, block: int, index: int) -> str:
    """Fills in {stage}, {block}, {index}, and sums such as {index+1}."""
    values = {"stage": stage, "block": block, "index": index}
    return re.sub(
        r"\{(\w+)([+-]\d+)?\}", lambda match: str(values[match[1]] + int(match[2] or 0)), name
    )


_IMAGENET: dict[str, Any] = {
    "data.mean": (123.675, 116.28, 103.53),
    "data.std": (58.395, 57.12, 57.375),
}
_PYTORCH = _IMAGENET | {
    "model.padding": "torch",
    "model.bn_epsilon": 1e-5,
    "model.bn_momentum": 0.9,
    "model.dropout": 0.0,
    "data.image_size": 224,
    "data.eval_transforms": "resize_edge(256)|center_crop(size)",
}
_TENSORFLOW = _PYTORCH | {
    "model.padding": "same",
    "model.bn_epsilon": 1e-3,
    "data.mean": (127.5, 127.5, 127.5),  # inputs in [-1, 1]
    "data.std": (127.5, 127.5, 127.5),
}
# The widths at which every port rounds its channels alike.
_CUSTOMARY = (0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4)
_COUNTERS = {r".*\.num_batches_tracked": "BatchNorm's counters of training steps"}

# tonylins's port and those that began as copies of it.
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
        conventions=_PYTORCH,
        guesses=("model.padding", "model.bn_epsilon"),  # a file of ours that lost its description
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
        conventions=_PYTORCH,
        prefix="backbone.",
        ignored=_COUNTERS,
        # Above width 1 its last convolution has int(1280 width) channels, divisible or not.
        has_width=lambda width: width <= 1 or int(1280 * width) % 8 == 0,
        network="mmpretrain.get_model('mobilenet-v2_8xb32_in1k', "
        "backbone=dict(widen_factor={width}), "
        "head=dict(num_classes={classes}, in_channels={last}))",
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
        conventions=_PYTORCH | {"model.dropout": 0.2},
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
        conventions=_PYTORCH
        | {"data.eval_transforms": "resize_edge(256, interpolation='bicubic')|center_crop(size)"},
        ignored=_COUNTERS,
        has_width=lambda width: width in (0.35, 0.5, 0.75, 1.0, 1.4),  # those it has a name for
        network="timm.create_model('mobilenetv2_{percent:03d}', num_classes={classes})",
    ),
    "tonylins": Layout(
        owner="tonylins/pytorch-mobilenet-v2",
        framework=TORCH,
        table=_TONYLINS,
        conventions=_PYTORCH,
        ignored=_COUNTERS,
        has_width=lambda width: width == 1.0,  # its others keep the first 32 and 16 channels
        network="MobileNetV2.MobileNetV2(n_class={classes}, width_mult={width})",
    ),
    "d-li14": Layout(
        owner="d-li14/mobilenetv2.pytorch",
        framework=TORCH,
        table=_TONYLINS | {"last": ("conv.0", "conv.1")},
        conventions=_PYTORCH,
        ignored=_COUNTERS,
        has_width=lambda width: width != 0.1,  # there its channels are divisible by 4 only
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
        conventions=_TENSORFLOW | {"model.bn_momentum": 0.999},
        guesses=("data.eval_transforms",),  # Keras ships a normalisation, and no crop
        aliases={"Logits": "predictions"},  # in its first published files, of 2018
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
        # TF-slim keeps 0.997 of the statistics and 0.8 of the features. transformers hands both to
        # torch, which takes them for the share of the *new* statistics, and of what is dropped.
        conventions=_TENSORFLOW | {"model.bn_momentum": 0.997, "model.dropout": 0.2},
        guesses=("model.padding",),  # tf_padding in the config.json beside the file
        prefix="mobilenet_v2.",
        ignored=_COUNTERS,
        has_width=lambda width: width in _CUSTOMARY,
        network="transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config("
        "depth_multiplier={width}, num_labels={classes}))",
    ),
}

# What --to takes -> the layout. Keras is not there: only Keras writes files that Keras loads.
TARGETS = {
    "safetensors": "mbv2_jax",
    **{name: name for name, layout in LAYOUTS.items() if layout.framework is TORCH},
}
