"""`python -m mbv2_jax.data browse`: the images of training, and the comparison of rates."""

import bisect
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mbv2_jax import command_line, drawing
from mbv2_jax.analysis import browse, data_commands
from mbv2_jax.data import loader, sources, workers
from mbv2_jax.data.sample import Sample
from mbv2_jax.data.transforms import pipeline
from mbv2_jax.errors import UserError
from mbv2_jax.runtime import mesh as mesh_lib
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import program, step_rate
from tests.support.boxed import annotation, write_coco
from tests.support.coded import CodedSource, LabelCollator
from tests.support.masked import write_classes, write_image, write_mask

SIZE = 128  # images of this size are shown unscaled
LABEL = [("name", drawing.INK)]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns its output, errors last."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["data", "browse", "--seconds=0", *arguments])
        data_commands.main()
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def photos(tmp_path) -> pathlib.Path:
    """Returns a folder of two WordNet ids and one other class, three noisy images each."""
    rng = np.random.default_rng(0)
    for name in ("n01440764", "n01443537", "zebra"):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (12, 15, 3), np.uint8)
            image = Image.fromarray(pixels).resize((150, 140), Image.Resampling.BICUBIC)
            image.save(tmp_path / "photos/train" / name / f"{number}.png")
    return tmp_path / "photos"


def flags(photos: pathlib.Path) -> list[str]:
    return [
        "--config=finetune_folder",
        f"--config.data.source=folder:{photos}",
        f"--config.data.image_size={SIZE}",
        "--config.batch_size=4",
    ]


def cells(path: pathlib.Path, count: int, columns: int, caption_lines: int) -> list[np.ndarray]:
    """Cuts the images out of the picture."""
    picture = np.asarray(Image.open(path))
    top = 2 * drawing.GAP + drawing.CAPTION * caption_lines
    found = []
    for number in range(count):
        row, column = divmod(number, columns)
        upper = top + row * (SIZE + drawing.LABEL + drawing.GAP)
        left = drawing.GAP + column * (SIZE + drawing.GAP)
        found.append(picture[upper : upper + SIZE, left : left + SIZE])
    return found


def test_the_picture_holds_the_pixels_that_training_gets(run, photos):
    spec = "random_resized_crop(size)|random_flip(0.5)"
    run(*flags(photos), "--epoch=2", "--count=6", f"--config.data.train_transforms={spec}")
    found = cells(pathlib.Path("browse.png"), 6, 4, caption_lines=2)
    # Epoch 2 of 9 examples in batches of 4 begins at step 6.
    batches = loader.train_batches(
        sources.open_source(f"folder:{photos}", "train"),
        pipeline.make_transform(spec, SIZE),
        LabelCollator(),
        batch_size=4,
        seed=0,
        start=6,
        stop=8,
        workers=0,
    )
    expected = np.concatenate([batch["image"] for batch in batches])[:6]
    np.testing.assert_array_equal(np.stack(found), expected)


def test_labels_are_words_where_folders_are_wordnet_ids(run, photos, monkeypatch):
    shown: list[list[str]] = []

    def grid(images, labels, caption, **options):
        shown.append([text for ((text, _),) in labels])
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(drawing, "grid", grid)
    run(*flags(photos), "--count=9", "--out=all.webp")
    assert set(shown[0]) == {"tench", "goldfish", "zebra"}
    assert pathlib.Path("all.webp").exists()


def test_a_grid_of_any_size_has_its_labels_below_the_images():
    for side, count in ((8, 1), (32, 7), (300, 3)):
        images = np.full((count, side, side, 3), (200, 30, 30), np.uint8)
        picture = np.asarray(drawing.grid(images, [LABEL] * count, ["caption"])).astype(int)
        red = (picture[..., 0] - picture[..., 1]) > 100
        shown = 256 if side == 300 else 4 * 32 if side == 32 else 112
        assert red.sum() == count * shown**2
        # Dark letters on white below each image.
        below = picture[red.any(axis=1).nonzero()[0].max() + 1 :]
        assert (below.max(axis=2) < 100).any()


def test_images_need_not_be_square():
    images = np.full((3, 40, 90, 3), (200, 30, 30), np.uint8)
    picture = np.asarray(drawing.grid(images, [LABEL] * 3, ["caption"])).astype(int)
    red = (picture[..., 0] - picture[..., 1]) > 100
    assert red.sum() == 3 * (2 * 40) * (2 * 90)


def test_an_image_without_a_class_is_named_by_its_id():
    named = browse._WithNames(LabelCollator(), ["cat"], "")
    assert named._name(Sample(b"", "photo 3", {"boxes": None})) == "photo 3"
    assert named._name(Sample(b"", "/photos/a/3.jpg", {"boxes": None})) == "3.jpg"
    assert named._name(Sample(b"", "photo 3", {"label": 0})) == "cat"
    assert named.batch_spec((4, 5))["image"].shape == (4, 5, 3)


def test_masks_are_drawn_over_the_images_in_vocs_colours(run, tmp_path, monkeypatch):
    """Half the picture and half its mask, both moved alike, with a legend of the classes."""
    lines: list[list[tuple[str, tuple[int, int, int]]]] = []
    grid = drawing.grid

    def spy(images, labels, caption, **options):
        lines.extend(labels)
        return grid(images, labels, caption, **options)

    monkeypatch.setattr(drawing, "grid", spy)
    folder = write_classes(tmp_path / "pairs", "road", "sky")
    rows = np.zeros((SIZE, SIZE))
    rows[:, :30] = 1
    rows[:20] = 255
    write_mask(folder / "train/masks/one.png", rows)
    write_image(folder / "train/images/one.png", (SIZE, SIZE))
    run(
        "--config=finetune_segmentation",
        f"--config.data.source=pairs:{folder}",
        f"--config.data.image_size={SIZE}",
        "--config.data.train_transforms=resize(size)|random_flip(1.0)",
        "--config.batch_size=1",
        "--count=1",
    )
    picture = np.asarray(Image.open("browse.png"))
    top = 2 * drawing.GAP + drawing.CAPTION * 2
    drawn = picture[top : top + SIZE, drawing.GAP : drawing.GAP + SIZE].astype(int)
    image = np.asarray(Image.open(folder / "train/images/one.png"))[:, ::-1]
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 255: (224, 224, 192)}
    mask = np.array([[colours[int(value)] for value in row] for row in rows[:, ::-1]])
    assert np.abs(drawn - (image.astype(int) + mask) / 2).max() <= 1  # both halves are rounded
    [[name, *legend]] = lines
    assert name[0] == "one.png"
    assert [line for line in legend if line[0]] == [
        ("■ 65 % road", (0, 0, 0)),  # 98 x 108 of 128 x 128
        ("■ 20 % sky", (128, 0, 0)),
        ("■ 16 % does not count", drawing.FAINT),
    ]


def test_boxes_are_drawn_with_the_names_of_their_classes(run, tmp_path, monkeypatch):
    """Those that training leaves out, and what they are, among them."""
    drawn = []
    boxes = drawing.boxes

    def spy(photo, corners, texts, colours):
        drawn.append((photo.size, corners.tolist(), list(texts)))
        return boxes(photo, corners, texts, colours)

    monkeypatch.setattr(drawing, "boxes", spy)
    found = [
        annotation(1, 1, 1, 10, 20, 30, 40),
        annotation(2, 1, 2, 0, 0, 128, 64, iscrowd=1),
        annotation(3, 1, 1, 5, 5, 0, 5),  # which is bad
    ]
    file = tmp_path / "coco/annotations/instances_train.json"
    write_coco(file, tmp_path / "coco/train", {1: "a.png"}, found, {1: "cat", 2: "dog"}, (128, 64))
    (tmp_path / "config.py").write_text(
        "from mbv2_jax.configs import default\n"
        "def get_config():\n"
        "    return default.get_config('detection')\n"
    )
    run(
        "--config=config.py",
        f"--config.data.source=coco:{tmp_path}/coco",
        "--config.data.image_size=256",
        "--config.data.train_transforms=resize((128, 256))|random_flip(1.0)",
        "--config.batch_size=1",
        "--count=1",
    )
    assert drawn == [((256, 128), [[176, 40, 236, 120], [0, 0, 256, 128]], ["cat", "dog (crowd)"])]
    picture = np.asarray(Image.open("browse.png"))
    top = 2 * drawing.GAP + drawing.CAPTION * 2
    shown = picture[top : top + 128, drawing.GAP : drawing.GAP + 256]
    outline = (shown == drawing.class_colour(0)).all(-1)
    assert outline[40, 180:230].all() and outline[60:110, 176].all()


def last_line(config: ConfigDict, **changes: float) -> str:
    """Returns the last line above the images of a changed config."""
    config.update(changes)
    settings = config_lib.read(config)
    _, task = config_lib.resolve(settings, None)
    return browse._caption(settings, task, 0, 224, 224)[-1]


def test_the_caption_mentions_mixing(run, photos):
    run(*flags(photos), "--config.mixup_alpha=0.2", "--config.cutmix_alpha=1.0")
    picture = np.asarray(Image.open("browse.png"))
    config = command_line.load_config("finetune_folder").copy_and_resolve_references()
    assert last_line(config, mixup_alpha=0.2) == "before mixup, on the device"
    both = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    assert last_line(config, **both) == "before mixup and cutmix, on the device"
    # Three lines above the images.
    third = picture[drawing.GAP + 2 * drawing.CAPTION : drawing.GAP + 3 * drawing.CAPTION]
    assert (third < 128).any()


def test_a_bad_image_is_named_or_replaced(run, photos):
    bad = photos / "train" / "zebra" / "1.png"
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=f"{bad}: cannot decode"):
        run(*flags(photos), "--count=9")
    skipping = [*flags(photos), "--config.data.corrupt=skip"]

    def named(count: int) -> bool:
        printed = run(*skipping, f"--count={count}")
        assert printed.count("skipping") <= 1
        return f"skipping {bad}: cannot decode" in printed

    # Only images that belong in the picture are named, though a batch holds 4.
    assert not named(1) and named(9)
    assert pathlib.Path("browse.png").exists()
    place = bisect.bisect_left(range(10), True, key=named)
    assert place % 4 != 1  # not the first row of a batch


def test_workers_are_announced(run, photos):
    said = f"starting 1 worker process on {workers.cores()} cores"
    assert said in run(*flags(photos), "--config.data.workers=1", "--count=1")
    assert "starting" not in run(*flags(photos), "--count=1")


def test_groups_of_batch_statistics_do_not_matter_to_pictures(run, photos):
    config = ["--config=mobilenet_v2_8xb32_in1k", *flags(photos)[1:]]
    assert "browse.png" in run(*config, "--count=1", "--config.data.workers=0")


def test_rate_is_of_whole_rounds_after_the_warm_up():
    now = 0.0

    def batches():
        nonlocal now
        now += 100  # workers start
        while True:  # three workers, 6 s a batch, whose batches come together
            yield {}
            yield {}
            yield {}
            now += 6

    rate = browse._rate(batches(), 3, batch_size=40, seconds=10, clock=lambda: now)
    assert rate == 3 * 40 / 6


@pytest.fixture
def compare(capsys, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 16)

    def compare(rate: float, needs: float | None, **data: object) -> str:
        config = command_line.load_config("mobilenet_v2_8xb32_in1k").copy_and_resolve_references()
        config.data.update(data)
        browse._compare(config, CodedSource(10), rate, needs)
        return capsys.readouterr().out

    return compare


def test_rates_are_compared(compare):
    out = compare(4000.0, 1000.0, workers=8)
    assert "input: 4,000 images/s with 8 worker processes: 500 per core, 16 cores here" in out
    assert "the input keeps up: 4.0 times what is needed" in out
    out = compare(2000.0, 8000.0, workers=8)
    assert "the accelerator would wait 75 % of the time" in out
    assert "--config.data.workers=16 (now 8)" in out
    assert "--config.data.train_decode=fast (now exact)" in out
    assert "at this rate per core, 32 cores are enough" in out
    out = compare(2000.0, 8000.0, workers=16, train_decode="fast")
    assert "to change that: more cores (now 16);" in out
    out = compare(2000.0, 8000.0, workers=20)
    assert "--config.data.workers=16 (now 20: more than the 16 cores)" in out
    out = compare(2000.0, 8000.0, workers=0)
    assert "with 8 threads: 250 per core" in out
    assert "--config.data.workers=16 (now 0: 8 threads)" in out


def test_without_an_accelerator_it_says_how_to_compare(compare):
    out = compare(2000.0, None)
    assert "accelerator: none here" in out and "--needs=IMAGES_PER_SECOND" in out


def test_with_an_accelerator_its_step_is_measured(compare, monkeypatch):
    monkeypatch.setattr(mesh_lib, "accelerator", lambda mesh: f"{mesh.size} x H100")
    monkeypatch.setattr(step_rate, "measure", lambda *_: 3000.0)
    out = compare(6000.0, None)
    assert "accelerator: 3,000 images/s, this config's training step on 4 x H100" in out
    assert "keeps up: 2.0 times" in out


def tiny_digits() -> ConfigDict:
    config = command_line.load_config("digits").copy_and_resolve_references()
    config.model.width, config.model.strides = 0.1, (2, 1, 2, 2, 2, 1, 1, 1)
    config.batch_size, config.data.image_size = 8, 16
    return config


def test_steps_are_timed_without_the_first_ones(monkeypatch):
    now, seen = 0.0, []

    def step(state, batch, key):
        nonlocal now
        now += 100.0 if state == 0 else 0.5  # the first compiles
        seen.append(jax.tree.map(lambda array: (array.shape, array.dtype), batch))
        return state + 1, {"loss": np.float32(0)}

    fake = types.SimpleNamespace(create=lambda key: 0, step=step)
    monkeypatch.setattr(program, "build", lambda *arguments: fake)
    monkeypatch.setattr(step_rate, "time", types.SimpleNamespace(monotonic=lambda: now))
    config = tiny_digits()
    mesh = mesh_lib.create(jax.devices()[:1])
    assert step_rate.measure(config_lib.read(config), CodedSource(100), mesh) == 8 / 0.5
    assert seen[0] == {"image": ((8, 16, 16, 3), np.uint8), "label": ((8,), np.int32)}
    config.batch_size = 6
    with pytest.raises(UserError, match="does not divide over 4 devices"):
        step_rate.measure(config_lib.read(config), CodedSource(100), mesh_lib.create())


@pytest.mark.slow  # it is compiled: 23 s
def test_the_real_step_is_timed():
    mesh = mesh_lib.create(jax.devices()[:1])
    settings = config_lib.read(tiny_digits())
    rate = step_rate.measure(settings, CodedSource(100), mesh, seconds=0.1)
    assert 8 < rate < 1e6  # from a step a second to more than any CPU does


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--count=0", ["--count=0", "1 to 1000"]),
        ("--count=1001", ["--count=1001", "1 to 1000"]),
        ("--epoch=-1", ["--epoch=-1", "0"]),
        ("--seconds=-1", ["--seconds=-1"]),
        ("--seconds=nan", ["--seconds=nan"]),
        ("--needs=0", ["--needs=0", "images per second"]),
        ("--out=grid", ["--out=grid", "grid.png"]),
        ("--out=no/where.png", ["no/where.png", "no folder"]),
        ("--config.data.train_transforms=resise(8)", ["'resise'"]),
        ("--config.data.corrupt=ignore", ["'ignore'", "'skip'"]),
    ],
)
def test_mistakes_are_one_line(run, photos, argument, parts):
    with pytest.raises(UserError) as error:
        run(*flags(photos), argument)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert not pathlib.Path("browse.png").exists()
