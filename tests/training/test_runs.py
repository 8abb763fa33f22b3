"""The files that a run writes, and the runs that start from them, through the real commands."""

import gzip
import json
import os
import pathlib
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from mbv2_jax import model_dir
from tests.support import commands, short_network


def last_line(out: str) -> dict[str, float]:
    return json.loads(out.splitlines()[-1])


def test_keeps_the_last_checkpoints_and_the_best(unbroken):
    workdir, _ = unbroken
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    scored = [line for line in commands.metrics(workdir) if line["split"] == "eval"]
    best = min(scored, key=lambda line: line["loss"])["step"]
    assert kept == {45, 60, best}


def test_log_has_every_step_asked_for_once(unbroken):
    workdir, line = unbroken
    lines = commands.metrics(workdir)
    train = [line["step"] for line in lines if line["split"] == "train"]
    scored = [line for line in lines if line["split"] == "eval"]
    assert train == list(range(3, 61, 3))
    assert [line["step"] for line in scored] == [15, 30, 45, 60]
    final = json.loads(line)
    assert final["examples"] == 360
    assert {name: scored[-1][name] for name in final} == final


def test_tensorboard_holds_what_metrics_jsonl_holds(unbroken):
    workdir, _ = unbroken
    (path,) = (workdir / "tensorboard").iterdir()  # one file for each start
    content, seen = path.read_bytes(), {}
    while content:  # TFRecord: length, CRC, data, CRC
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[12 + length + 4 :]
        for value in event.summary.value:
            seen[value.tag, event.step] = value.simple_value
    for line in commands.metrics(workdir):
        for name in ("loss", "top1"):
            stored = np.float32(line[name])  # events are float32
            assert seen[f"{line['split']}/{name}", line["step"]] == stored


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="nothing is set up elsewhere than on Linux")
def test_takes_a_device_for_each_core_of_a_cpu(tiny, cache, unbroken, tmp_path):
    """Compares with the run of the other tests, on one device."""
    expected, run = unbroken[0], tmp_path / "run"
    free = {"XLA_FLAGS": commands.QUICKLY}
    status, out, err = commands.run(cache, *tiny(run), "--config.num_epochs=0.2", env=free)
    assert status == 0, err
    most = min(len(os.sched_getaffinity(0)), 6)  # 48 images, 8 or more on each
    devices = max(n for n in range(1, most + 1) if 48 % n == 0)
    assert (f"training on {devices} devices" in err) == (devices > 1)
    # test_train_step.py compares the sums in float64. In float32, after three steps that normalise
    # so few values, their order shows in the third digit.
    ours, theirs = commands.metrics(run), commands.metrics(expected)
    assert [line["step"] for line in ours] == [3, 6, 6]  # the last of the evaluation
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=0.02)
    assert last_line(out)["examples"] == 360


@pytest.mark.slow
def test_chosen_steps_are_traced_and_the_run_is_the_same(tiny, cache, unbroken, tmp_path):
    whole, workdir = unbroken[0], tmp_path / "run"
    status, _, err = commands.run(cache, *tiny(workdir), "--config.profile=33:34")
    assert status == 0, err
    folder = workdir / "profile" / "plugins" / "profile" / "steps_33-34"
    assert f"trace of steps 33 to 34: {folder}." in err
    (planes,) = folder.glob("*_0.xplane.pb")
    assert b"train_step" in planes.read_bytes()
    (events,) = folder.glob("*_0.trace.json.gz")
    named = json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in named if event.get("name") == "train"}
    assert steps == {"33", "34"}
    assert commands.metrics(workdir) == commands.metrics(whole)
    ours, theirs = (commands.arrays(run / "model" / "arrays") for run in (workdir, whole))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_curves_are_a_picture_with_curves_in_it(unbroken):
    workdir, _ = unbroken
    with Image.open(workdir / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red, blue = pixels[..., 0], pixels[..., 2]
    assert pixels.shape[1] > 800
    assert ((red > 200) & (blue < 100)).sum() > 100  # evaluation: orange
    assert (blue > red + 40).sum() > 100  # training: blue


def test_evaluation_does_not_depend_on_batch_or_devices(tiny, cache, unbroken):
    workdir, line = unbroken
    expected = json.loads(line)
    arguments = [*tiny(workdir), "--mode=eval", "--config.data.workers=0"]
    for batch, devices in ((7, 1), (64, 4)):
        status, out, err = commands.run(
            cache, *arguments, f"--config.batch_size={batch}", devices=devices
        )
        assert status == 0, err
        result = last_line(out)
        for name in ("top1", "top5", "examples"):
            assert result[name] == expected[name]
        # float32 sums in another order
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_expected_result_is_compared(tiny, cache, unbroken):
    workdir, line = unbroken
    top1, top5 = json.loads(line)["top1"], json.loads(line)["top5"]
    arguments = [*tiny(workdir), "--mode=eval"]
    status, out, err = commands.run(cache, *arguments, f"--expect={top1:.2f},{top5:.2f}")
    assert status == 0, err
    status, out, err = commands.run(cache, *arguments, f"--expect={top1:.2f},{top5 - 0.1:.2f}")
    assert status == 1
    comparison, result = out.splitlines()[-2:]
    assert comparison == f"top5: expected {top5 - 0.1:.2f}, got {top5:.2f}, difference +0.10"
    assert json.loads(result) == json.loads(line)
    assert "not within 0.05" in err


def test_model_json_decides_unless_overridden_aloud(tiny, cache, unbroken):
    workdir, line = unbroken
    # Evaluation ignores the model section of another recipe.
    config = tiny(workdir)[0].replace("tiny.py", "other.py")
    path = pathlib.Path(config.removeprefix("--config="))
    path.write_text(
        commands.TINY.replace("width = 0.1", "width = 1.0").replace(
            "image_size = 16", "image_size = 40"
        )
    )
    arguments = [config, *tiny(workdir)[1:], "--mode=eval"]
    status, out, err = commands.run(cache, *arguments)
    assert status == 0, err
    assert last_line(out) == json.loads(line)
    assert "instead of" not in err
    status, _, err = commands.run(cache, *arguments, "--config.model.width=0.5")
    assert status == 2
    assert "model.width is 0.5" in err and "trained with 0.1" in err
    status, out, err = commands.run(cache, *arguments, "--config.data.image_size=24")
    assert status == 0, err
    assert "data.image_size: 24 instead of the checkpoint's 16" in err
    assert last_line(out) != json.loads(line)


def test_loss_that_is_not_finite_stops_the_run(tiny, cache, tmp_path):
    workdir = tmp_path / "run"
    status, _, err = commands.run(cache, *tiny(workdir), "--config.num_epochs=0.2")
    assert status == 0, err
    status, _, err = commands.run(cache, *tiny(workdir), "--config.schedule.base_lr=1e30")
    assert status == 1
    assert "changed since step 6: schedule.base_lr: 0.1 -> 1e+30" in err
    message = err.splitlines()[-1]
    assert message.startswith("failed: ") and "Traceback" not in err
    assert "at step 8" in message  # step 7 made the parameters infinite
    assert "learning rate" in message and "e+2" in message
    assert message.endswith(f"last good checkpoint: {workdir / 'checkpoints' / '6'}")


def test_config_that_changes_the_shapes_is_refused(tiny, cache, unbroken):
    workdir, _ = unbroken
    kept = [path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    status, _, err = commands.run(cache, *tiny(workdir), "--config.model.width=0.35")
    assert status == 2
    assert "model.width: 0.1 -> 0.35" in err.splitlines()[-1]
    assert "another --workdir" in err.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in kept} == before


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three colours, which are easily learned."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (24, 30, 3), np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    return folder


def test_fine_tuning_on_a_folder(cache, unbroken, photos, tmp_path):
    source, _ = unbroken
    workdir = tmp_path / "tuned"
    arguments = [
        "--config=configs/finetune_folder.py",
        f"--config.data.source=folder:{photos}",
        f"--workdir={workdir}",
        f"--checkpoint={source}",
        "--config.model.frozen_stages=2",
        # With frozen statistics these photos of one colour leave whole layers without a gradient.
        "--config.model.norm_eval=false",
        "--config.batch_size=12",
        "--config.num_epochs=3",
    ]
    status, out, err = commands.run(cache, *arguments, "--config.model.padding=same")
    assert status == 2
    assert "model.padding is same, the checkpoint's is torch" in err
    assert "--config.model.padding=torch" in err
    assert not workdir.exists()

    status, out, err = commands.run(cache, *arguments)
    assert status == 0, err
    assert "new classifier" in err
    assert last_line(out)["examples"] == 15
    with short_network.in_use():
        before, after = model_dir.read(source), model_dir.read(workdir)
    assert after.classes == ("blue", "green", "red")
    assert after.spec.backbone.width == 0.1 and after.spec.preprocessing.image_size == 16
    assert after.params["classifier"]["kernel"].shape == (32, 3)
    for name, part in before.params.items():
        if name == "classifier":
            continue
        frozen = name == "stem" or name[:6] in ("layer1", "layer2")
        pairs = zip(_leaves(part), _leaves(after.params[name]), strict=True)
        same = [np.array_equal(old, new) for old, new in pairs]
        assert all(same) if frozen else not any(same), name

    # The same run on other classes would continue under wrong names.
    (photos / "train" / "red").rename(photos / "train" / "crimson")
    (photos / "val" / "red").rename(photos / "val" / "crimson")
    status, _, err = commands.run(cache, *arguments)
    assert status == 2
    assert "other classes (crimson, red differ)" in err
    status, _, err = commands.run(cache, *arguments[:3], "--mode=eval", "--config.batch_size=5")
    assert status == 2
    assert f"has no class 'crimson', which is one of folder:{photos}" in err

    # Additional photos are reported, and a finished run is reported as finished.
    for split in ("train", "val"):
        (photos / split / "crimson").rename(photos / split / "red")
    more = photos / "train" / "red" / "more.jpg"
    more.write_bytes((photos / "train" / "red" / "0.jpg").read_bytes())
    status, _, err = commands.run(cache, *arguments[:-1], "--config.num_epochs=1")
    assert status == 0, err
    assert "training examples: 36 -> 37" in err
    assert "already finished (step 9 of 4): nothing to train" in err
    assert "--checkpoint is not read" in err


def test_a_folder_without_splits_is_split_and_its_held_out_part_is_evaluated(
    cache, unbroken, tmp_path
):
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "plain" / name).mkdir(parents=True)
        for i in range(15):
            pixels = rng.integers(0, 80, (24, 30, 3), np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "plain" / name / f"{i}.jpg")
    arguments = [
        "--config=configs/probe.py",
        f"--config.data.source=folder:{tmp_path / 'plain'}",
        "--config.batch_size=12",
        f"--workdir={tmp_path / 'run'}",
    ]
    status, out, err = commands.run(cache, *arguments, f"--checkpoint={unbroken[0]}:last")
    assert status == 0, err
    note = f"{tmp_path / 'plain'} has classes and no splits: 36 of its 45 images are for training"
    assert err.count(note) == 1
    result = last_line(out)
    assert result["examples"] == 9
    status, out, err = commands.run(cache, *arguments, "--mode=eval")
    assert (status, last_line(out)) == (0, result), err
    assert note in err
    arguments.append("--config.data.eval_split=all")
    status, out, err = commands.run(cache, *arguments, "--mode=eval")
    assert (status, last_line(out)["examples"]) == (0, 45), err
    assert note not in err


def test_one_checkpoint_of_a_run_can_be_evaluated(tiny, cache, unbroken):
    workdir, _ = unbroken
    scored = {line["step"]: line for line in commands.metrics(workdir) if line["split"] == "eval"}
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    step = min(kept & scored.keys())  # the best, or the last if that is the best
    checkpoint = f"--checkpoint={workdir / 'checkpoints' / str(step)}"
    status, out, err = commands.run(cache, *tiny(workdir), "--mode=eval", checkpoint)
    assert status == 0, err
    assert {name: scored[step][name] for name in last_line(out)} == last_line(out)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the digits' steps per epoch and classes, so that nothing is compiled again."""
    folder = tmp_path_factory.mktemp("damaged")
    pixels = np.random.default_rng(0).integers(0, 256, (1420, 8, 8, 3), np.uint8)
    for number, image in enumerate(pixels):
        split = "train" if number < 1400 else "val"
        (folder / split / f"{number % 10}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / split / f"{number % 10}" / f"{number}.jpg")
    train = folder / "train" / "3"
    whole = (train / "13.jpg").read_bytes()
    (train / "truncated.jpg").write_bytes(whole[:-40])
    (train / "zero.jpg").write_bytes(b"")
    (train / "text.png").write_text("no image")
    Image.fromarray(pixels[0]).convert("CMYK").save(train / "cmyk.jpg")  # this one is readable
    return folder


def test_unreadable_images_are_skipped_aloud_or_stop_the_run(
    tiny, cache, unbroken, damaged, tmp_path
):
    workdir, bad = tmp_path / "run", damaged / "train" / "3"
    arguments = [
        *tiny(workdir),
        f"--config.data.source=folder:{damaged}",
        "--config.data.eval_split=val",
        "--config.checkpoint.every_steps=60",
        "--config.log.eval_every_epochs=2",
    ]
    names = {str(bad / name) for name in ("truncated.jpg", "zero.jpg", "text.png")}
    status, _, err = commands.run(cache, *arguments)
    assert status == 2
    message = err.splitlines()[-1]
    assert any(message.startswith(f"error: {name}: cannot decode the image (") for name in names)
    assert "Traceback" not in err

    status, out, err = commands.run(cache, *arguments, "--config.data.corrupt=skip")
    assert status == 0, err
    assert last_line(out)["examples"] == 20
    said = [line.removeprefix("skipping ") for line in err.splitlines() if "skipping" in line]
    reasons = dict(line.split(": ", 1) for line in said)
    assert len(said) == 3 and reasons.keys() == names  # once each, in spite of two epochs
    assert "truncated" in reasons[str(bad / "truncated.jpg")]
    assert "0 bytes" in reasons[str(bad / "zero.jpg")]
    assert "not the bytes of an image" in reasons[str(bad / "text.png")]
    first = said[0].split(": ")[0]
    assert f"unreadable images skipped: 3; the first: {first}" in err
    counts = [line["skipped"] for line in commands.metrics(workdir) if line["split"] == "train"]
    assert counts == sorted(counts) and counts[-1] == 3

    # An evaluation that left images out would be of another dataset.
    (damaged / "val" / "3" / "zero.jpg").write_bytes(b"")
    status, out, err = commands.run(cache, *arguments, "--config.data.corrupt=skip", "--mode=eval")
    assert (status, out) == (2, "")
    assert f"error: {damaged}/val/3/zero.jpg: cannot decode the image (0 bytes)" in err


def _leaves(tree):
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from _leaves(tree[key])
        else:
            yield np.asarray(tree[key])
