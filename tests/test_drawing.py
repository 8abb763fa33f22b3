"""Annotated pictures: what is in them, pixel by pixel, and where they are written."""

import numpy as np
import pytest
from PIL import Image

from mbv2_jax import drawing
from mbv2_jax.errors import UserError

LONG = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"


def photo(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (0, 255, 0))


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((500, 375), (500, 375)),
        ((1280, 960), (640, 480)),  # the longer side becomes 640
        ((100, 2000), (32, 640)),
        ((3000, 1), (640, 1)),
        ((28, 28), (168, 168)),  # whole steps, until the longer side has 160
    ],
)
def test_photo_is_shown_whole_at_a_sane_size(size, shown):
    picture = np.asarray(drawing.annotate(photo(*size), [("cat", 0.5)]))
    rows, columns = np.nonzero((picture == (0, 255, 0)).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == shown
    assert rows.min() == 0
    # In the middle, to half a pixel.
    assert abs(columns.min() + columns.max() + 1 - picture.shape[1]) <= 1


def test_bars_are_as_long_as_the_scores_say():
    scores = (0.75, 0.2, 0.001)
    picture = drawing.annotate(photo(500, 100), [("cat", s) for s in scores])
    pixels = np.asarray(picture)
    filled = (pixels == drawing.FIRST).all(-1) | (pixels == drawing.OTHER).all(-1)
    lengths = [filled[116 + 38 * i : 154 + 38 * i].sum(1).max() for i in range(3)]
    # The 468 pixels between the margins are 100 %; 0.1 % is less than a bar is high, and left out.
    assert np.abs(np.subtract(lengths, [351, 93.6, 0])).max() <= 2
    assert lengths[2] == 0


def test_a_name_that_is_too_long_is_cut_before_the_percentage():
    beside = (slice(None), slice(0, 460))
    for name in (LONG, "W" * 200):
        long = np.asarray(drawing.annotate(photo(500, 10), [(name, 0.5)]))[10:40]
        short = np.asarray(drawing.annotate(photo(500, 10), [("", 0.5)]))[10:40]
        # The percentage is there, untouched: "50.0%" in 15 pixels takes less than 55.
        np.testing.assert_array_equal(long[:, 430:], short[:, 430:])
        assert (long[beside] != short[beside]).any()
        assert (long[:, 380:420] != short[:, 380:420]).any()  # and the name uses the room


def test_pictures_of_all_kinds_of_names_are_written_and_none_overwritten(tmp_path):
    picture = drawing.annotate(photo(50, 50), [("cat", 0.5)])
    names = ["a.jpg", "a.jpg", "a.jpg", "b.PNG", "c.gif", "d", "e.webp", "f.tar.bmp"]
    written = [drawing.save(picture, tmp_path, name).name for name in names]
    assert written == [
        *("a.jpg", "a-2.jpg", "a-3.jpg", "b.PNG", "c.gif.png", "d.png", "e.webp", "f.tar.bmp")
    ]
    for name in written:
        with Image.open(tmp_path / name) as opened:
            opened.load()
            assert opened.size == picture.size
            assert opened.format in ("JPEG", "PNG", "WEBP", "BMP")


def test_a_folder_that_is_not_there_is_a_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*missing/a\.jpg: No such file"):
        drawing.save(photo(1, 1), tmp_path / "missing", "a.jpg")


PALETTE = np.zeros((256, 3), np.uint8)
PALETTE[1] = (250, 0, 50)


def test_overlay_tints_classes_and_lines_their_borders():
    mask = np.zeros((200, 300), np.uint8)
    mask[:, 150:] = 1
    picture = np.asarray(
        drawing.overlay(photo(300, 200), mask, PALETTE, [("road", 1, 0.5), (LONG, 0, 0.5)])
    )
    shown = picture[:200, 60:360]  # in the middle of the panel's 420 pixels
    assert (shown[:, :149] == (0, 255, 0)).all()  # a black class leaves the photo as it is
    assert (shown[:, 149] == 255).all()
    blended = np.round((1 - drawing.COVER) * np.array([0, 255, 0]) + drawing.COVER * PALETTE[1])
    assert (shown[:, 150:] == blended).all()
    # The legend: a square in the colour of each class (empty for black), its name and its share.
    lines = picture[200:].reshape(2 * drawing.LEGEND_ROW + drawing.MARGIN, -1, 3)
    squares = lines[:, drawing.MARGIN : drawing.MARGIN + drawing.SWATCH]
    coloured = (squares == PALETTE[1]).all(-1).any(1)
    assert coloured.any() and not coloured[drawing.MARGIN + drawing.LEGEND_ROW :].any()
    for half in np.split(lines[drawing.MARGIN :], 2):
        text = (half[:, 50:] != 255).any((0, 2))
        assert text.any() and not text[-drawing.MARGIN :].any()  # a long name is cut


@pytest.mark.parametrize("size", [(28, 28), (1280, 960), (3000, 3)])
def test_overlay_has_the_shown_photos_size(size):
    mask = np.ones(size[::-1], np.uint8)
    picture = drawing.overlay(photo(*size), mask, PALETTE, [("road", 1, 1.0)])
    plain = drawing.annotate(photo(*size), [])
    assert picture.width == plain.width
    blended = np.round((1 - drawing.COVER) * np.array([0, 255, 0]) + drawing.COVER * PALETTE[1])
    tinted = (np.asarray(picture) == blended).all(-1)
    green = (np.asarray(plain) == (0, 255, 0)).all(-1)
    assert tinted.sum() == green.sum()


ORANGE, BLUE = (255, 128, 0), (0, 0, 255)


def test_boxes_are_outlined_where_they_are():
    picture = np.asarray(
        drawing.boxes(photo(400, 300), np.array([[50, 60, 150.4, 200]]), [""], [ORANGE])
    )
    rows, columns = np.nonzero((picture == ORANGE).all(-1))
    # The first pixels are those at the corner, and the last ones end at the other corner.
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (50, 60, 149, 199)
    assert (picture[70:190, 60:140] == (0, 255, 0)).all()


def test_boxes_scale_with_a_photo():
    picture = np.asarray(drawing.boxes(photo(1280, 960), [[200, 100, 600, 500]], [""], [ORANGE]))
    assert picture.shape == (480, 640, 3)
    rows, columns = np.nonzero((picture == ORANGE).all(-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (100, 50, 299, 249)


@pytest.mark.parametrize("size", [(30, 20), (400, 300), (2000, 900)])
@pytest.mark.parametrize("text", ["cat 97%", LONG * 3])
def test_plates_stay_inside_the_picture(size, text):
    width, height = size
    places = [
        (0, 0, width / 4, height / 4),
        (width * 0.9, 0, width, height / 4),
        (width * 0.9, height * 0.9, width * 1.2, height * 1.2),
        (0, 0, width, height),
    ]
    for box in places:
        with_text, without = (
            drawing.boxes(photo(*size), [box], [each], [ORANGE]) for each in (text, "")
        )
        added = (np.asarray(with_text) != np.asarray(without)).any(-1)
        ink = (np.asarray(with_text) == drawing.INK).all(-1) & added
        assert added.sum() > 200  # a plate of a few letters, at least
        assert ink.any()
        # It is whole: as many rows as the font's height, in one piece.
        rows = np.flatnonzero(added.any(1))
        assert 8 <= len(rows) <= 20
        assert np.ptp(rows) < 20


def test_plates_do_not_cover_each_other_where_there_is_room():
    box = (100, 100, 300, 200)
    names, colours = ["first", "second", "third"], [ORANGE, BLUE, (255, 0, 255)]
    alone = drawing.boxes(photo(400, 300), [box], ["first"], [ORANGE])
    picture = drawing.boxes(photo(400, 300), [box] * 3, names, colours)
    upper = np.asarray(alone)[80:99]
    assert (upper == drawing.INK).all(-1).any()
    # The first plate is where it is without the others, and all of it can be seen.
    columns = (upper == ORANGE).all(-1).any(0)
    assert (np.asarray(picture)[80:99][:, columns] == upper[:, columns]).all()
    for colour in colours[1:]:
        assert (np.asarray(picture) == colour).all(-1).sum() > 300


def test_the_colours_of_classes_differ():
    found = [drawing.class_colour(label) for label in range(20)]
    assert len(set(found)) == 20
    near = np.abs(np.diff(np.array(found), axis=0)).sum(1)
    assert near.min() > 100


def test_a_mask_is_saved_with_its_palette(tmp_path):
    mask = Image.fromarray(np.array([[0, 1], [1, 255]], np.uint8))
    mask.putpalette(PALETTE.tobytes())
    for name in ("one.png", "one-2.png"):
        file = drawing.save(mask, tmp_path, "one.png")
        assert file == tmp_path / name
        with Image.open(file) as written:
            assert written.mode == "P"
            np.testing.assert_array_equal(np.asarray(written), [[0, 1], [1, 255]])
