"""The benchmarks run, and compute their figures correctly."""

import csv
import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import (
    cpu,
    detection,
    gpu,
    gpu_peers,
    input_peers,
    input_pipeline,
    report,
    startup,
    transfer,
    transfer_sets,
)
from benchmarks.input_pipeline import Run
from mbv2_jax.errors import UserError
from tests.support import REPOSITORY

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
    assert "left out without --tensorflow-python: tf; tf-antialias" in printed.err
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
    """Ready batches do not count, and bursts of four batches make no difference."""
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


# It runs in a process of its own, since the tests' process may release memory meanwhile.
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
    # 100 MiB, and two Python interpreters of about 10 each.
    assert 100 < grown < 150


def test_ratios_to_torch_and_to_ours_are_of_the_medians():
    rows = report.rates({"ours": [0.5, 0.1, 0.2], "torch": [0.4, 0.8, 0.1]}, batch=32)
    # Medians of 64, 320, 160 and of 80, 40, 320 images per second.
    assert [row["images_per_second"] for row in rows] == pytest.approx([160, 80])
    assert [(row["min"], row["max"]) for row in rows] == [(64, 320), (40, 320)]
    assert [row["ms_per_step"] for row in rows] == pytest.approx([200, 400])
    assert [row["times_torch"] for row in rows] == pytest.approx([2, 1])
    assert [row["ours_over_it"] for row in rows] == pytest.approx([1, 2])


def test_what_computes_something_else_is_not_timed():
    logits = np.array([1.0, -2.0, 0.5])
    of_keras = {"keras": logits + 1, "ours-of-keras": logits + 1.001}
    agreeing = {"torch": logits, "ours": logits + 0.001, **of_keras}
    cpu.check_agreement("inference", agreeing, 1e-3)
    with pytest.raises(UserError, match=r"logits of ours and of torch differ by 0\.005 of"):
        cpu.check_agreement("inference", agreeing | {"ours": logits + 0.01}, 1e-3)
    with pytest.raises(UserError, match="logits of keras and of ours-of-keras differ"):
        cpu.check_agreement("inference", agreeing | {"keras": logits}, 1e-3)
    outputs = {"torch": np.array([7.0, 6.0]), "flax": np.array([7.0, np.nan])}
    with pytest.raises(UserError, match="losses of two training steps of flax and of torch"):
        cpu.check_agreement("training", outputs, 1e-3)


def test_a_comparison_replaces_itself_in_the_csv_and_no_other(tmp_path):
    path = tmp_path / "cpu.csv"

    def write(cores, way, rate):
        rows = [{"cores": cores, "way": way, "rate": rate}]
        report.write(path, rows, {"commit": f"c{rate:.0f}"}, comparison=("cores",))

    write(2, "ours", 10.0)
    write(4, "ours", 20.0)
    write(2, "torch", 30.0)
    rows = [(row["cores"], row["way"], row["rate"], row["commit"]) for row in report.read(path)]
    assert rows == [("4", "ours", "20", "c20"), ("2", "torch", "30", "c30")]


def test_wrong_arguments_of_the_cpu_benchmark_are_explained(capsys):
    assert cpu.main(["--ways=ours,keres"]) == 2
    assert "error: --ways: unknown 'keres'; did you mean 'keras'?" in capsys.readouterr().err
    assert cpu.main(["--cores=100000"]) == 2
    assert "error: --cores=100000: give 1 to " in capsys.readouterr().err
    assert cpu.main(["--batch=1,none"]) == 2
    assert "error: --batch=1,none: give numbers" in capsys.readouterr().err


def test_what_cannot_be_started_is_explained(tmp_path, monkeypatch, capsys):
    assert startup.main(["--image-size=100"]) == 2
    assert "error: --image-size=100: give one of 96, 128" in capsys.readouterr().err
    monkeypatch.setattr(startup, "write_inputs", lambda *_: None)  # they need torch
    monkeypatch.setattr(startup, "commands", lambda *_: {("it", ""): ["-c", "import nothing"]})
    assert startup.main([f"--output={tmp_path / 'no.csv'}"]) == 2
    assert "No module named 'nothing'" in capsys.readouterr().err


@pytest.mark.slow
def test_depthwise_lowerings_are_measured_and_written(tmp_path, monkeypatch, capsys):
    whole = gpu_peers.depthwise_layers
    # One of the 17 layers, once forward: all take minutes.
    monkeypatch.setattr(gpu_peers, "depthwise_layers", lambda size: whole(size)[:1])
    monkeypatch.setattr(gpu, "DIRECTIONS", ("kernel-gradient",))
    path = tmp_path / "gpu.csv"
    small = ["--device=cpu", "--image-size=32", "--batch=2", "--rounds=1", "--seconds=0.01"]
    assert gpu.main([*small, "--parts=depthwise", f"--output={path}"]) == 0
    assert "kernel-gradient 16x16x32/1, batch 2, bfloat16" in capsys.readouterr().out
    rows = report.read(path)
    assert [row["way"] for row in rows] == ["convolution", "shifted-sums", "triton"]
    assert all(float(row["images_per_second"]) > 0 and float(row["share"]) > 0 for row in rows)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_its_benchmark_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as if there were none
    path = tmp_path / "gpu.csv"
    assert gpu.main([f"--output={path}"]) == 2
    assert "error: jax finds no NVIDIA GPU: pip install" in capsys.readouterr().err
    assert not path.exists()


def test_the_share_of_the_bandwidth_is_of_what_has_to_be_moved():
    layers = gpu_peers.depthwise_layers(224)
    assert len(layers) == 17
    assert layers[0] == gpu_peers.Layer(channels=32, size=112, stride=1)
    assert layers[1] == gpu_peers.Layer(channels=96, size=112, stride=2)
    assert layers[-1] == gpu_peers.Layer(channels=960, size=7, stride=1)
    # 2 images of 96 channels at 2 bytes, 112 x 112 in and 56 x 56 out.
    assert gpu.layer_bytes(layers[1], 2, "bfloat16") == 2 * 96 * 2 * (12544 + 3136)
    assert gpu.shares(0.25, [1.0, 0.5, 2.0]) == {"share": 0.25}
    assert gpu.shares(None, [1.0]) == {"share": None}


def test_transfer_averages_over_seeds_and_then_over_sets():
    scores = {
        ("animals-40", "ours"): [70.0, 72.0, 74.0],
        ("animals-40", "probe"): [66.0, 66.0, 69.0],
        ("digits-100", "ours"): [98.0, 98.0, 98.0],
    }
    rows = [
        {"set": name, "way": way, "seed": str(seed), "top1": str(top1), "minutes": "2.5"}
        for (name, way), values in scores.items()
        for seed, top1 in enumerate(values)
    ]
    found = {(row["set"], row["way"]): row for row in transfer.table(rows)}
    assert found["animals-40", "ours"]["top1"] == 72.0
    # The standard error of the mean of 70, 72, 74: their deviation 2, divided by the root of 3.
    assert found["animals-40", "ours"]["error"] == pytest.approx(2 / 3**0.5)
    assert found["mean", "ours"]["top1"] == 85.0
    assert found["mean", "ours"]["error"] == pytest.approx(2 / 3**0.5 / 2)  # the other has none
    assert ("mean", "probe") not in found  # it was not measured on all sets


def test_transfer_sees_each_photo_equally_often(tmp_path):
    epochs = transfer_sets.SETS["animals-40"].epochs
    ours = transfer.command("ours", "animals-40", 1, tmp_path, tmp_path)
    assert "--config=finetune_folder" in ours and "--config.seed=1" in ours
    # The head is fitted in one pass of its own.
    assert f"--config.num_epochs={epochs - 1}" in ours
    theirs = transfer.command("timm", "animals-40", 1, tmp_path, tmp_path)
    assert f"--epochs={epochs}" in theirs and "--seed=1" in theirs
    live = transfer.command("ours-live", "animals-40", 1, tmp_path, tmp_path)
    assert [part for part in live if part not in ours] == ["--config.model.norm_eval=false"]


def test_the_parts_of_detection_are_shares(tmp_path, monkeypatch, capsys):
    seconds = {"network": [0.02, 0.04, 0.03], "detections": [0.003] * 3, "step": [2.0] * 3}
    monkeypatch.setattr(detection, "ways", lambda batch, size: {})
    monkeypatch.setattr(detection, "measure", lambda found, turns: seconds)
    path = tmp_path / "shares.csv"
    assert detection.main([f"--output={path}"]) == 0
    assert "10.0%" in capsys.readouterr().out  # 3 of the median's 30 ms
    with open(path, newline="") as file:
        network, detections, step = csv.DictReader(file)
    assert (float(network["ms"]), float(network["min"]), float(network["max"])) == (30, 20, 40)
    assert float(detections["share"]) == pytest.approx(0.1)
    assert (detections["batch"], step["batch"], step["share"]) == ("1", "8", "")
    assert detection.main(["--steps=0"]) == 2
    assert "--steps=0: give 1 or more" in capsys.readouterr().err
