"""The report of a benchmark: facts about the machine, a table, a CSV file and a chart."""

import csv
import dataclasses
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REFERENCE = "torch"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a printed table.

    Attributes:
      field: the field of the rows that it shows.
      heading: its heading.
      form: the format specification of its values; "" for text, which is aligned to the left.
    """

    field: str
    heading: str
    form: str = ""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a chart: its length is the median, and a line spans `least` to `most`."""

    label: str
    median: float
    least: float
    most: float


# The columns of the rows of `rates`, and the memory that a benchmark adds to them.
RATES = (
    Column("way", "way"),
    Column("images_per_second", "images/s", ".1f"),
    Column("min", "min", ".1f"),
    Column("max", "max", ".1f"),
    Column("ms_per_step", "ms/step", ".2f"),
    Column("peak_mib", "MiB", ".0f"),
    Column("times_torch", "times torch", ".2f"),
    Column("ours_over_it", "ours/it", ".2f"),
)


def machine() -> dict[str, Any]:
    """Returns the facts about this machine and this code that matter for the figures."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(": ")[1] for line in lines if line.startswith("model name")), model
        )
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+changes", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "machine": f"{model}, {os.cpu_count()} virtual cores",
        "load": f"{os.getloadavg()[0]:.2f}",  # average over the last minute
        "commit": commit,
        "python": platform.python_version(),
    }


def rates(seconds: Mapping[str, Sequence[float]], batch: int) -> list[dict[str, Any]]:
    """Returns a row for each way.

    "times_torch" is the row's images per second divided by torch's, "ours_over_it" is ours divided
    by the row's. Both are ratios of medians; None where the other way was not measured.

    Args:
      seconds: the duration of one step in each round, by way.
      batch: the number of images of a step.
    """
    median = {way: statistics.median(values) for way, values in seconds.items()}
    return [
        {
            "way": way,
            "images_per_second": batch / median[way],
            "min": batch / max(values),
            "max": batch / min(values),
            "ms_per_step": 1000 * median[way],
            "times_torch": median[REFERENCE] / median[way] if REFERENCE in median else None,
            "ours_over_it": median[way] / median["ours"] if "ours" in median else None,
        }
        for way, values in seconds.items()
    ]


def last_line(complaints: str, status: int) -> str:
    """Returns the last line of a failed process's output; its exit status where it is empty."""
    lines = complaints.strip().splitlines() or [f"exit status {status}"]
    return lines[-1]


def listed_versions(versions: Mapping[str, str]) -> str:
    """Returns {"jax": "0.10.2", "torch": "2.13.0"} as "jax 0.10.2 torch 2.13.0"."""
    return " ".join(f"{name} {version}" for name, version in versions.items())


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """Prints a table: text is aligned left, numbers right, and None leaves a cell empty."""
    cells = [
        [
            "" if row[column.field] is None else format(row[column.field], column.form)
            for row in rows
        ]
        for column in columns
    ]
    widths = [
        max(map(len, [column.heading, *texts]))
        for column, texts in zip(columns, cells, strict=True)
    ]
    headings = [column.heading for column in columns]
    for line in [headings, *zip(*cells, strict=True)]:
        fields = [
            f"{text:{'>' if column.form else '<'}{width}}"
            for text, column, width in zip(line, columns, widths, strict=True)
        ]
        print("  ".join(fields).rstrip())


def write(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    comparison: Sequence[str] = (),
) -> list[dict[str, str]]:
    """Writes the rows as CSV, with the facts repeated in each row.

    Args:
      path: a file that may exist.
      rows: all have the same fields; floats are written with four digits.
      facts: further fields, of the machine and the run.
      comparison: the fields in which rows agree that were compared with one another. Rows of the
        file whose comparison is not among the new rows stay. By default all rows are replaced.

    Returns:
      The rows of the file after writing, as text.
    """
    new = [{name: _text(value) for name, value in {**row, **facts}.items()} for row in rows]
    measured = {tuple(row[field] for field in comparison) for row in new}
    kept = [
        row
        for row in (read(path) if comparison and path.exists() else [])
        if tuple(row.get(field) for field in comparison) not in measured
    ]
    names = dict.fromkeys(name for row in new + kept for name in row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
    print(f"written: {path}")
    return kept + new


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(path: Path, panels: Mapping[str, Sequence[Bar]], note: str, columns: int = 1) -> None:
    """Draws panels of bars; the bars of ours are dark.

    Args:
      path: the picture's file.
      panels: the bars of each panel by its title; the first bar is at the top.
      note: a line at the bottom.
      columns: the number of panels beside one another.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    titles = list(panels)
    rows = [titles[start : start + columns] for start in range(0, len(titles), columns)]
    heights = [max(len(panels[title]) for title in row) for row in rows]
    figure, axes = pyplot.subplots(
        len(rows),
        columns,
        figsize=(8 if columns == 1 else 6 * columns, 1 + 0.3 * sum(heights) + 0.3 * len(rows)),
        height_ratios=heights,
        squeeze=False,
    )
    for axis in axes.flat[len(titles) :]:
        axis.set_axis_off()
    for title, axis in zip(titles, axes.flat, strict=False):
        bars = panels[title][::-1]
        drawn = axis.barh(
            [bar.label for bar in bars],
            [bar.median for bar in bars],
            xerr=(
                [bar.median - bar.least for bar in bars],
                [bar.most - bar.median for bar in bars],
            ),
            color=["C0" if bar.label.startswith("ours") else "lightgrey" for bar in bars],
        )
        axis.bar_label(drawn, [f"{bar.median:.4g}" for bar in bars], padding=3, fontsize=8)
        axis.margins(x=0.12)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.005, note, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"written: {path}")
