"""Transform strings, decoding and crops, against results computed by hand."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data.decoding import decode
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UserError
from tests.support.samples import pixels


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ramp(width: int, height: int) -> np.ndarray:
    """Returns an image in which every pixel is different: (x, y, x + y)."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, x + y], -1).astype(np.uint8)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_size_stands_for_image_size_and_literals_for_themselves():
    image = Image.fromarray(ramp(90, 70))
    assert pixels(make_transform("resize(size)", 48), image, generator()).shape == (48, 48, 3)
    transform = make_transform("resize_edge(scale=64, interpolation='bicubic')|center_crop(60)", 48)
    assert pixels(transform, image, generator()).shape == (60, 60, 3)
    assert transform.output_size == (60, 60)


def test_output_is_uint8():
    transform = make_transform("random_resized_crop(size)|random_flip(0.5)", 16)
    assert pixels(transform, Image.fromarray(ramp(90, 70)), generator()).dtype == np.uint8


def test_random_says_whether_pixels_depend_on_the_generator():
    image = Image.fromarray(ramp(90, 70))
    for spec, random in {
        "resize_edge(64)|center_crop(size)": False,
        "resize(size)": False,
        "random_resized_crop(size)": True,
        "resize(size)|random_flip(0.5)": True,
        "random_crop(size, padding=4)": True,
    }.items():
        transform = make_transform(spec, 32)
        outputs = {pixels(transform, image, generator(seed)).tobytes() for seed in range(20)}
        assert transform.random == random == (len(outputs) > 1), spec


def test_same_generator_gives_the_same_pixels_after_pickling():
    transform = make_transform("random_resized_crop(size)|random_flip(0.5)", 16)
    image = Image.fromarray(ramp(90, 70))
    copy = pickle.loads(pickle.dumps(transform))
    np.testing.assert_array_equal(
        pixels(transform, image, generator(3)), pixels(copy, image, generator(3))
    )


def test_center_crop_takes_the_middle_and_rounds_halves_to_even():
    image = ramp(9, 6)
    # (9 - 4) / 2 = 2.5 -> 2 and (6 - 4) / 2 = 1; (7 - 4) / 2 = 1.5 -> 2.
    crop = pixels(make_transform("center_crop(size)", 4), Image.fromarray(image), generator())
    np.testing.assert_array_equal(crop, image[1:5, 2:6])
    crop = pixels(make_transform("center_crop(size)", 4), Image.fromarray(ramp(7, 7)), generator())
    np.testing.assert_array_equal(crop, ramp(7, 7)[2:6, 2:6])


def test_random_crop_takes_every_window_of_the_padded_image():
    """All places are equally likely, as with torchvision's RandomCrop(size, padding)."""
    image = ramp(8, 8) + 1  # no zeros of its own
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 8, x : x + 8].tobytes(): (y, x) for y in range(5) for x in range(5)}
    transform, rng = make_transform("random_crop(size, padding=2)", 8), generator()
    draws = 2500
    counts = np.zeros((5, 5))
    for _ in range(draws):
        counts[windows[pixels(transform, Image.fromarray(image), rng).tobytes()]] += 1
    # 25 places, 100 draws each on average, standard deviation 9.8: five of them is 51.
    assert counts.min() > 51
    assert counts.max() < 149


def test_random_flip_flips_with_its_probability():
    image = Image.fromarray(ramp(8, 8))
    transform, rng = make_transform("resize(size)|random_flip(0.25)", 8), generator()
    flips = [
        np.array_equal(pixels(transform, image, rng), np.asarray(image)[:, ::-1])
        for _ in range(2000)
    ]
    # 500 of 2000 on average, standard deviation 19.4; five of them.
    assert 403 < sum(flips) < 597


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("center_crop(size", "cannot be read"),
        ("resize_egde(256)|center_crop(size)", "did you mean 'resize_edge'?"),
        ("sharpen(size)", "known are 'random_resized_crop', 'random_flip'"),
        ("center_crop", "write NAME(ARGUMENTS)"),
        ("resize(size) + random_flip()", "write NAME(ARGUMENTS)"),
        ("__import__('os').remove('x')", "is not an operation"),
        ("resize(image_size)", "neither a literal nor 'size'"),
        ("resize(open('x'))", "neither a literal nor 'size'"),
        ("resize(size * 2)", "neither a literal nor 'size'"),
        ("resize(size, interpolaton='bicubic')", "did you mean 'interpolation'?"),
        ("resize(size, interpolation='cubic')", "did you mean 'bicubic'?"),
        ("resize(size, 'bilinear', 3)", "at most 2 arguments (scale, interpolation)"),
        ("resize(size, scale=3)", "got 'scale' twice"),
        ("resize()", "resize: it needs 'scale'"),
        ("center_crop(0)", "crop_size=0 must be a whole number of pixels"),
        ("center_crop(12.5)", "crop_size=12.5"),
        ("center_crop(True)", "crop_size=True"),
        ("random_crop(size, padding=-1)", "padding=-1"),
        ("resize(size)|random_flip(1.5)", "prob=1.5 must be a number from 0 to 1"),
        ("random_resized_crop(size, crop_ratio_range=(1.0, 0.08))", "low <= high"),
        ("random_resized_crop(size, aspect_ratio_range=0.75)", "must be (low, high)"),
        ("resize_edge(256)", "does not end in a fixed size"),
        ("random_flip(0.5)", "does not end in a fixed size"),
        ("", "cannot be read"),
    ],
)
def test_a_wrong_string_is_explained(spec, says):
    with pytest.raises(UserError) as error:
        make_transform(spec, 32)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_image_size_must_be_positive():
    with pytest.raises(UserError, match="image_size=-3 must be a whole number of pixels"):
        make_transform("resize(size)", -3)


@pytest.mark.parametrize("spec", ["center_crop(size)", "random_crop(size, padding=1)"])
def test_a_crop_larger_than_the_image_is_refused(spec):
    with pytest.raises(UserError, match="needs a larger image than 40 x 20"):
        pixels(make_transform(spec, 32), Image.fromarray(ramp(40, 20)), generator())


def test_16_bit_grey_is_scaled_and_not_clipped():
    """Pillow's own conversion to RGB would make 255 of every value above 255."""
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    pixels = np.asarray(decode(png(Image.fromarray(values))))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[0], [[v] * 3 for v in (0, 0, 1, 128, 255)])


def test_transparency_is_dropped_and_not_blended():
    pixels = np.array([[[200, 100, 50, 0], [200, 100, 50, 128]]], np.uint8)
    np.testing.assert_array_equal(
        np.asarray(decode(png(Image.fromarray(pixels)))), [[[200, 100, 50]] * 2]
    )


def test_print_colours_come_out_as_screen_colours():
    """The expected levels of a CMYK JPEG are 255 (1 - C)(1 - K), and so on."""
    cmyk = np.zeros((16, 64, 4), np.uint8)  # four patches, of 16 x 16 pixels: whole JPEG blocks
    cmyk[:, 16:32] = [255, 0, 0, 0]
    cmyk[:, 32:48] = [0, 255, 255, 0]
    cmyk[:, 48:] = [0, 0, 0, 128]
    file = io.BytesIO()
    Image.fromarray(cmyk, "CMYK").save(file, "JPEG", quality=100)
    pixels = np.asarray(decode(file.getvalue())).astype(int)
    expected = np.array([[255, 255, 255], [0, 255, 255], [255, 0, 0], [127, 127, 127]])
    # JPEG's rounding at quality 100 moves a level by 2 at most.
    np.testing.assert_allclose(pixels[8, 8::16], expected, atol=2)


def test_a_rotated_photo_stands_upright():
    """The rows of a file of orientation 6 are the scene's columns."""
    upright = ramp(24, 16)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(file.getvalue())), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no header",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",
    ],
)
def test_a_damaged_exif_block_does_not_stop_a_sound_image(exif):
    file = io.BytesIO()
    Image.fromarray(ramp(24, 16)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue()).size == (24, 16)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(ramp(64, 64)).save(file, "JPEG")
    return file.getvalue()


def damaged_png() -> bytes:
    encoded = bytearray(png(Image.fromarray(ramp(64, 64))))
    encoded[100] ^= 255
    return bytes(encoded)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"<html>not found</html>",
        jpeg()[:10],
        jpeg()[: len(jpeg()) // 2],
        damaged_png(),
        png(Image.fromarray(ramp(64, 64)))[:60],
    ],
)
def test_damaged_and_other_files_are_refused(encoded):
    with pytest.raises(UserError, match=rf"cannot decode the image \({len(encoded)} bytes\)"):
        decode(encoded)


def test_floating_point_pixels_are_refused():
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(file, "TIFF")
    with pytest.raises(UserError, match="pixels of mode F has no fixed range"):
        decode(file.getvalue())
