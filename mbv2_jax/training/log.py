"""The log of a run: a progress bar, metrics.jsonl, TensorBoard events and curves.png."""

import collections
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import tqdm

from mbv2_jax.errors import RunFailed
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.spec import is_number
from mbv2_jax.storage import atomic
from mbv2_jax.storage.mirror import Mirror
from mbv2_jax.tasks.task import Task
from mbv2_jax.training.input_wait import REPORTED_ABOVE, InputWait, remedy
from mbv2_jax.training.plan import Plan

T = TypeVar("T")

# Metrics are read this many steps late, when they are computed, so that the device never waits.
LAG = 2
CURVES_INTERVAL = 60.0  # seconds between two drawings of curves.png
# Waiting for input is reported when two lines in a row show it, since a single wait, while workers
# start or a disk is slow, is no reason to change a config; and again after this many lines.
REPORT_AGAIN = 20


class RunLog:
    """The log of one run.

    Only the first process writes; every process checks that the loss is finite. A context manager.

    Args:
      run: the plan; metrics.jsonl, tensorboard/ and curves.png go into its workdir.
      start: the step to continue from. Lines of later steps, by a process that died before its
        next checkpoint, are dropped: these steps will be logged again.
      still_ours: a function that raises RunFailed if the workdir is another run's by now.
    """

    def __init__(self, run: Plan, start: int, still_ours: Callable[[], None] = lambda: None):
        self._run = run
        self._pending: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self._writes = jax.process_index() == 0
        self._input, self._slow_lines = InputWait(), 0
        self._remedy = remedy(run.settings.data)
        self._closed = False
        self._mark(start + 1)  # the rate counts from the end of the first step, which compiles
        self._drawn = time.monotonic()
        if not self._writes:
            return
        # Imported here, since it imports torch where that is installed, which takes seconds.
        import tensorboardX

        self._mirror = Mirror(run.workdir, still_ours)
        folder = self._folder = self._mirror.folder
        self._lines = _reopen(folder / "metrics.jsonl", start)
        self._board = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=start + 1 if start else None
        )
        self._bar = tqdm.tqdm(
            total=run.total_steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # A failure that is already under way matters more than one of closing.
        with contextlib.suppress(*[RunFailed] if kind else []):
            self.close()

    def close(self) -> None:
        """Closes the files and the bar; raises RunFailed if they cannot be written."""
        if self._closed:
            return
        self._closed = True
        self._input.close()
        if self._writes:
            self._lines.close()
            self._board.close()
            self._bar.close()
            self._mirror.close()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the batches of the steps, and measures the wait for each."""
        return self._input.batches(batches)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Queues the metrics of a step that was just started; reads those of a few steps ago.

        Raises:
          RunFailed: the loss or the gradient of a step was not finite.
        """
        self._input.started(metrics["loss"])
        self._pending.append((step, metrics))
        while len(self._pending) > LAG:
            self._read_one()
        if self._writes:
            self._bar.update()

    def flush(self) -> None:
        """Waits for the metrics of every step so far, and writes them to disk.

        Raises:
          RunFailed: the loss or the gradient of a step was not finite.
        """
        while self._pending:
            self._read_one()
        if self._writes:
            # A checkpoint is saved next: the lines before it must outlive this process.
            self._lines.flush()
            os.fsync(self._lines.fileno())
            self._board.flush()
            self._mirror.copy()

    def evaluation(self, step: int, result: Mapping[str, float]) -> None:
        """Writes the result of an evaluation after `step`."""
        self._write(step, "eval", dict(result))
        text = _format_metrics(result, self._run.task.figures)
        self.say(f"epoch {self._epoch(step):.4g} (step {step}): evaluation  {text}")
        self._mark(step)  # the time of the evaluation does not count

    def say(self, text: str) -> None:
        """Prints a line for the user, above the bar."""
        if self._writes:
            self._bar.write(text, file=sys.stderr)
            sys.stderr.flush()

    def say_everywhere(self, text: str) -> None:
        """Prints a line about this process, above the bar if it has one."""
        if self._writes:
            self.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def draw(self, *, now: bool = False) -> None:
        """Draws curves.png from metrics.jsonl, at most once a minute unless `now`."""
        if self._writes and (now or time.monotonic() - self._drawn > CURVES_INTERVAL):
            self._lines.flush()
            draw_curves(self._folder, self._run.task)
            self._drawn = time.monotonic()

    def _epoch(self, step: int) -> float:
        return step / self._run.steps_per_epoch

    def _read_one(self) -> None:
        step, arrays = self._pending.popleft()
        metrics = {name: float(value) for name, value in arrays.items()}
        if step == self._since_step:
            self._mark(step)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise RunFailed(
                    f"{name} is {metrics[name]} at step {step}, "
                    f"learning rate {metrics['learning_rate']:.6g}"
                )
        if self._run.is_due(step, self._run.settings.log.every_steps):
            self._log_training(step, metrics)

    def _mark(self, step: int) -> None:
        """Begins a new interval for the rate and for the wait for input."""
        self._since, self._since_step = time.monotonic(), step
        self._since_waited = self._input.seconds

    def _log_training(self, step: int, metrics: dict[str, float]) -> None:
        text, left = f"loss {metrics['loss']:.4f}", ""
        if figures := _format_metrics(metrics, self._run.task.figures, with_loss=False):
            text += f"  {figures}"
        if step > self._since_step:
            speed, words, left = self._speed(step)
            metrics |= speed
            text += words
        self._mark(step)
        self._write(step, "train", metrics)
        if not self._writes:
            return
        self._bar.set_postfix_str(text, refresh=False)
        if self._bar.disable:  # not a terminal: print a line instead
            self.say(
                f"step {step}/{self._run.total_steps}  epoch {self._epoch(step):.2f}  "
                f"lr {metrics['learning_rate']:.5g}  {text}" + (f"  {left} left" if left else "")
            )

    def _speed(self, step: int) -> tuple[dict[str, float], str, str]:
        """Returns the figures of the steps since the last mark, their text, and the time left."""
        batch_size = self._run.settings.run.batch_size
        elapsed = max(time.monotonic() - self._since, 1e-9)
        steps = step - self._since_step
        rate, milliseconds = steps * batch_size / elapsed, 1000 * elapsed / steps
        wait = min(100.0, 100 * (self._input.seconds - self._since_waited) / elapsed)
        figures = {
            "images_per_second": round(rate, 1),
            "step_ms": round(milliseconds, 2),
            "input_wait": round(wait, 1),
        }
        text = f"  {milliseconds:,.4g} ms/step  {rate:,.0f} images/s"
        if wait > REPORTED_ABOVE:
            text += f"  waits for input {wait:.0f} %"
        peak = mesh_lib.peak_memory()
        if peak is not None:
            figures["hbm_peak_gib"] = round(peak / 2**30, 3)
            text += f"  HBM {peak / 2**30:.3g} GiB"
        self._report_wait(wait, steps)
        left = tqdm.tqdm.format_interval((self._run.total_steps - step) * batch_size / rate)
        return figures, text, left

    def _report_wait(self, wait: float, steps: int) -> None:
        """Reports that the devices waited for `wait` percent of the time, if that persists."""
        self._slow_lines = self._slow_lines + 1 if wait > REPORTED_ABOVE else 0
        if self._slow_lines % REPORT_AGAIN == 2:
            self.say(
                f"the devices waited for input {wait:.0f} % of the last {steps} steps. To change "
                f"that: {self._remedy}. `python -m mbv2_jax.data browse` with this config measures "
                "the input alone"
            )

    def _write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        epoch = round(self._epoch(step), 4)
        self._lines.write(
            json.dumps({"step": step, "epoch": epoch, "split": split, **values}) + "\n"
        )
        for name, value in values.items():
            if is_number(value):  # a task's result may hold others, such as a list
                self._board.add_scalar(f"{split}/{name}", value, step)
        self._mirror.copy_in_background()


def read_lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a workdir's metrics.jsonl; none where there is no such file."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _reopen(path: pathlib.Path, start: int) -> Any:
    """Opens metrics.jsonl to append, without the lines after step `start`."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    # A line without an end was cut short by a kill, after the newest checkpoint.
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= start]
    atomic.write_bytes(path, b"".join(kept))
    return path.open("a", buffering=1)  # a line at a time, for those who follow the file


def _format_metrics(
    metrics: Mapping[str, Any], figures: Sequence[str], *, with_loss: bool = True
) -> str:
    """Returns those of a task's figures that are among the metrics, and the loss, as text."""
    words = [f"{name} {metrics[name]:.2f}" for name in figures if name in metrics]
    if with_loss and "loss" in metrics:
        words.append(f"loss {metrics['loss']:.4f}")
    return "  ".join(words)


def draw_curves(workdir: pathlib.Path, task: Task) -> None:
    """Draws loss, first figure and learning rate over epochs: metrics.jsonl -> curves.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    lines = read_lines(workdir)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    headline = task.figures[0]
    panels = [
        ("loss", task.labels.get("loss", "loss")),
        (headline, task.labels.get(headline, headline)),
        ("learning_rate", "learning rate"),
    ]
    for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for split, style in (("train", {"alpha": 0.6}), ("eval", {"marker": "o", "ms": 3})):
            points = [
                (line["epoch"], line[key])
                for line in lines
                if line["split"] == split and key in line
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=split, **style)
        if key == "loss":
            axes.set_yscale("log")  # otherwise the first evaluations hide the rest
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if key != "learning_rate" and axes.lines:
            axes.legend()
    with atomic.open_file(workdir / "curves.png", "wb") as file:
        figure.savefig(file, dpi=110, format="png")
