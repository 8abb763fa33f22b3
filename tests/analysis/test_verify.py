"""`python -m mbv2_jax.data verify`: counts, bad records, comparison with ImageNet, --help."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from mbv2_jax.analysis import data_commands
from mbv2_jax.data import classes, sources
from mbv2_jax.errors import RunFailed, UserError
from tests.support import REPOSITORY
from tests.support.boxed import annotation, voc_object, write_coco, write_voc, write_yolo
from tests.support.coded import CodedSource
from tests.support.masked import write_classes, write_image, write_mask, write_pair


def photo(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "JPEG")
    return file.getvalue()


def make_folder(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def verify(monkeypatch, capsys):
    """Runs the command; returns its error, the lines that it printed, and the last one's JSON."""

    def run(*arguments: str) -> tuple[Exception | None, list[str], dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["data", "verify", *arguments])
        raised = None
        try:
            data_commands.main()
        except (RunFailed, UserError) as error:
            raised = error
        lines = capsys.readouterr().out.splitlines()
        return raised, lines, json.loads(lines[-1]) if lines else {}

    return run


def test_every_bad_file_is_named_with_what_is_wrong(verify, tmp_path):
    whole = photo((200, 150))
    folder = make_folder(
        tmp_path,
        {
            "train/a/good.jpg": whole,
            "train/a/truncated.jpg": whole[: len(whole) // 2],
            "train/a/zero.jpg": b"",
            "train/b/text.png": b"not an image",
            "train/b/cmyk.jpg": photo(mode="CMYK"),  # which is fine
            "val/a/1.jpg": whole,
            "val/b/1.jpg": whole,
        },
    )
    arguments = ["--config=finetune_folder", f"--config.data.source=folder:{folder}"]
    error, lines, result = verify(*arguments)
    assert isinstance(error, RunFailed)
    assert "train: 3 of 5 images are bad" in str(error)
    bad = {line.split(": ")[1]: line for line in lines if line.startswith("bad: ")}
    assert {os.path.relpath(path, folder) for path in bad} == {
        "train/a/truncated.jpg",
        "train/a/zero.jpg",
        "train/b/text.png",
    }
    assert "truncated" in bad[str(folder / "train/a/truncated.jpg")]
    assert "0 bytes" in bad[str(folder / "train/a/zero.jpg")]
    train = {"split": "train", "examples": 5, "expected": None, "classes": 2}
    val = {"split": "val", "examples": 2, "expected": None, "classes": 2}
    assert result == {
        "ok": False,
        "splits": [train | {"decoded": 2, "bad": 3}, val | {"decoded": 2, "bad": 0}],
    }

    error, lines, result = verify(*arguments, "--split=eval")
    assert error is None
    assert not any(line.startswith("bad") for line in lines)
    assert result == {"ok": True, "splits": [val | {"decoded": 2, "bad": 0}]}


def test_every_mistake_in_pictures_and_masks_is_named(verify, tmp_path):
    """A missing mask, sizes that differ, and a number that is no class, in one folder."""
    folder = write_classes(tmp_path / "mine", "road", "sky")
    for name in ("a", "b", "c", "d", "e"):
        write_pair(folder / "train", name, [[0, 1, 1], [0, 0, 255]])
    write_pair(folder / "val", "v", [[0, 1, 1], [0, 0, 0]])
    images, masks = folder / "train/images", folder / "train/masks"
    (masks / "b.png").unlink()
    write_mask(masks / "c.png", [[0, 1], [0, 1], [0, 1]])
    write_mask(masks / "d.png", [[0, 1, 1], [0, 0, 7]])
    write_mask(masks / "left.png", [[0]])
    arguments = ["--config=finetune_segmentation", f"--config.data.source=pairs:{folder}"]
    error, lines, result = verify(*arguments)
    assert isinstance(error, RunFailed)
    assert "train: 4 of 6 images are bad" in str(error)
    assert [line for line in lines if line.startswith("bad")] == [
        f"bad: {images}/b.png: there is no mask {masks}/b.png",
        f"bad: {masks}/left.png: there is no picture of this name in {images}",
        f"bad: {images}/c.png: the image is 3 x 2 pixels, upright, and its mask 2 x 3: both must "
        "have the same size",
        f"bad: {images}/d.png: the mask {masks}/d.png holds 7, and there are classes 0 to 1; 255 "
        "marks pixels that do not count",
    ]
    assert "train: pixels by class: road 50.0 %, sky 33.3 %; 16.7 % do not count" in lines
    train, val = result["splits"]
    assert not result["ok"]
    assert (train["decoded"], train["bad"], val["bad"]) == (2, 4, 0)
    assert (train["pixels"], train["ignored"]) == ({"road": 6, "sky": 4}, 2)
    error, _, result = verify(*arguments, "--split=eval", "--workers=1")
    assert error is None and result["ok"]
    assert result["splits"][0]["pixels"] == {"road": 4, "sky": 2}


def test_missing_masks_of_voc_are_named(verify, tmp_path):
    year = tmp_path / "VOC2012"
    for name in "ab":
        write_image(year / "JPEGImages" / f"{name}.jpg", (3, 2))
    write_mask(year / "SegmentationClass/a.png", [[0, 20, 20], [0, 0, 21]])
    (year / "ImageSets/Segmentation").mkdir(parents=True)
    (year / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    source = f"--config.data.source=voc:{tmp_path}"
    error, lines, result = verify("--config=finetune_segmentation", source, "--split=eval")
    assert isinstance(error, RunFailed)
    masks = year / "SegmentationClass"
    assert [line for line in lines if line.startswith("bad")] == [
        f"bad: {masks}/b.png is missing",
        f"bad: {year}/JPEGImages/a.jpg: the mask {masks}/a.png holds 21, and there are classes 0 "
        "to 20; 255 marks pixels that do not count",
    ]
    assert result["splits"][0]["bad"] == 2


def test_digits_are_whole_in_threads_and_processes(verify, tmp_path):
    arguments = ["--config=digits", f"--config.data.data_dir={tmp_path}"]
    for workers in (0, 1):
        error, _, result = verify(*arguments, f"--workers={workers}")
        assert error is None and result["ok"]
        # scikit-learn's 1,797
        assert [split["decoded"] for split in result["splits"]] == [1437, 360]


def test_a_sample_is_drawn_at_random_and_again_the_same(verify, monkeypatch):
    class Noted(CodedSource):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(sources, "open_source", lambda *_, **__: Noted(5000))
    arguments = ["--config=digits", "--split=train", "--sample=300"]
    drawn = []
    for seed in (0, 0, 1):
        seen: list[int] = []
        error, _, result = verify(*arguments, f"--config.seed={seed}")
        assert error is None and result["splits"][0]["decoded"] == 300
        drawn.append(sorted(seen))
    assert len(set(drawn[0])) == 300
    assert drawn[0] == drawn[1] != drawn[2]
    assert 1000 < np.mean(drawn[0]) < 4000  # from all over the split; 2500 +- 83 is expected


def test_labels_that_are_no_class_are_bad(verify, monkeypatch):
    class Mislabelled(CodedSource):
        def __getitem__(self, index):
            label = {3: -1, 7: 10}.get(index, index % 10)
            return dataclasses.replace(super().__getitem__(index), targets={"label": label})

    monkeypatch.setattr(sources, "open_source", lambda *_, **__: Mislabelled(100))
    error, lines, result = verify("--config=digits", "--split=train")
    assert isinstance(error, RunFailed)
    assert lines[1:3] == [
        "bad: coded/3.png: its label is -1, and there are classes 0 to 9",
        "bad: coded/7.png: its label is 10, and there are classes 0 to 9",
    ]
    assert result["splits"][0]["bad"] == 2


def test_a_copy_of_imagenet_is_compared_with_it(verify, tmp_path):
    image = photo((8, 8))
    wnids = [*classes.IMAGENET_WNIDS[2:], "n00000001"]  # tench and goldfish are missing
    folder = make_folder(tmp_path, {f"val/{wnid}/1.JPEG": image for wnid in wnids})
    source = f"--config.data.source=folder:{folder}"
    error, lines, result = verify("--config=finetune_folder", source, "--split=eval")
    assert isinstance(error, RunFailed)
    assert lines[0] == "val: 999 examples of 999 classes; ImageNet has 50,000 of 1,000"
    first = sorted(wnids)[:5]
    few = "; ".join(f"{wnid} has 1" for wnid in first)
    assert lines[1:-1] == [
        "val: 999 examples, not 50,000: 49,001 missing",
        "val: 999 classes, not 1,000",
        "val: classes that are missing: n01440764 (tench, Tinca tinca); "
        "n01443537 (goldfish, Carassius auratus)",
        "val: folders that are not a class of ImageNet: n00000001",
        f"val: classes without 50 sound images: {few}; and 994 more",
    ]
    assert result["splits"][0]["expected"] == 50_000

    # A part of the split may be of any size, and without some of the classes.
    part = "--config.data.eval_split=val[:10]"
    error, _, result = verify("--config=finetune_folder", source, part, "--split=eval")
    assert error is None
    assert (result["splits"][0]["examples"], result["splits"][0]["expected"]) == (10, None)


def test_a_choice_of_imagenets_classes_is_a_copy_only_where_all_are_wanted(verify, tmp_path):
    image = photo((8, 8))
    names = [*classes.IMAGENET_WNIDS[:19], "zebra"]
    folder = make_folder(tmp_path, {f"val/{name}/1.JPEG": image for name in names})
    source = f"--config.data.source=folder:{folder}"
    # A dataset of its own.
    for arguments in (["--config=finetune_folder"], ["--config=cifar10"]):
        error, lines, result = verify(
            *arguments, source, "--config.data.eval_split=val", "--split=eval"
        )
        assert error is None and result["splits"][0]["expected"] is None
        assert lines[0] == "val: 20 examples of 20 classes; 19 of ImageNet's 1,000 classes"
    # An interrupted download.
    error, lines, result = verify("--config=mobilenet_v2_8xb32_in1k", source, "--split=eval")
    assert isinstance(error, RunFailed) and result["splits"][0]["expected"] == 50_000
    assert "validation: 20 examples, not 50,000: 49,980 missing" in lines
    assert any(line.startswith("validation: classes that are missing: ") for line in lines)
    # Other data with a few folders of such names.
    for number in range(3):
        make_folder(folder, {f"val/other{number}/1.JPEG": image})
    error, _, result = verify("--config=mobilenet_v2_8xb32_in1k", source, "--split=eval")
    assert error is None and result["splits"][0]["expected"] is None


def test_splits_that_training_refuses_together_are_faults(verify, tmp_path):
    image = photo((8, 8))
    folder = make_folder(
        tmp_path, {f"{name}/1.jpg": image for name in ("train/a", "train/b", "val/a", "val/c")}
    )
    arguments = ["--config=finetune_folder", f"--config.data.source=folder:{folder}"]
    error, lines, result = verify(*arguments)
    assert isinstance(error, RunFailed) and not result["ok"]
    assert lines[0] == "the classes of 'train' and 'val' differ; in only one of them: b, c"
    assert verify(*arguments, "--split=train")[0] is None
    for split in ("train", "train[:50%]"):
        error, lines, result = verify(*arguments, f"--config.data.eval_split={split}")
        assert isinstance(error, RunFailed) and not result["ok"]
        assert lines[0].startswith(f"'train' and '{split}' hold the same images, or some of them")
    parts = ["--config.data.train_split=train[50%:]", "--config.data.eval_split=train[:50%]"]
    assert verify(*arguments, *parts)[0] is None


def test_the_whole_of_imagenet_has_nothing_to_say(verify, monkeypatch):
    class Whole(CodedSource):
        class_names = tuple(f"n{i:08}" for i in range(1000))

    monkeypatch.setattr(sources, "open_source", lambda *_, **__: Whole(1_281_167))
    arguments = ["--config=mobilenet_v2_8xb32_in1k", "--split=train", "--sample=10"]
    error, lines, result = verify(*arguments)
    assert error is None
    assert lines[0].endswith("1,281,167 examples of 1,000 classes; ImageNet has 1,281,167 of 1,000")
    assert result["splits"][0]["expected"] == 1_281_167
    # A part of a split may be of any size.
    error, _, result = verify(*arguments, "--config.data.train_split=train[10000:]")
    assert error is None and result["splits"][0]["expected"] is None


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config=NAME is missing"]),
        (["--config=digit"], ["'digit'", "did you mean 'digits'"]),
        (["--config=digits", "--sample=0"], ["--sample=0", "1 image or more"]),
        (["--config=digits", "--workers=-1"], ["--workers=-1"]),
        (["--config=digits", "--sample=few"], ["sample", "few"]),
        (["--config=digits", "--split=test"], ["split", "train|eval|both"]),
        (["--config=digits", "--config.data.sourc=x"], ["data.source"]),
        (["--config=digits", "--config.data.source=folder:/no/where"], ["/no/where"]),
        (["--config=digits", "all"], ["'all'"]),
        (["--config=digits", "--config.data.train_transforms=resise(8)"], ["'resise'"]),
        (["--config=digits", "--config.data.eval_transforms=resise(8)"], ["'resise'"]),
        (["--config=digits", "--config.data.eval_transforms=random_crop(8)"], ["is random"]),
    ],
)
def test_mistakes_are_one_line(verify, arguments, parts):
    error, lines, _ = verify(*arguments)
    assert isinstance(error, UserError) and lines == []
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_the_command_teaches_without_jax():
    script = (
        "import runpy, sys\n"
        "sys.argv = ['data', *sys.argv[1:]]\n"
        "try:\n"
        "    runpy.run_module('mbv2_jax.data', run_name='__main__')\n"
        "finally:\n"
        "    assert 'jax' not in sys.modules\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )

    for arguments in (["--help"], ["verify", "--help"], ["browse", "--help"]):
        process = run(*arguments)
        assert process.returncode == 0, process.stderr
        assert "python -m mbv2_jax.data verify --config=" in process.stdout
    assert "--seconds" in process.stdout and "--sample=" in process.stdout
    process = run()
    assert process.returncode == 2
    assert "python -m mbv2_jax.data verify --config=" in process.stderr
    assert process.stderr.splitlines()[-1] == "error: a command is missing: verify or browse"
    process = run("verfy")
    assert process.returncode == 2 and "did you mean 'verify'" in process.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_ends_it_at_once(tmp_path, workers):
    image = photo((1000, 1000))
    make_folder(tmp_path, {"train/a/0.jpg": b"", "train/a/1.jpg": image})
    for number in range(2, 5000):  # enough work to interrupt
        os.link(tmp_path / "train/a/1.jpg", tmp_path / f"train/a/{number}.jpg")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mbv2_jax.data", "verify", "--config=finetune_folder"),
            *(f"--config.data.source=folder:{tmp_path}", "--split=train", f"--workers={workers}"),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A job in the background starts with SIGINT ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.readline()  # the summary
    assert process.stdout.readline().startswith(f"bad: {tmp_path}/train/a/0.jpg: ")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""


def detection_config(folder: pathlib.Path) -> str:
    """Writes a config of object detection, and returns the flag that names it."""
    (folder / "config.py").write_text(
        "from mbv2_jax.configs import default\n"
        "def get_config():\n"
        "    config = default.get_config('detection')\n"
        "    config.data.train_transforms = 'resize(size)'\n"
        "    config.data.eval_transforms = 'resize(size)'\n"
        "    return config\n"
    )
    return f"--config={folder}/config.py"


def test_boxes_are_counted_by_class_and_bad_ones_named(verify, tmp_path):
    (tmp_path / "data.yaml").write_text("names: [cat, dog]")
    lines = {"a": "0 .5 .5 .2 .2\n1 .5 .5 .2 .2\n0 .5 .5 0 .2", "b": "0 .1 .1 .1 .1", "c": None}
    for split, chosen in (("train", lines), ("val", {"d": "1 .5 .5 1 1"})):
        write_yolo(tmp_path / "images" / split, tmp_path / "labels" / split, chosen)
    (tmp_path / "labels/train/e.txt").write_text("0 .5 .5 1 1")
    config = detection_config(tmp_path)
    error, said, result = verify(config, f"--config.data.source=yolo:{tmp_path}")
    assert isinstance(error, RunFailed)
    assert "train: 1 of 4 images are bad" in str(error)
    assert "train: 1 of 4 boxes are bad" in str(error)
    assert f"bad: {tmp_path}/labels/train/a.txt: line 3: its box is 0 x 0.2" in said
    assert f"bad: {tmp_path}/labels/train/e.txt: there is no picture of this name" in said
    assert "train: 3 boxes: cat 66.7 %, dog 33.3 %" in said
    train, val = result["splits"]
    assert (train["boxes"], train["bad_boxes"]) == ({"cat": 2, "dog": 1}, 1)
    assert (val["boxes"], val["bad_boxes"], val["bad"]) == ({"cat": 0, "dog": 1}, 0, 0)
    assert (train["decoded"], train["bad"]) == (3, 1)


def test_sound_boxes_are_no_fault(verify, tmp_path):
    objects = [voc_object("dog", 1, 2, 11, 22, difficult=1), voc_object("cat", 1, 2, 11, 22)]
    write_voc(tmp_path, "train", {"a": objects})
    write_voc(tmp_path, "val", {"b": objects[1:]})
    config = detection_config(tmp_path)
    error, _, result = verify(config, f"--config.data.source=voc:{tmp_path}")
    assert error is None
    boxes = result["splits"][0]["boxes"]
    assert {name: count for name, count in boxes.items() if count} == {"cat": 1, "dog": 1}
    assert len(boxes) == 20


def test_pictures_of_another_size_than_their_boxes_are_bad(verify, tmp_path):
    """One is resized, and one is turned by EXIF, after both were labelled at 40 x 30."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    dog = voc_object("dog", 1, 2, 11, 22)
    write_voc(tmp_path / "voc", "train", {"a": [dog], "b": [dog], "c": [dog]})
    images = {1: "a.jpg", 2: "b.jpg", 3: "c.jpg"}
    objects = [annotation(number, number, 1, 1, 2, 10, 20) for number in images]
    file = tmp_path / "coco/annotations/instances_train.json"
    write_coco(file, tmp_path / "coco/train", images, objects, {1: "dog"})
    config = detection_config(tmp_path)
    for name, folder in (("voc", "voc/JPEGImages"), ("coco", "coco/train")):
        photos = tmp_path / folder
        Image.new("RGB", (80, 60)).save(photos / "a.jpg")
        Image.new("RGB", (40, 30)).save(photos / "b.jpg", exif=exif)
        source = f"--config.data.source={name}:{tmp_path / name}"
        error, said, result = verify(config, source, "--split=train")
        assert isinstance(error, RunFailed)
        why = "and the file of its boxes says 40 x 30: it was resized after labelling, or EXIF turn"
        assert [line[: line.find(why) + len(why)] for line in said if line.startswith("bad")] == [
            f"bad: {photos}/a.jpg: the image is 80 x 60 pixels, upright, {why}",
            f"bad: {photos}/b.jpg: the image is 30 x 40 pixels, upright, {why}",
        ]
        assert (result["splits"][0]["bad"], result["splits"][0]["decoded"]) == (2, 1)


def test_a_size_that_is_not_recorded_is_not_compared(verify, tmp_path):
    write_voc(tmp_path, "train", {"a": [voc_object("dog", 1, 2, 11, 22)]}, size=(50, 30))
    for size in ("", "<size><width>0</width><height>0</height></size>"):
        text = f"<annotation>{size}{voc_object('dog', 1, 2, 11, 22)}</annotation>"
        (tmp_path / "Annotations/a.xml").write_text(text)
        source = f"--config.data.source=voc:{tmp_path}"
        assert verify(detection_config(tmp_path), source, "--split=train")[0] is None


@pytest.mark.parametrize(
    ("config", "target"), [("finetune_folder", "label"), ("finetune_segmentation", "mask")]
)
def test_boxes_are_refused_where_other_targets_are_wanted(verify, tmp_path, config, target):
    (tmp_path / "data.yaml").write_text("names: [cat]")
    write_yolo(tmp_path / "images/train", tmp_path / "labels/train", {"a": "0 .5 .5 1 1"})
    write_coco(
        tmp_path / "annotations/instances_train.json",
        tmp_path / "train",
        {1: "a.jpg"},
        [annotation(1, 1, 1, 1, 2, 10, 20)],
        {1: "cat"},
    )
    for kind in ("yolo", "coco"):
        source = f"--config.data.source={kind}:{tmp_path}"
        error, lines, _ = verify(f"--config={config}", source, "--split=train")
        assert isinstance(error, UserError) and lines == []
        assert f"{kind}:{tmp_path} has boxes and no '{target}': it is for object det" in str(error)
