"""A layout: a framework's names and axes for the arrays of a network, and its conventions."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mbv2_jax.spec import Backbone, Preprocessing, TrainingMode


class Array(NamedTuple):
    """The position of a file's array in our tree of variables.

    Attributes:
      path: such as ("params", "layer2_0", "expand", "conv", "kernel").
      axes: the file's axes in our order: ours = theirs.transpose(axes).
    """

    path: tuple[str, ...]
    axes: tuple[int, ...]


class Variable(NamedTuple):
    """A framework's name for an array of a layer, and its axes as in `Array`."""

    name: str
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Framework:
    """A framework's names and axes for the arrays of each kind of layer.

    Attributes:
      separator: between the name of a layer and those of its arrays.
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
    """A framework's names for the arrays of a network, and the conventions of its weights.

    Attributes:
      owner: the program that has this network, for messages.
      framework: its names for the arrays of a layer.
      table: our layer -> its names there: (convolution, normalisation), or (dense layer,). Rows
        whose name begins with `layer*` stand for all blocks without a row of their own; in their
        names `{stage}` is 1..7, the row of the paper's Table 2; `{block}` the number of the block
        in its stage, from 0; `{index}` its number among all 17, from 0; and `{stage-1}` or
        `{index+1}` the same counted from elsewhere.
      task: the name of the network's task.
      backbone, preprocessing, mode: the values that its files do not hold. Width comes from the
        arrays.
      guesses: config names of the values that the framework itself leaves open.
      prefix: of all names but the head's; files that hold only a backbone may lack it.
      ignored: arrays that are not needed here: regular expression -> their meaning.
      aliases: other names of layers in some files: name there -> name in the table.
      network: Python code that creates the network there; {width}, {percent} (of width 1),
        {classes} and {last} (channels of the last convolution) are filled in.
      has_width: whether the framework's network of a given width has the same channels as ours.
    """

    owner: str
    framework: Framework
    table: Mapping[str, tuple[str, ...]]
    task: str = "classification"
    backbone: Backbone = dataclasses.field(default_factory=Backbone)
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    mode: TrainingMode = dataclasses.field(default_factory=TrainingMode)
    guesses: tuple[str, ...] = ()
    prefix: str = ""
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    network: str = ""
    has_width: Callable[[float], bool] = lambda width: True

    def arrays(self) -> dict[str, Array]:
        """Returns the position of each array in our tree, by its name in a file."""
        found: dict[str, Array] = {}
        for layer, names in self.layers():
            scope = tuple(layer.split("/"))
            if len(names) == 1:
                found |= self._variables(names[0], scope, self.framework.linear)
                continue
            conv, norm = names
            depthwise = layer.endswith("depthwise")
            kernels = self.framework.depthwise if depthwise else self.framework.conv
            found |= self._variables(conv, (*scope, "conv"), kernels)
            found |= self._variables(norm, (*scope, "norm"), self.framework.norm)
        return found

    def layers(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields each layer of ours with its names there, in the network's order."""
        # Imported here, since it imports jax, which takes seconds; --help lists the layouts.
        from mbv2_jax.models.mobilenet_v2 import STAGES

        yield "stem", self.table["stem"]
        index = 0
        for stage, row in enumerate(STAGES, start=1):
            for block in range(row.blocks):
                for part in ("expand", "depthwise", "project"):
                    layer = f"layer{stage}_{block}/{part}"
                    names = self.table.get(layer) or self.table[f"layer*/{part}"]
                    if part != "expand" or row.expansion != 1:
                        yield layer, tuple(_numbered(name, stage, block, index) for name in names)
                index += 1
        for layer, names in self.table.items():
            if layer != "stem" and not layer.startswith("layer"):
                yield layer, names

    def canonical(self, name: str) -> str:
        """Returns the name of an array with its layer named as in the table."""
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
        """Returns whether an array has the name of one in a block of any number."""
        rows = [names for layer, names in self.table.items() if layer.startswith("layer*")]
        layers = "|".join(
            re.sub(r"\\\{[^}]*\}", r"\\d+", re.escape(row)) for names in rows for row in names
        )
        separator = re.escape(self.framework.separator)
        return re.fullmatch(rf"({layers}){separator}\w+", name) is not None

    def _variables(
        self, name: str, scope: tuple[str, ...], variables: Mapping[str, Variable]
    ) -> dict[str, Array]:
        """Returns the arrays of a layer by their names there."""
        return {
            f"{name}{self.framework.separator}{variable.name}": Array(
                ("batch_stats" if ours in ("mean", "var") else "params", *scope, ours),
                variable.axes,
            )
            for ours, variable in variables.items()
        }


def _numbered(name: str, stage: int, block: int, index: int) -> str:
    """Fills in {stage}, {block}, {index}, and sums such as {index+1}."""
    values = {"stage": stage, "block": block, "index": index}
    return re.sub(
        r"\{(\w+)([+-]\d+)?\}", lambda match: str(values[match[1]] + int(match[2] or 0)), name
    )
