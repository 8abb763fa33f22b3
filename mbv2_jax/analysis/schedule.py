"""The learning rate over the steps of a run, drawn before it starts."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mbv2_jax import model_dir
from mbv2_jax.analysis import output
from mbv2_jax.data import loader, sources
from mbv2_jax.errors import UserError
from mbv2_jax.models import mobilenet_v2
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import optimizer, splits
from mbv2_jax.training import schedule as schedule_lib
from mbv2_jax.training.config import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 4000  # of a curve


class Curve(NamedTuple):
    """The learning rate of a run.

    Attributes:
      rate: (total_steps,) float, of each step, before the factors of `parts`.
      steps_per_epoch, warmup: in steps; `warmup` is the length of the rise at the beginning.
      parts: the parts of the network by the factor of their rate, the largest first; 0 is frozen.
    """

    rate: np.ndarray
    steps_per_epoch: int
    warmup: int
    parts: dict[float, str]


def schedule(config: ConfigDict, out: str = "schedule.png", examples: int | None = None) -> None:
    """Draws the learning rate of a config, and prints its beginning, its peak and its end.

    Args:
      config: of a recipe.
      out: the picture's file, replaced if it exists.
      examples: the number of training images; None opens the data to count them.

    Raises:
      UserError: an argument, the config or the data is wrong.
    """
    output.check_picture(out)
    if examples is not None and examples < 1:
        raise UserError(f"--examples={examples}: give the number of training images")
    settings = config_lib.read(config_lib.without_groups(config))
    if not settings.run.num_epochs:
        raise UserError("num_epochs is 0: a run that trains no steps has no learning rate to draw")
    data = settings.data
    source = None
    if examples is None:
        source = splits.open_training(settings)
        examples = len(source)
    found = curve(settings, source, examples)
    title = (
        f"{data.source}: {examples:,} images in batches of {settings.run.batch_size}, "
        f"{settings.run.num_epochs:g} epochs, {settings.schedule.name}, {settings.optimizer.name}"
    )
    output.write_figure(draw(found, title), out)
    print(f"{out}: {describe(found)}")
    for factor, part in found.parts.items():
        print(f"  {_factor(factor)}: {part}")


def curve(settings: Settings, source: sources.Source | None, examples: int) -> Curve:
    """Returns the learning rate of a run.

    Args:
      settings: the config.
      source: the training split, which may decide the head; None where it is not opened.
      examples: the number of training images.
    """
    run = settings.run
    steps_per_epoch = loader.steps_per_epoch(examples, run.batch_size, settings.data.last_batch)
    total = max(1, schedule_lib.epochs_to_steps(run.num_epochs, steps_per_epoch))
    rate = schedule_lib.schedule(settings.schedule, run.batch_size, steps_per_epoch, total)
    rates = np.asarray(jax.jit(rate)(jnp.arange(total)))
    warmup = schedule_lib.warmup_steps(settings.schedule, steps_per_epoch)
    return Curve(rates, steps_per_epoch, warmup, _parts(settings, source))


def _parts(settings: Settings, source: sources.Source | None) -> dict[float, str]:
    """Returns the parts of the network by the factor of their learning rate; 0 is frozen."""
    spec, task = config_lib.resolve(settings, source)
    network = task.network(spec.backbone, spec.mode)
    params = model_dir.shapes_of(network)["params"]
    factors = jax.tree.map(
        lambda factor, moves: factor if moves else 0.0,
        optimizer.multipliers(params, settings.optimizer.lr_multipliers),
        mobilenet_v2.trainable(params, spec.mode.frozen_stages),
    )
    names: dict[float, list[str]] = {}
    for name, factor in _uniform(_by_stage(factors), ""):
        names.setdefault(factor, []).append(name)
    return {factor: _joined(names[factor]) for factor in sorted(names, reverse=True)}


def _by_stage(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a network's tree in the network's order, with the blocks of a stage in one branch."""
    stages_of = (f"layer{i}" for i in range(1, len(mobilenet_v2.STAGES) + 1))
    first = ("stem", *stages_of, "last", "hidden")
    stages: dict[str, Any] = {name: {} for name in first}
    for name, branch in tree.items():
        stage = name.partition("_")[0]
        if stage in first and stage != name:
            stages[stage][name] = branch
        else:
            stages[name] = branch
    return {name: branch for name, branch in stages.items() if branch}


def _uniform(tree: Mapping[str, Any], path: str) -> list[tuple[str, float]]:
    """Returns the largest branches of a tree in which all leaves are equal, with their value."""
    found = []
    for name, branch in tree.items():
        values = set(jax.tree.leaves(branch))
        whole = name if path.startswith(name.partition("_")[0]) or not path else f"{path}/{name}"
        if len(values) == 1:
            found.append((whole, values.pop()))
        else:
            found += _uniform(branch, whole)
    return found


def _joined(names: list[str]) -> str:
    """Returns names as text, with "layer3 to layer7" for stages in a row."""
    numbers = {f"layer{i}": i for i in range(1, len(mobilenet_v2.STAGES) + 1)}

    def key(pair: tuple[int, str]) -> tuple[bool, int]:  # equal for stages in a row
        position, name = pair
        return name in numbers, numbers.get(name, 0) - position

    texts: list[str] = []
    for _, group in itertools.groupby(enumerate(names), key):
        row = [name for _, name in group]
        texts += row if len(row) <= 2 else [f"{row[0]} to {row[-1]}"]
    return ", ".join(texts)


def describe(found: Curve) -> str:
    """Returns the length and the rates of a run as text, with a warning about its warm-up."""
    total, rate = len(found.rate), found.rate
    peak = int(rate.argmax())
    text = (
        f"{total:,} steps, {found.steps_per_epoch:,} in an epoch; the learning rate is "
        f"{rate[0]:.4g} at the first step, at most {rate[peak]:.4g} (step {peak + 1:,}), and "
        f"{rate[-1]:.4g} at the last"
    )
    if found.warmup >= total:
        text += f". The run ends within its warm-up, which takes {found.warmup:,} steps"
    elif found.warmup:
        text += f"; the warm-up takes {found.warmup:,} steps"
    return text


def _factor(factor: float) -> str:
    return "frozen" if factor == 0 else f"{factor:g} times the rate"


def draw(found: Curve, title: str) -> "Figure":
    """Draws the learning rate over the run and, where there is one, over the warm-up.

    Args:
      found: the rate.
      title: a line above.

    Returns:
      A matplotlib figure.
    """
    total, warmup = len(found.rate), found.warmup
    panels = [("the run", total)]
    if warmup and 3 * warmup < total:
        panels.append(("its beginning", 3 * warmup))
    figure = output.new_figure(7.0 if len(panels) == 1 else 11.0, 4.6, title)
    all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=(3, 2)[: len(panels)])[0]
    for axes, (name, steps) in zip(all_axes, panels, strict=True):
        _draw_panel(axes, found, steps)
        axes.set_title(name, loc="left", fontsize=10)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", fontsize=9)
    return figure


def _draw_panel(axes: "Axes", found: Curve, steps: int) -> None:
    """Draws the first steps: a curve for each factor, the warm-up shaded."""
    shown = np.unique(np.linspace(0, steps - 1, min(POINTS, steps)).astype(np.int64))
    epochs = shown / found.steps_per_epoch
    for factor, part in found.parts.items():
        if factor:
            name = part if len(found.parts) > 1 else "every layer"
            axes.plot(epochs, factor * found.rate[shown], label=f"{_factor(factor)}: {name}")
        else:
            axes.plot([], [], color="none", label=f"frozen: {part}")
    if found.warmup:
        end = min(found.warmup, steps) / found.steps_per_epoch
        label = f"warm-up, {found.warmup:,} steps"
        axes.axvspan(0, end, color="#fde293", alpha=0.6, linewidth=0, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.set_xlim(0, max(1, steps) / found.steps_per_epoch)
    axes.set_ylim(bottom=0)
    per_epoch = found.steps_per_epoch
    functions: Any = (lambda x: x * per_epoch, lambda x: x / per_epoch)
    above = axes.secondary_xaxis("top", functions=functions)
    above.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.3)
