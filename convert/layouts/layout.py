"""A layout: a framework's names and axes for the arrays of a network, and its conventions."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

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
TF_SLIM = Framework(
    separator="/",
    conv={"kernel": Variable("weights", (0, 1, 2, 3))},
    depthwise={"kernel": Variable("depthwise_weights", (0, 1, 3, 2))},  # (3, 3, C, 1)
    norm=KERAS.norm,
    linear={"kernel": Variable("weights", (0, 1)), "bias": Variable("biases", (0,))},
)
TFLITE = Framework(
    separator="/",
    conv={"kernel": Variable("kernel", (1, 2, 3, 0))},  # OHWI -> HWIO
    depthwise={"kernel": Variable("kernel", (1, 2, 0, 3))},  # (1, 3, 3, C) -> (3, 3, 1, C)
    norm={name: Variable(name, (0,)) for name in ("scale", "bias", "mean", "var")},
    linear={"kernel": Variable("kernel", (1, 0)), "bias": Variable("bias", (0,))},
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
      table: our layer -> its names there: (convolution, normalisation), or (layer,) for a layer
        with a bias. Rows whose name begins with `layer*` stand for all blocks without a row of
        their own; in their names `{stage}` is 1..7, the row of the paper's Table 2; `{block}` the
        number of the block in its stage, from 0; `{index}` its number among all 17, from 0; and
        `{stage-1}` or `{index+1}` the same counted from elsewhere. A row such as `aspp*` stands for
        a head's layers aspp1, aspp2 ...: `{index}` is the number in the place of `*`. `{channels}`
        are those of the map that the layer belongs to, and `{half}` is half of them.
      task: the name of the network's task.
      backbone, preprocessing, mode: the values that its files do not hold. Width comes from the
        arrays.
      head: the same of the task's head, by the names of its fields.
      marks: rows of the layers by which a head of this kind is known. Where there are none,
        whatever follows the backbone is tried.
      guesses: config names of the values that the framework itself leaves open.
      prefix: the beginning of all names but the head's. Files whose names have another one in its
        place, or none, are read as well.
      ignored: arrays that are not needed here: regular expression -> their meaning.
      unused: rows of `table` with layers that the network there has and does not use. They are left
        out in reading, and written as zeros that do nothing.
      remarks: sentences about files that have other arrays as well: a regular expression of the
        arrays' names -> the sentence.
      network: Python code that creates the network there, in which are filled in: {width},
        {percent} (of width 1), {deeper} ("d" if it has more blocks than the paper's), {classes},
        {output_stride} and {last} (channels of the last convolution).
      has_network: whether the framework has a network with the same blocks and channels.
    """

    owner: str
    framework: Framework
    table: Mapping[str, tuple[str, ...]]
    task: str = "classification"
    backbone: Backbone = dataclasses.field(default_factory=Backbone)
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    mode: TrainingMode = dataclasses.field(default_factory=TrainingMode)
    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    marks: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    prefix: str = ""
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    network: str = ""
    has_network: Callable[[Backbone], bool] = lambda backbone: _is_papers(backbone)

    def arrays(self, backbone: Backbone) -> dict[str, Array]:
        """Returns the position of each array of the backbone in our tree, by its whole name there.

        Args:
          backbone: decides which layers there are; the layout's own padding and epsilon are not
            asked for.
        """
        found: dict[str, Array] = {}
        for layer, names in self.layers(backbone):
            found |= self._normalised(layer, names)
        return found

    def relative(self, name: str) -> str:
        """Returns the name of an array of the backbone without `prefix`."""
        return name.removeprefix(self.prefix)

    def dense(self, layer: str) -> dict[str, Array]:
        """Returns the position of each array of a dense layer of ours, by its whole name there."""
        (name,) = self.table.get(layer) or (layer,)
        return self._variables(name, (layer,), self.framework.linear)

    def convolution(self, layer: str, channels: int = 0) -> dict[str, Array]:
        """Returns the position of each array of a convolution of a head, by its whole name there.

        Args:
          layer: ours, such as "projection"; `aspp1`, `aspp2` ... have the row `aspp*`.
          channels: of the map that the layer belongs to, where its name there tells them.
        """
        row, number = layer, re.search(r"\d+", layer)
        if number and layer not in self.table:
            row = layer.replace(number[0], "*")
        values = {"index": int(number[0]) if number else 0}
        values |= {"channels": channels, "half": channels // 2}
        names = [_numbered(name, **values) for name in self.table[row]]
        if len(names) == 2:
            return self._normalised(layer, (names[0], names[1]))
        variables = {**self.framework.conv, "bias": self.framework.linear["bias"]}
        return self._variables(names[0], (layer,), variables)

    def heads_in(self, names: Iterable[str]) -> list[str]:
        """Returns the prefix of the names of the layers of `marks`, for each such head."""
        if not self.marks:
            return []
        first, *others = (next(iter(self.convolution(layer))) for layer in self.marks)
        names = set(names)
        behind = (
            name.removesuffix(first)
            for name in names
            if name == first or name.endswith(self.framework.separator + first)
        )
        return sorted(
            prefix for prefix in behind if all(prefix + other in names for other in others)
        )

    def layers(self, backbone: Backbone) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yields each convolution of ours with its two names there, in the network's order."""
        # Imported here, since it imports jax, which takes seconds; --help lists the layouts.
        from mbv2_jax.models.mobilenet_v2 import blocks

        yield "stem", self._pair("stem")
        first: dict[int, int] = {}  # of each stage, the number of its first block
        for index, block in enumerate(blocks(backbone)):
            number = index - first.setdefault(block.stage, index)
            for part in ("expand", "depthwise", "project"):
                layer = f"{block.name}/{part}"
                conv, norm = self._pair(layer if layer in self.table else f"layer*/{part}")
                if part != "expand" or block.expansion != 1:
                    yield (
                        layer,
                        (
                            _numbered(conv, stage=block.stage, block=number, index=index),
                            _numbered(norm, stage=block.stage, block=number, index=index),
                        ),
                    )
        if backbone.last_convolution:
            yield "last", self._pair("last")

    def _pair(self, row: str) -> tuple[str, str]:
        conv, norm = self.table[row]
        return conv, norm

    def ignores(self, name: str) -> str:
        """Returns the meaning of an array of a file that is not needed here; "" for another one."""
        for row in self.unused:
            for there in self.table[row]:
                if re.search(
                    rf"(^|{re.escape(self.framework.separator)}){re.escape(there)}\W", name
                ):
                    return "of layers that its network does not use"
        matching = (why for pattern, why in self.ignored.items() if re.fullmatch(pattern, name))
        return next(matching, "")

    def remarks_on(self, names: Iterable[str]) -> tuple[str, ...]:
        """Returns the remarks about a file with arrays of these names."""
        names = list(names)
        return tuple(
            remark
            for pattern, remark in self.remarks.items()
            if any(re.fullmatch(pattern, name) for name in names)
        )

    def _normalised(self, layer: str, names: tuple[str, str]) -> dict[str, Array]:
        """Returns the arrays of a convolution and its normalisation by their names there."""
        scope = tuple(layer.split("/"))
        depthwise = "depthwise" in layer
        kernels = self.framework.depthwise if depthwise else self.framework.conv
        conv, norm = names
        arrays = self._variables(conv, (*scope, "conv"), kernels)
        return arrays | self._variables(norm, (*scope, "norm"), self.framework.norm)

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


def of_width(accepts: Callable[[float], bool]) -> Callable[[Backbone], bool]:
    """Returns a `has_network` of a framework that has the paper's network at some widths."""
    return lambda backbone: _is_papers(backbone) and accepts(backbone.width)


def _is_papers(backbone: Backbone) -> bool:
    """Returns whether a backbone has the paper's blocks, and channels in proportion to its."""
    return backbone.depth == 1 and not backbone.fixed_ends


def _numbered(name: str, **values: int) -> str:
    """Fills in {stage}, {block}, {index}, and sums such as {index+1}."""
    return re.sub(
        r"\{(\w+)([+-]\d+)?\}", lambda match: str(values[match[1]] + int(match[2] or 0)), name
    )
