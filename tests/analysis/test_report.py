"""`python -m mbv2_jax.analysis report`: its figures against scikit-learn's, files and refusals."""

import csv
import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image
from sklearn import metrics

from mbv2_jax import drawing, model_dir
from mbv2_jax.analysis import calibration, confusion, model_commands, report
from mbv2_jax.command_line import load_config
from mbv2_jax.errors import UserError
from mbv2_jax.runtime import processes
from mbv2_jax.tasks.classification.task import Classification
from mbv2_jax.tasks.task import Classified
from mbv2_jax.training import evaluation
from tests.support import tiny_model

FILES = {
    "classes.csv",
    "confusion.csv",
    "confusion.png",
    "calibration.png",
    "mistakes.csv",
    "mistakes.png",
    "uncertain.png",
}


def draws(classes: int, examples: int, seed: int = 0) -> Classified:
    """Returns random predictions, of which about half are right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, examples)
    others = rng.integers(0, classes, examples)
    predicted = np.where(rng.random(examples) < 0.5, labels, others)
    return Classified(labels, predicted, rng.uniform(0.2, 1, examples))


@pytest.mark.parametrize(("classes", "examples"), [(2, 50), (7, 300), (1000, 400)])
def test_figures_of_classes_are_scikit_learns(classes, examples):
    found = draws(classes, examples)
    counts = confusion.matrix(found, classes)
    expected = metrics.confusion_matrix(found.labels, found.predicted, labels=range(classes))
    np.testing.assert_array_equal(counts, expected)
    figures = confusion.per_class(counts)
    labels = np.unique(np.concatenate([found.labels, found.predicted]))
    np.testing.assert_array_equal(figures.labels, labels)
    theirs = metrics.precision_recall_fscore_support(
        found.labels, found.predicted, labels=labels, zero_division=0
    )
    for ours, values in zip(figures[1:5], theirs, strict=True):
        np.testing.assert_allclose(ours, values, rtol=1e-12)
    # The last line is the mean weighted by support.
    *_, precision, recall, f1, support = confusion.table(figures, [""] * classes).split()
    means = metrics.precision_recall_fscore_support(
        found.labels, found.predicted, average="weighted", zero_division=0
    )[:3]
    assert [precision, recall, f1] == [f"{mean:.2%}" for mean in means]
    assert support == f"{examples}"


def test_most_frequent_confusions_come_first():
    counts = np.array([[5, 2, 0], [3, 9, 0], [2, 0, 0]])
    pairs = [tuple(pair) for pair in confusion.confused(counts)]
    # Of the two with 2 images, the one that is all of its class is first.
    assert pairs == [(1, 0, 3, 12), (2, 0, 2, 2), (0, 1, 2, 7)]


def test_calibration_error_worked_out_by_hand():
    # Bins of 1/15: 0.2 is the upper end of the third, 0.21 in the fourth, 1.0 in the last.
    scores = np.array([0.2, 0.21, 0.22, 1.0])
    found = Classified(np.zeros(4, int), np.array([0, 1, 0, 0]), scores)
    bins = calibration.reliability(found)
    assert np.flatnonzero(bins.counts).tolist() == [2, 3, 14]
    np.testing.assert_allclose(bins.accuracy[[2, 3, 14]], [1, 0.5, 1])
    np.testing.assert_allclose(bins.confidence[[2, 3, 14]], [0.2, 0.215, 1])
    # (|1 - 0.2| * 1 + |0.5 - 0.215| * 2 + 0 * 1) / 4
    assert bins.error == pytest.approx((0.8 + 2 * 0.285) / 4)


def test_a_calibrated_model_has_no_error():
    scores = np.full(100, 0.75)
    found = Classified(np.zeros(100, int), np.arange(100) % 4 // 3, scores)
    assert calibration.reliability(found).error == pytest.approx(0)


@pytest.mark.parametrize("classes", [1, 2, 30, 31, 1000])
def test_confusions_of_any_number_of_classes_are_drawn(classes):
    names = [f"クラス {i} with a long name, and a synonym" for i in range(classes)]
    figure = confusion.draw(confusion.matrix(draws(classes, 300), classes), names, "title")
    drawn, _ = figure.axes
    assert 1 <= len(drawn.get_xticks()) <= confusion.DRAWN
    shown = drawn.images[0].get_array()
    assert shown is not None and shown.max() > 0  # it says something


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The tiny model, and val/ with four photos of each of its classes."""
    folder = tmp_path_factory.mktemp("report")
    tiny_model.write(folder / "model")
    for label, name in enumerate(tiny_model.CLASSES):
        (folder / "photos" / "val" / name).mkdir(parents=True)
        for i in range(4):
            tiny_model.photo(4 * label + i).save(folder / "photos" / "val" / name / f"{i}.png")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder):
    def run(*arguments: str) -> list[str]:
        given = [
            f"--checkpoint={folder / 'model'}",
            "--config=finetune_folder",
            f"--config.data.source=folder:{folder / 'photos'}",
            "--config.batch_size=8",
        ]
        monkeypatch.setattr(sys, "argv", ["analysis", "report", *given, *arguments])
        model_commands.main()
        return capsys.readouterr().out.splitlines()

    return run


def table(path: pathlib.Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_report_has_the_numbers_of_an_evaluation(run, folder, tmp_path):
    lines = run(f"--out={tmp_path / 'new' / 'report'}", "--count=3")
    out = tmp_path / "new" / "report"
    assert {path.name for path in out.iterdir()} == FILES
    config = load_config("finetune_folder")
    config.data.source = f"folder:{folder / 'photos'}"
    config.batch_size = 8
    expected, _ = evaluation.evaluate(
        config, str(folder / "model"), {}, processes.single(), out=str(tmp_path / "rows.jsonl")
    )
    result = json.loads(lines[-1])
    assert {name: result[name] for name in expected} == expected

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    labels = [row["label"] for row in rows]
    best = [row["predictions"][0] for row in rows]
    predicted = [entry["label"] for entry in best]
    matrix = [[int(number) for number in row[1:]] for row in table(out / "confusion.csv")[1:]]
    assert matrix == metrics.confusion_matrix(labels, predicted, labels=range(6)).tolist()
    f1 = metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    assert result["f1"] == pytest.approx(100 * f1)
    # All mistakes, the most confident first.
    pairs = zip(best, rows, strict=True)
    wrong = [(e["score"], row["image"]) for e, row in pairs if e["label"] != row["label"]]
    listed = table(out / "mistakes.csv")[1:]
    assert [row[0] for row in listed] == [image for _, image in sorted(wrong, reverse=True)]
    header, first = table(out / "classes.csv")[:2]
    assert first[header.index("class")] == "cat" and first[header.index("support")] == "4"
    for name in FILES:
        if name.endswith(".png"):
            assert Image.open(out / name).width > 300


def test_an_existing_report_is_kept(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="has files in it already"):
        run(f"--out={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_no_folder(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        run(f"--out={tmp_path / 'file'}")


def test_count_is_checked(run, tmp_path):
    with pytest.raises(UserError, match="--count=0: give 1 to 1000"):
        run(f"--out={tmp_path / 'report'}", "--count=0")


def test_a_backbone_alone_is_refused(run, tmp_path):
    arrays = tiny_model.variables()
    params = {name: part for name, part in arrays["params"].items() if name != "classifier"}
    spec = dataclasses.replace(tiny_model.SPEC, head=None)
    description = dataclasses.replace(tiny_model.DESCRIPTION, spec=spec, classes=())
    model_dir.write(tmp_path / "backbone", params, arrays["batch_stats"], description)
    with pytest.raises(UserError, match="has no head, only features"):
        run(f"--checkpoint={tmp_path / 'backbone'}", f"--out={tmp_path / 'report'}")
    assert not (tmp_path / "report").exists()


def test_a_task_without_classes_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "classifies", False)
    with pytest.raises(UserError, match="gives an image no class"):
        run(f"--out={tmp_path / 'report'}")
    assert not (tmp_path / "report").exists()


def test_without_mistakes_there_is_no_grid_of_them(run, tmp_path, monkeypatch):
    def all_right(self, rows):
        return Classified(rows["label"], rows["label"], rows["scores"][:, 0])

    monkeypatch.setattr(Classification, "classified", all_right)
    run(f"--out={tmp_path / 'report'}")
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES - {"mistakes.png"}
    assert len(table(tmp_path / "report" / "mistakes.csv")) == 1


def test_letters_that_dejavu_lacks_come_from_another_font(monkeypatch):
    usual = drawing.font_file("Grüße, Ελλάδα, Москва")
    assert usual.name == "DejaVuSans.ttf"
    monkeypatch.setattr(drawing, "_font_with", None)  # not asked: a line break is no letter
    assert drawing.font_file("Grüße\nund mehr") == usual
    other = usual.with_name("DejaVuSerif.ttf")
    monkeypatch.setattr(
        drawing, "_font_with", lambda letters: other if ord("猫") in letters else None
    )
    assert drawing.font_file("猫 cat") == other
    assert drawing.font_file("犬") == usual  # no font has it: boxes


def test_letters_that_no_font_has_are_reported_once(monkeypatch, capsys):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    drawing._font_with.cache_clear()
    drawing._say_missing.cache_clear()
    for name in ("猫", "犬"):
        assert drawing.font_file(name).name == "DejaVuSans.ttf"
    assert capsys.readouterr().err.count("no font of this machine") == 1
    drawing._font_with.cache_clear()


def test_examples_carry_their_classes_in_colour():
    found = Classified(np.array([0, 1]), np.array([0, 0]), np.array([0.9, 0.75]))
    source = type("Source", (), {"describe": lambda self, index: f"folder/{index}.png"})()
    shown = report.Examples(found, ("n01440764", "dog"), source, None)  # type: ignore[arg-type]
    right, wrong = shown._label(0), shown._label(1)
    assert right[0] == ("90.0% tench", drawing.RIGHT)
    assert wrong[:2] == [("75.0% tench", drawing.WRONG), ("is dog", drawing.INK)]
    assert wrong[2][0] == "1.png"
