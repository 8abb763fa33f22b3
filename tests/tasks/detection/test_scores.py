"""COCO's numbers beside pycocotools on files, VOC's by hand, --out, and data of fewer classes."""

import dataclasses
import json
import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mbv2_jax.data.sample import Boxes
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.tasks.detection import coco, objects, scores, voc
from mbv2_jax.tasks.detection.objects import Found
from mbv2_jax.tasks.detection.settings import Head
from mbv2_jax.tasks.detection.task import Detection
from mbv2_jax.tasks.task import Aligned
from tests.support import boxed, pycoco

CATEGORIES = {3: "cat", 7: "dog", 90: "eel"}
NAMES = tuple(CATEGORIES.values())
TASK = Detection(Head(len(NAMES)), NAMES)
SIZE = (200, 150)  # of the pictures
SUMS: Any = {"loss": np.float64(6), "positives": np.float64(4), "examples": 12}


def random_annotations(rng: np.random.Generator, **others: Any) -> list[dict]:
    """Returns objects of all sizes in pictures 1 to 12, a seventh of them crowds; none of an eel.

    Args:
      rng: for the objects.
      **others: members of every fifth object.
    """
    found = []
    for number in range(1, 61):
        sides = rng.uniform(8, 140, 2).round(2)
        place = (rng.uniform(0, 1, 2) * (SIZE - sides)).round(2)
        marked = {"iscrowd": int(number % 7 == 0), "area": float(0.7 * sides.prod())}
        marked |= others if number % 5 == 0 else {}
        image, category = int(rng.integers(1, 12)), int(rng.choice([3, 7]))
        found.append(boxed.annotation(number, image, category, *place, *sides, **marked))
    return found


def write_split(root: pathlib.Path, annotations: Sequence[dict]) -> pathlib.Path:
    """Writes pictures whose order is not that of their ids; returns the annotation file."""
    images = {number: f"{number}.png" for number in (5, 2, 9, 12, 1, 3, 11, 4, 8, 7, 6, 10)}
    file = root / "annotations" / "instances_val.json"
    boxed.write_coco(file, root / "val", images, annotations, CATEGORIES, SIZE)
    return file


def rows_near(source: Any, rng: np.random.Generator, room: int = 30) -> dict[str, np.ndarray]:
    """Returns rows of `Detection.evaluate`: boxes near the objects, and some anywhere.

    The images have 64 x 32 pixels, and show more than their pictures, as padded ones do.
    """
    rows = empty_rows(len(source), room)
    for index in range(len(source)):
        truth = source.boxes(index)
        count = int(rng.integers(0, room))
        corners = rng.uniform(0, 120, (count, 4)).round(1)
        corners[:, 2:] = corners[:, :2] + rng.uniform(5, 80, (count, 2))
        labels = rng.integers(0, len(source.class_names), count)
        near = min(count, 3 * len(truth))
        chosen = rng.integers(0, max(1, len(truth)), near)
        corners[:near] = truth.corners[chosen] + rng.normal(0, 4, (near, 4))
        labels[:near] = truth.labels[chosen]
        left, top, right, bottom = rows["frame"][index][:4]
        scale = [64 / (right - left), 32 / (bottom - top)]
        corners = (corners - np.array([left, top] * 2)) * np.array(scale * 2)
        # Few different scores: many detections have equal ones.
        scores = np.sort(rng.uniform(0.05, 1, count).round(1))[::-1]
        rows["boxes"][index, :count] = corners
        rows["scores"][index, :count] = scores
        rows["labels"][index, :count] = labels
    return rows


def empty_rows(examples: int, room: int = 1) -> dict[str, np.ndarray]:
    return {
        "boxes": np.zeros((examples, room, 4), np.float32),
        "scores": np.zeros((examples, room), np.float32),
        "labels": np.full((examples, room), -1, np.int32),
        "size": np.tile(np.array([32, 64], np.float32), (examples, 1)),
        "finite": np.ones(examples, bool),
        "frame": np.tile(np.array([-10, -20, 210, 170, 640, 640], np.float32), (examples, 1)),
    }


def numbers_of(
    rows: Mapping[str, np.ndarray], source: Any, truths: Sequence[Boxes] = ()
) -> np.ndarray:
    """Returns the twelve numbers; -1 for those without objects, as pycocotools has them."""
    indices = range(len(source))
    truths = truths or [source.boxes(index) for index in indices]
    found = [objects.found(rows, index) for index in indices]
    ids = [source.image_id(index) for index in indices]
    score = coco.score(truths, found, ids, len(source.class_names))
    assert list(score.numbers) == list(coco.NAMES)
    return np.nan_to_num(np.array(list(score.numbers.values())), nan=-1)


def read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


def write_results(path: pathlib.Path, rows: Mapping[str, np.ndarray], source: Any) -> pathlib.Path:
    path.write_text("".join(TASK.records(rows, source)))
    return path


# ---- COCO's numbers ----


@pytest.fixture
def split(tmp_path) -> tuple[pathlib.Path, Any, dict[str, np.ndarray]]:
    """The annotation file of a split, the split, and rows of detections in it."""
    rng = np.random.default_rng(0)
    file = write_split(tmp_path, random_annotations(rng))
    source = boxed.opened(f"coco:{tmp_path}", "val")
    return file, source, rows_near(source, rng)


def test_numbers_are_pycocotools_on_the_file_of_out(split, tmp_path):
    file, source, rows = split
    peer = pycoco.evaluated(file, write_results(tmp_path / "out.json", rows, source))
    assert 0.2 < peer.stats[0] < 0.8 and (peer.stats > 0).all()
    np.testing.assert_array_equal(numbers_of(rows, source), peer.stats)
    result, details = TASK.summarize(SUMS, rows, source)
    assert result == {
        "mAP": 100 * peer.stats[0],
        "mAP50": 100 * peer.stats[1],
        "mAP75": 100 * peer.stats[2],
        "loss": 1.5,
        "examples": 12,
    }
    lines = details.splitlines()
    assert [line.rsplit(maxsplit=1) for line in lines[:12]] == [
        [name, f"{100 * number:.2f}"] for name, number in zip(coco.NAMES, peer.stats, strict=True)
    ]
    # Of classes: the mean over the recalls of all sizes, with 100 detections of a picture.
    shares = peer.eval["precision"][..., 0, 2].mean(1)
    single = [each for each in read(file)["annotations"] if not each["iscrowd"]]
    counts = [sum(each["category_id"] == number for each in single) for number in CATEGORIES]
    assert [line.split() for line in lines[12:]] == [
        ["class", "AP", "AP50", "objects"],
        *(
            [name, f"{100 * shares[:, k].mean():.2f}", f"{100 * shares[0, k]:.2f}", str(counts[k])]
            for k, name in enumerate(("cat", "dog"))
        ),
        ["eel", "-", "-", "0"],
    ]


def test_numbers_of_coco_s_pictures_are_pycocotools(check_data, tmp_path):
    with tarfile.open(check_data / "data" / "coco_mini.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    source = boxed.opened(f"coco:{tmp_path / 'coco_mini'}", "val")
    truths = [source.boxes(index) for index in range(len(source))]
    assert sum(truth.crowd.sum() for truth in truths) > 0
    rows = rows_near(source, np.random.default_rng(0), 100)
    file = tmp_path / "coco_mini" / "annotations" / "instances_val2017.json"
    peer = pycoco.evaluated(file, write_results(tmp_path / "out.json", rows, source))
    assert ((peer.stats > 0.05) & (peer.stats < 0.95)).all()
    np.testing.assert_array_equal(numbers_of(rows, source), peer.stats)


def test_difficult_objects_are_ignored_as_those_outside_a_size_range_are(tmp_path):
    rng = np.random.default_rng(1)
    huge = 1e11  # pycocotools' ranges end at 1e10
    file = write_split(tmp_path, random_annotations(rng, area=huge))
    source = boxed.opened(f"coco:{tmp_path}", "val")
    rows = rows_near(source, rng)
    peer = pycoco.evaluated(file, write_results(tmp_path / "out.json", rows, source))
    truths = [source.boxes(index) for index in range(len(source))]
    marked = [
        dataclasses.replace(
            truth, difficult=truth.area == huge, area=np.where(truth.area == huge, 2000, truth.area)
        )
        for truth in truths
    ]
    assert sum(truth.difficult.sum() for truth in marked) == 12
    np.testing.assert_array_equal(numbers_of(rows, source, marked), peer.stats)
    plain = [dataclasses.replace(truth, difficult=truth.crowd) for truth in marked]
    assert (numbers_of(rows, source, plain)[:3] != peer.stats[:3]).all()


def test_without_detections_or_objects_figures_are_zero(split, tmp_path):
    _, source, rows = split
    none = empty_rows(len(source))
    result, details = TASK.summarize(SUMS, none, source)
    assert [result[name] for name in TASK.figures] == [0, 0, 0]
    assert [line.split()[-1] for line in details.splitlines()[:12]] == ["0.00"] * 12
    assert "".join(TASK.records(none, source)) == "[]\n"
    write_split(tmp_path / "bare", [])
    bare = boxed.opened(f"coco:{tmp_path / 'bare'}", "val")
    result, details = TASK.summarize(SUMS, rows, bare)
    assert [result[name] for name in TASK.figures] == [0, 0, 0]
    assert [line.split()[-1] for line in details.splitlines()[:12]] == ["-"] * 12
    json.dumps(result, allow_nan=False)


def test_a_person_who_waits_for_many_detections_is_told(split, monkeypatch, capfd):
    _, source, rows = split
    TASK.summarize(SUMS, rows, source)
    assert capfd.readouterr() == ("", "")  # pycocotools itself prints
    monkeypatch.setattr(scores, "_MANY", 10)
    TASK.summarize(SUMS, rows, source)
    count = sum(len(objects.found(rows, index).labels) for index in range(len(source)))
    assert capfd.readouterr() == ("", f"scoring {count} detections in 12 pictures\n")


def test_outputs_that_are_not_numbers_give_no_result(split):
    _, source, rows = split
    rows["finite"][3] = False
    with pytest.raises(RunFailed, match=r"outputs for .*12\.png are not numbers"):
        TASK.summarize(SUMS, rows, source)


# ---- VOC's ----


def boxes(*corners: Sequence[float], difficult: Sequence[int] = ()) -> Boxes:
    """Returns objects of class 0; `difficult` are the numbers of the difficult ones."""
    array = np.array(corners, np.float64).reshape(-1, 4)
    marked = np.isin(np.arange(len(array)), difficult)
    area = (array[:, 2:] - array[:, :2]).prod(1)
    return Boxes(array, np.zeros(len(array), np.int32), np.zeros(len(array), bool), marked, area)


def found(*detections: tuple[float, Sequence[float]]) -> Found:
    """Returns detections of class 0: a score and corners each."""
    return Found(
        np.array([corners for _, corners in detections], np.float32).reshape(-1, 4),
        np.array([score for score, _ in detections], np.float32),
        np.zeros(len(detections), np.int32),
    )


A, B, C, NOWHERE = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (0, 60, 10, 70)


def test_voc_s_average_precision_worked_out_by_hand():
    truths = [boxes(A, B), boxes(C)]
    detections = [
        # Half of A is an IoU of 0.5, which is enough; 4.9 of 10 is not. A is found once only.
        found((0.9, (0, 0, 10, 5)), (0.6, A), (0.3, B)),
        found((0.8, (40, 0, 50, 4.9)), (0.1, NOWHERE)),
    ]
    # Right, wrong, wrong, right, wrong: of three objects, one at precision 1, and one at 2 / 4.
    expected = (1 + 2 / 4) / 3
    np.testing.assert_allclose(voc.average_precision(truths, detections, 2), [expected, np.nan])


def test_precision_counts_at_its_best_at_any_larger_recall():
    truths = [boxes(A, B, C)]
    detections = [found((0.9, NOWHERE), (0.8, A), (0.7, B), (0.6, C))]
    np.testing.assert_allclose(voc.average_precision(truths, detections, 1), [3 / 4])


def test_difficult_objects_neither_count_nor_harm():
    truths = [boxes(A, B, difficult=[0])]
    detections = [found((0.9, A), (0.8, A), (0.7, B))]
    np.testing.assert_array_equal(voc.average_precision(truths, detections, 1), [1])
    only = [boxes(A, difficult=[0])]
    np.testing.assert_array_equal(voc.average_precision(only, detections, 1), [np.nan])


def test_classes_without_detections_have_zero():
    np.testing.assert_array_equal(voc.average_precision([boxes(A)], [found()], 1), [0])


def test_voc_s_figure_is_given_for_its_data(tmp_path):
    cat, difficult = boxed.voc_object("cat", 11, 11, 31, 31), ("cat", 51, 51, 91, 91)
    boxed.write_voc(
        tmp_path,
        "val",
        {"a": [cat, boxed.voc_object(*difficult, difficult=1)], "b": [cat]},
        size=(100, 100),
    )
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    source = boxed.opened(f"voc:{tmp_path}", "val")
    rows = empty_rows(2, 3) | {
        "size": np.full((2, 2), 100, np.float32),
        "frame": np.tile(np.array([0, 0, 100, 100, 100, 100], np.float32), (2, 1)),
    }
    # The difficult one first, then one that is right; in the second picture, one that is wrong.
    rows["boxes"][0, :2] = [(50, 50, 90, 90), (10, 10, 30, 30)]
    rows["boxes"][1, 0] = (10, 10, 30, 19)
    rows["scores"][0, :2], rows["scores"][1, 0] = (0.9, 0.8), 0.5
    rows["labels"][0, :2], rows["labels"][1, 0] = 0, 0
    result, details = Detection(Head(2), ("cat", "dog")).summarize(SUMS, rows, source)
    assert list(result) == ["mAP", "mAP50", "mAP75", "AP50", "loss", "examples"]
    assert result["AP50"] == 50
    # COCO's counts precision at 101 recalls, of which 51 are reached: 0 to 0.5.
    assert result["mAP"] == pytest.approx(100 * 51 / 101)
    assert [line.split() for line in details.splitlines()[12:]] == [
        ["VOC", "AP50", "50.00"],
        ["class", "AP", "AP50", "VOC", "AP50", "objects"],
        ["cat", "50.50", "50.50", "50.00", "2"],
        ["dog", "-", "-", "-", "0"],
    ]


# ---- The file of --out ----


def test_results_are_in_the_pictures_pixels_with_the_data_s_ids(tmp_path):
    write_split(tmp_path, [])
    source = boxed.opened(f"coco:{tmp_path}", "val")
    rows = empty_rows(len(source), 2)
    # The image of 64 x 32 shows 220 x 190 pixels, from (-10, -20) on, of a picture 150 high.
    rows["frame"][:, 5] = 150
    rows["boxes"][1, 0], rows["boxes"][3] = (16, 8, 32, 24), [(0, 0, 64, 32), (4, 4, 8, 8)]
    rows["scores"][1, 0], rows["scores"][3] = 0.1, (0.7, 0.6)
    rows["labels"][1, 0], rows["labels"][3] = 2, (0, 1)
    assert json.loads("".join(TASK.records(rows, source))) == [
        {"image_id": 2, "category_id": 90, "bbox": [45, 27.5, 55, 95], "score": np.float32(0.1)},
        {"image_id": 12, "category_id": 3, "bbox": [0, 0, 210, 150], "score": np.float32(0.7)},
        {
            "image_id": 12,
            "category_id": 7,
            "bbox": [3.75, 3.75, 13.75, 23.75],
            "score": np.float32(0.6),
        },
    ]


# ---- Data of fewer classes ----


def test_a_model_of_more_classes_is_scored_on_those_of_the_data(split, tmp_path):
    file, source, rows = split
    names = ("eel", "ape", "dog", "cat")  # the data: cat, dog, eel
    task = Detection(Head(4), names)
    aligned = task.align(source, "data", "model")
    assert (aligned.found, aligned.note) == (
        (3, 2, 0),
        "data: 3 of model's 4 classes, by name",
    )
    matched = objects.check(aligned.source)
    assert matched.class_names == names and matched.benchmark == "coco"
    assert list(matched.category_ids) == [90, None, 7, 3]
    table = np.array([3, 2, 0])
    for index in (0, 5):
        np.testing.assert_array_equal(
            matched.boxes(index).labels, table[source.boxes(index).labels]
        )
        of_sample, theirs = (each[index].targets["boxes"].labels for each in (matched, source))
        np.testing.assert_array_equal(of_sample, table[theirs])
        assert matched.image_id(index) == source.image_id(index)
        assert matched.describe(index) == source.describe(index)
    assert 0 < len(matched.without_empty(1)) < len(matched)
    # What the model calls a cat, and an ape in every second picture.
    named = rows | {"labels": np.where(rows["labels"] < 0, -1, table[rows["labels"]])}
    named["labels"][::2] = np.where(named["labels"][::2] == 0, 1, named["labels"][::2])
    out = tmp_path / "out.json"
    out.write_text("".join(task.records(named, matched)))
    labels = np.concatenate([objects.found(named, index).labels for index in range(len(matched))])
    assert 0 < len(read(out)) == (labels != 1).sum() < len(labels)
    peer = pycoco.evaluated(file, out)
    np.testing.assert_allclose(numbers_of(named, matched), peer.stats, rtol=1e-12)  # classes' order
    result, details = task.summarize(SUMS, named, matched)
    assert result["mAP"] == pytest.approx(100 * peer.stats[0], rel=1e-12)
    assert [line.split()[0] for line in details.splitlines()[13:]] == list(names)


def test_the_same_classes_need_no_other_source(split):
    _, source, _ = split
    assert TASK.align(source, "data", "model").source is source
    with pytest.raises(UserError, match="model has no class 'dog'"):
        Detection(Head(1), ("cat",)).align(source, "data", "model")


class Pictures:
    """A split whose figures are those of a benchmark; nothing else of it is read."""

    def __init__(self, benchmark: str):
        self.benchmark = benchmark


def test_published_figures_are_for_coco_s_80_classes():
    every = Aligned(Pictures("coco"), tuple(range(80)))
    assert TASK.unlike_published(every) == ""
    few = every._replace(found=(0, 2))
    assert TASK.unlike_published(few) == "they are for COCO's 80 classes, and the data has 2"
    other = every._replace(source=Pictures("voc"))
    assert TASK.unlike_published(other) == "they are for COCO, and the data is not"
