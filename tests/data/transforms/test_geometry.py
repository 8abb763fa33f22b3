"""Geometry of samples: image, boxes and masks move together."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mbv2_jax.data.sample import IGNORED, Boxes, Frame, Sample
from mbv2_jax.data.transforms import geometry
from mbv2_jax.data.transforms.operation import Operation
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UserError

WIDTH, HEIGHT = 12, 8


def boxes(*corners: tuple[float, float, float, float]) -> Boxes:
    """Returns boxes whose other fields tell them apart; their objects fill half of them."""
    array = np.array(corners, np.float32).reshape(-1, 4)
    count = len(array)
    return Boxes(
        corners=array,
        labels=np.arange(count, dtype=np.int32),
        crowd=np.arange(count) % 2 == 1,
        difficult=np.arange(count) % 3 == 1,
        area=((array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1]) / 2).astype(np.float32),
    )


def sample(objects: Boxes, width: int = WIDTH, height: int = HEIGHT) -> Sample:
    """Returns a sample of noise whose mask has another class in every pixel, below IGNORED."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    classes = (np.arange(height * width) % IGNORED).reshape(height, width).astype(np.uint8)
    targets = {
        "boxes": objects,
        "mask": Image.fromarray(classes),
        "label": 3,
        "caption": ["as it is"],
    }
    return Sample(image, "test", targets)


def assert_boxes(found: Boxes, corners: list, labels: list[int], area: list[float]) -> None:
    np.testing.assert_array_equal(found.corners, np.array(corners, np.float32).reshape(-1, 4))
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.crowd, [label % 2 == 1 for label in labels])
    np.testing.assert_array_equal(found.difficult, [label % 3 == 1 for label in labels])
    np.testing.assert_allclose(found.area, area, rtol=1e-6)  # float32 products
    assert found.corners.dtype == found.area.dtype == np.float32
    assert found.labels.dtype == np.int32 and found.crowd.dtype == bool


def mask_of(moved: Sample) -> np.ndarray:
    mask = moved.targets["mask"]
    assert mask.mode == "L" and mask.size == moved.image.size
    return np.asarray(mask)


def assert_others_stay(moved: Sample) -> None:
    assert moved.targets["label"] == 3
    assert moved.targets["caption"] == ["as it is"]
    assert moved.id == "test"


def test_a_crop_clips_boxes_and_drops_empty_ones():
    objects = boxes((1, 1, 5, 5), (4, 3, 9, 7), (0, 0, 2, 8), (3, 6, 8, 8), (7, 2, 12, 4))
    given = sample(objects)
    moved = geometry.crop(given, (2, 2, 5, 4))  # columns 2 to 6, rows 2 to 5
    # Box 2 ends at the left edge, box 3 begins at the lower edge, box 4 at the right edge.
    # A quarter of box 0 is cut off at each of two sides: 3 x 3 of 4 x 4; of box 1 3 x 3 of 5 x 4.
    assert_boxes(
        moved.targets["boxes"],
        [(0, 0, 3, 3), (2, 1, 5, 4)],
        [0, 1],
        [8 * 9 / 16, 10 * 9 / 20],
    )
    np.testing.assert_array_equal(np.asarray(moved.image), np.asarray(given.image)[2:6, 2:7])
    np.testing.assert_array_equal(mask_of(moved), mask_of(given)[2:6, 2:7])
    assert_others_stay(moved)
    assert len(given.targets["boxes"]) == 5  # the given sample stays as it was


def test_a_crop_beyond_the_image_is_black_and_ignored():
    given = sample(boxes((0, 0, 12, 8), (10, 1, 12, 3)))
    moved = geometry.crop(given, (-3, -2, 10, 20))
    expected = np.pad(np.asarray(given.image)[:, :7], ((2, 10), (3, 0), (0, 0)))
    np.testing.assert_array_equal(np.asarray(moved.image), expected)
    classes = np.pad(mask_of(given)[:, :7], ((2, 10), (3, 0)), constant_values=IGNORED)
    np.testing.assert_array_equal(mask_of(moved), classes)
    # A box is clipped to the crop, not to the image in it.
    assert_boxes(moved.targets["boxes"], [(3, 2, 10, 10)], [0], [48 * 56 / 96])


def test_padding_moves_boxes_and_keeps_their_area():
    given = sample(boxes((1, 2, 5, 6)))
    moved = geometry.pad(given, 4, 3, 2, 1, fill=(9, 8, 7))
    assert moved.image.size == (WIDTH + 6, HEIGHT + 4)
    pixels = np.asarray(moved.image)
    np.testing.assert_array_equal(pixels[3:-1, 4:-2], np.asarray(given.image))
    outside = np.ones(pixels.shape[:2], bool)
    outside[3:-1, 4:-2] = False
    assert (pixels[outside] == (9, 8, 7)).all()
    assert (mask_of(moved)[outside] == IGNORED).all()
    assert_boxes(moved.targets["boxes"], [(5, 5, 9, 9)], [0], [8])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_resize_scales_boxes_and_takes_the_nearest_class(interpolation):
    given = sample(boxes((1, 2, 5, 6), (0, 0, 12, 8)))
    moved = geometry.resize(given, (24, 18), interpolation)
    assert moved.image.size == (18, 24)
    # 1.5 times as wide, 3 times as high.
    assert_boxes(moved.targets["boxes"], [(1.5, 6, 7.5, 18), (0, 0, 18, 24)], [0, 1], [36, 216])
    # The centre of output pixel i lies in input pixel floor((i + 0.5) / scale).
    rows = np.floor((np.arange(24) + 0.5) / 3).astype(int)
    columns = np.floor((np.arange(18) + 0.5) / 1.5).astype(int)
    sure = np.arange(18) % 3 != 1  # the others' centres lie between two input pixels
    expected = mask_of(given)[rows][:, columns[sure]]
    np.testing.assert_array_equal(mask_of(moved)[:, sure], expected)
    expected = given.image.resize((18, 24), getattr(Image.Resampling, interpolation.upper()))
    assert moved.image.tobytes() == expected.tobytes()
    assert_others_stay(moved)


@pytest.mark.parametrize("size", [(5, 7), (16, 24), (31, 3), (8, 12)])
def test_masks_are_resized_as_by_pillow(size):
    given = sample(boxes())
    moved = geometry.resize(given, size)
    expected = given.targets["mask"].resize(size[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(mask_of(moved), np.asarray(expected))
    assert len(moved.targets["boxes"]) == 0


def test_a_flip_exchanges_left_and_right():
    given = sample(boxes((1, 2, 5, 6), (0, 0, 12, 8), (10.5, 1, 12, 3)))
    moved = geometry.flip(given)
    assert_boxes(
        moved.targets["boxes"],
        [(7, 2, 11, 6), (0, 0, 12, 8), (0, 1, 1.5, 3)],
        [0, 1, 2],
        [8, 48, 1.5],
    )
    np.testing.assert_array_equal(np.asarray(moved.image), np.asarray(given.image)[:, ::-1])
    np.testing.assert_array_equal(mask_of(moved), mask_of(given)[:, ::-1])


def test_two_flips_are_none():
    given = sample(boxes((1, 2, 5, 6), (0.25, 0, 11.5, 8)))
    moved = geometry.flip(geometry.flip(given))
    np.testing.assert_array_equal(np.asarray(moved.image), np.asarray(given.image))
    np.testing.assert_array_equal(mask_of(moved), mask_of(given))
    np.testing.assert_array_equal(moved.targets["boxes"].corners, given.targets["boxes"].corners)


PAINTED = (30, 20, 70, 50)  # x0, y0, x1, y1


def painted() -> Sample:
    """Returns a black image with a white rectangle, a box around it, and a mask of it."""
    image, mask = Image.new("RGB", (100, 80)), Image.new("L", (100, 80))
    x0, y0, x1, y1 = PAINTED
    ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), (255, 255, 255))
    ImageDraw.Draw(mask).rectangle((x0, y0, x1 - 1, y1 - 1), 1)
    return Sample(image, "painted", {"boxes": boxes(PAINTED), "mask": mask})


def extent(pixels: np.ndarray) -> list[int]:
    """Returns the corners of the smallest box around the pixels that are True."""
    ys, xs = pixels.nonzero()
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def assert_leads_back(frame: Frame, shares: np.ndarray) -> None:
    """Asserts that a frame leads from a box, in shares of the image, to the painted rectangle."""
    x0, y0, x1, y1 = frame.part(*shares).extent
    left, top, right, bottom = frame.extent
    wanted = np.clip(PAINTED, [min(left, right), top] * 2, [max(left, right), bottom] * 2)
    back = [min(x0, x1), y0, max(x0, x1), y1]
    np.testing.assert_allclose(back, wanted, atol=1e-4)  # the corners are float32


OPERATIONS = [
    "random_resized_crop(size)",
    "random_resized_crop((48, 90), interpolation='bicubic')",
    "inception_crop((40, 60))",
    "random_crop((60, 70), padding=20)",
    "random_crop(80)",
    "resize_edge(40)|center_crop((30, 44))",
    "center_crop((66, 50))",
    "resize((120, 33))",
    "resize(size)|random_flip(1.0)",
    "random_scale(0.5, 2.0, step=0.25)|pad(size, (0, 0, 0))|random_crop(size)",
    "random_scale(0.3, 1.0)|pad((90, 100), (9, 9, 9))|random_flip(0.5)",
    "fit((33, 64))|pad(size, (9, 9, 9))",
    "random_resized_crop(size)|random_flip(0.5)|random_crop(size, padding=8)",
]


@pytest.mark.parametrize("spec", OPERATIONS)
@pytest.mark.parametrize("from_file", [False, True])
def test_a_box_stays_around_a_painted_rectangle(spec, from_file):
    transform, seen = make_transform(spec, 64), 0
    for seed in range(30):
        given, rng = painted(), np.random.default_rng(seed)
        if from_file:
            file = io.BytesIO()
            given.image.save(file, "PNG")
            moved = transform.from_encoded(given.with_image(file.getvalue()), rng)  # type: ignore[arg-type]
        else:
            moved = transform(given, rng)
        assert moved.image.shape == (*transform.output_size, 3)
        assert moved.frame is not None and moved.frame.size == (100, 80)
        white, mask = moved.image[..., 0] > 127, np.asarray(moved.targets["mask"])
        assert mask.shape == transform.output_size
        found = moved.targets["boxes"]
        if not len(found):
            assert not (mask == 1).any()
            continue
        seen += 1
        (corners,) = found.corners
        if "|random_crop" not in spec:  # whose padding shows more than the crop before it left
            assert_leads_back(moved.frame, corners / (2 * moved.image.shape[1::-1]))
        if not (mask == 1).any():  # a sliver, narrower than a pixel
            assert (corners[2:] - corners[:2]).min() < 1
            continue
        # A pixel belongs to what covers its centre; bicubic's overshoot moves the edge no further.
        np.testing.assert_allclose(extent(mask == 1), corners, atol=0.5)
        if white.any():
            np.testing.assert_allclose(extent(white), corners, atol=1)
    assert seen > 10


def test_the_file_and_the_image_give_the_same_targets():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 140, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG")
    decoded = Image.open(io.BytesIO(file.getvalue()))
    decoded.load()
    mask = Image.fromarray(rng.integers(0, 21, (90, 140), np.uint8))
    targets = {"boxes": boxes((10, 20, 100, 60), (5, 5, 9, 80)), "mask": mask}
    transform = make_transform("random_resized_crop((32, 48))|random_flip(0.5)", 1)
    for seed in range(20):
        encoded = transform.from_encoded(
            Sample(file.getvalue(), "x", targets), np.random.default_rng(seed)
        )
        whole = transform(Sample(decoded, "x", targets), np.random.default_rng(seed))
        np.testing.assert_array_equal(encoded.image, whole.image)
        np.testing.assert_array_equal(encoded.targets["mask"], whole.targets["mask"])
        for name in ("corners", "labels", "crowd", "difficult", "area"):
            np.testing.assert_array_equal(
                getattr(encoded.targets["boxes"], name), getattr(whole.targets["boxes"], name)
            )
        assert encoded.frame is not None and whole.frame is not None
        assert encoded.frame.size == whole.frame.size == (140, 90)
        # Rounded in float64: one from integers, the other from shares of the image.
        np.testing.assert_allclose(encoded.frame.extent, whole.frame.extent, atol=1e-9)


@pytest.mark.parametrize(
    "spec",
    ["color_jitter(0.4, 0.4, 0.4, 0.1)", "random_erasing(1.0)", "photometric_distortion()"],
)
def test_colours_leave_targets_alone(spec):
    given = sample(boxes((1, 2, 5, 6)))
    moved = operation(spec)(given, np.random.default_rng(0))
    assert moved.targets == given.targets
    assert moved.image.tobytes() != given.image.tobytes()


@pytest.mark.parametrize(
    "spec", ["auto_augment()", "rand_augment()", "trivial_augment_wide()", "timm_rand_augment()"]
)
def test_operations_that_would_not_move_targets_refuse_them(spec):
    name = spec.split("(")[0]
    whole = sample(boxes((1, 2, 5, 6)))
    for kept in (["boxes"], ["mask"], ["boxes", "mask"]):
        targets = {name: whole.targets[name] for name in [*kept, "label"]}
        given = Sample(whole.image, "test", targets)
        with pytest.raises(UserError) as error:
            operation(spec)(given, np.random.default_rng(0))
        assert str(error.value) == (
            f"{name} shears, rotates and translates the image only, and its {' and '.join(kept)} "
            "would no longer fit; color_jitter changes colours only"
        )
    labelled = Sample(whole.image, "test", {"label": 3})
    assert operation(spec)(labelled, np.random.default_rng(0)).targets == {"label": 3}


def operation(spec: str) -> Operation:
    return make_transform(f"{spec}|resize(16)", 16).operations[0]


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("random_resized_crop((20, 30))", (20, 30)),
        ("inception_crop([20, 30])", (20, 30)),
        ("random_crop((8, 12))", (8, 12)),
        ("center_crop((2, 9))", (2, 9)),
        ("resize((20, 30))", (20, 30)),
        ("resize((20, 30))|resize_edge(10)", (10, 15)),
        ("resize((35, 20))|resize_edge(10)", (17, 10)),
        ("resize((20, 30))|random_flip(0.5)|color_jitter(0.4)", (20, 30)),
        ("resize(size)", (16, 16)),
        ("fit((6, 10))|pad((7, 11))", (7, 11)),
        ("resize((20, 30))|fit(15)", (10, 15)),
        ("resize((20, 30))|pad((25, 10))", (25, 30)),
    ],
)
def test_sizes_need_not_be_square(spec, size):
    transform = make_transform(spec, 16)
    assert transform.output_size == size
    moved = transform(sample(boxes()), np.random.default_rng(0))
    assert (moved.image.shape, moved.image.dtype) == ((*size, 3), np.uint8)


@pytest.mark.parametrize("value", ["(20, 0)", "(20,)", "(20, 30, 40)", "(20, 3.5)", "'20'", "0"])
def test_impossible_sizes_are_explained(value):
    with pytest.raises(UserError, match="1 or more, or two of them: \\(height, width\\)"):
        make_transform(f"resize({value})", 16)


def test_a_crop_that_does_not_fit_on_one_side_is_refused():
    for spec in ("center_crop((4, 13))", "random_crop((9, 4))"):
        with pytest.raises(UserError, match="needs a larger image than 12 x 8"):
            make_transform(spec, 16)(sample(boxes()), np.random.default_rng(0))


def test_a_resize_clips_boxes_to_the_image():
    """Those of a file may reach beyond the picture."""
    corners = np.array([[-2, 1, 12, 9], [1, 2, 5, 4]], np.float32)
    flags = np.zeros(2, bool)
    boxes = Boxes(corners, np.zeros(2, np.int32), flags, flags, np.ones(2, np.float32))
    given = Sample(Image.new("RGB", (10, 8)), "x", {"boxes": boxes})
    resized = geometry.resize(given, (16, 30)).targets["boxes"]  # 2 and 3 times as large
    assert resized.corners.tolist() == [[0, 2, 30, 16], [3, 4, 15, 8]]
