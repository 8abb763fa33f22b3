"""The benchmarks run, and what they work out of their measurements is right."""

import csv
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_peers, input_pipeline
from benchmarks.input_pipeline import Run

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the benchmark pins processes to cores, and reads /proc"
)


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for level in range(3):
            image = Image.fromarray(np.full((16, 20, 3), level, np.uint8))
            image.save(tmp_path / "photos" / name / f"{level}.jpg")
    return tmp_path / "photos"


def test_the_comparison_is_measured_and_written(photos, tmp_path, monkeypatch, capsys):
    # Of all ways the one that starts fastest; the peers and TensorFlow may be absent.
    monkeypatch.setattr(input_pipeline, "plan", lambda peers, cores: [Run("ours-exact", 1, 0)])
    path = tmp_path / "rates.csv"
    arguments = [f"--photos={photos}", "--rounds=1", "--seconds=0.05", f"--output={path}"]
    assert input_pipeline.main(arguments) == 0
    printed = capsys.readouterr()
    assert "ours-exact, threads" in printed.out
    assert "left out, for want of --tensorflow-python: tf; tf-antialias" in printed.err
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["way"] == "ours-exact, threads"
    assert float(row["median"]) > 0
    assert (row["photos"], row["exact"], row["scaling"]) == ("6", "1", "1")
    assert "pillow" in row["versions"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_wrong_arguments_are_explained(tmp_path, capsys):
    assert input_pipeline.main([f"--photos={tmp_path / 'none'}"]) == 2
    assert "error: no folder" in capsys.readouterr().err
    assert input_pipeline.main([f"--photos={tmp_path}", "--peers=torch-uint"]) == 2
    assert "did you mean 'torch-uint8'?" in capsys.readouterr().err


def test_each_way_is_measured_on_one_core_and_on_all():
    runs = input_pipeline.plan(["ours-fast", "torch-uint8", "tf"], 4)
    assert [run.label for run in runs if run.cores == 1] == [
        "ours-fast, threads",
        "ours-fast, 1 worker",
        "torch-uint8, in the main process",
        "torch-uint8, 1 worker",
        "tf, 1 thread",
    ]
    assert [run.label for run in runs if run.cores == 4] == [
        "ours-fast, threads",
        "ours-fast, 4 workers",
        "torch-uint8, 3 workers",
        "torch-uint8, 4 workers",
        "tf, 4 threads",
    ]


def test_ratios_are_of_the_medians_of_the_better_setting():
    rates = {
        Run("ours-exact", 1, 0): [300.0, 500.0, 290.0],
        Run("ours-exact", 1, 1): [200.0, 210.0, 220.0],
        Run("torch-uint8", 1, 0): [100.0, 90.0, 150.0],
        Run("ours-exact", 4, 4): [1000.0, 1080.0, 1090.0],
        Run("torch-uint8", 4, 4): [400.0, 270.0, 240.0],
    }
    rows = input_pipeline.table(rates)
    assert [row["median"] for row in rows] == [300, 210, 100, 1080, 270]
    assert [row["exact"] for row in rows] == pytest.approx([1, 300 / 210, 3, 1, 4])
    assert [row["fast"] for row in rows] == [None] * 5
    # 4 cores of 300 would be 1200; 4 of 100 would be 400.
    assert [row["scaling"] for row in rows] == pytest.approx([1, 0.7, 1, 0.9, 0.675])


def test_the_rate_is_that_of_the_steady_state(monkeypatch):
    """What lay ready does not count, nor that batches come in bursts of four."""
    clock = 0.0

    def batches():
        nonlocal clock
        for number in itertools.count():
            if number >= 20 and number % 4 == 0:
                clock += 2.0  # four batches of 64 in two seconds
            yield np.zeros(64)

    monkeypatch.setattr("time.perf_counter", lambda: clock)
    # A line through 100 seconds of steps of 256 images; the steps leave about 1 %.
    assert input_peers.images_per_second(batches(), 100) == pytest.approx(128, rel=0.02)


# In a process of its own: that of the tests may give memory back meanwhile.
GROWN = """
import subprocess, sys
from benchmarks import input_pipeline

holds = "import sys; held = b'1' * (100 << 20); print('ready', flush=True); sys.stdin.read()"
middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {holds!r}])"
before = input_pipeline.tree_mebibytes()
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
with subprocess.Popen([sys.executable, "-c", middle], **pipes) as process:
    assert process.stdout.readline() == b"ready\\n"
    print(input_pipeline.tree_mebibytes() - before)
    process.communicate()
"""


def test_memory_counts_processes_below():
    measured = subprocess.run(
        [sys.executable, "-c", GROWN], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    grown = float(measured.stdout)
    # 100 MiB, and two Python interpreters of some 10.
    assert 100 < grown < 150
