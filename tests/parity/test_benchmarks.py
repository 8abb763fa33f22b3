"""Benchmarks of our network beside torch's."""

import argparse

import pytest

from benchmarks import cpu, export, gpu, report, startup


@pytest.mark.slow
def test_ways_on_a_cpu_are_compared_measured_and_written(tmp_path, capsys):
    path = tmp_path / "cpu.csv"
    # The loss after a step of 8 small images depends on rounding in its third digit.
    small = ["--image-size=64", "--batch=8", "--rounds=1", "--seconds=0.01", "--tolerance=0.02"]
    few = ["--ways=ours,torch", "--allocator=default", "--cores=1", f"--output={path}"]
    assert cpu.main([*small, *few]) == 0
    printed = capsys.readouterr().out
    assert "inference, batch 8 at 64 pixels, 1 core, allocator default" in printed
    rows = report.read(path)
    assert [(row["task"], row["way"]) for row in rows] == [
        ("inference", "ours"),
        ("inference", "torch"),
        ("training", "ours"),
        ("training", "torch"),
    ]
    for row in rows:
        assert float(row["images_per_second"]) > 0
        # A process with jax or torch and 14 MB of weights; torch's CUDA build holds more.
        assert 100 < float(row["peak_mib"]) < 5000
    assert "torchvision" in rows[0]["versions"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_network_is_measured_for_the_gpu_benchmark(monkeypatch):
    # Where others work, too, torch's threads wait for one another for seconds.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = argparse.Namespace(device="cpu", image_size=32, rounds=1, seconds=0.01)
    job = {"task": "inference", "batch": 2, "dtype": "float32"}
    # That XLA knows the options, too: it ends a process that has one which it does not.
    ways = [*gpu.FLAGS, "torch"]
    rows, versions = gpu.compare(ways, None, options, **job)
    assert [row["way"] for row in rows] == ways
    assert {"jax", "torch"} <= set(versions)


def test_commands_are_timed_and_written(tmp_path, monkeypatch, capsys):
    quick = {("python", ""): ["-c", "pass"], ("python", "warm"): ["-c", "import os"]}
    monkeypatch.setattr(startup, "commands", lambda folder, image_size: quick)
    path = tmp_path / "startup.csv"
    assert startup.main(["--rounds=3", f"--output={path}"]) == 0
    assert "python  warm" in capsys.readouterr().out
    rows = report.read(path)
    assert [(row["what"], row["cache"]) for row in rows] == [("python", ""), ("python", "warm")]
    for row in rows:
        assert 0 < float(row["min"]) <= float(row["seconds"]) <= float(row["max"])
        assert float(row["cpu_seconds"]) > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_files_are_measured_beside_torchs(check_data, tmp_path, capsys):
    path = tmp_path / "export.csv"
    given = [f"--weights={check_data / 'weights' / 'mm_mobilenet_v2.pth'}", f"--output={path}"]
    given += [f"--photos={check_data / 'data' / 'imagenet_val20'}", "--turns=1"]
    ways = ["ours-onnx", "torch-onnx", "torch-openvino", "ours-litert-int8", "ours-jax"]
    assert export.main([*given, f"--ways={','.join(ways)}"]) == 0
    assert "same class, %" in capsys.readouterr().out
    rows = {(row["way"], row["threads"]): row for row in report.read(path)}
    assert {way for way, _ in rows} == set(ways)
    assert ("ours-jax", "1") not in rows  # which leaves its threads to XLA
    for (way, _), row in rows.items():
        assert 0 < float(row["min"]) <= float(row["ms"]) <= float(row["max"])
        # Of 10 photos; 8 bits may move one of them.
        assert float(row["agreement"]) >= (90 if way == "ours-litert-int8" else 100)
    assert 3.5 < float(rows["ours-litert-int8", "1"]["megabytes"]) < 4.5
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_wrong_arguments_of_the_export_benchmark_are_explained(capsys):
    given = ["--weights=w.pth", "--photos=photos"]
    assert export.main([*given, "--turns=0"]) == 2
    assert export.main([*given, "--ways=ours-onx"]) == 2
    printed = capsys.readouterr().err
    assert "--turns=0: give 1 or more" in printed
    assert "--ways: unknown 'ours-onx'; did you mean 'ours-onnx'" in printed
