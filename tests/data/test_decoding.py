"""Crops of partly decoded files against crops of the whole image by Pillow."""

import contextlib
import importlib.util
import io
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mbv2_jax.data import fast_decoding, jpeg
from mbv2_jax.data.decoding import decode, resized_crop
from mbv2_jax.data.transforms.geometry import crop_and_resize_image
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UnreadableImage, UserError
from tests.support.samples import pixels, pixels_from

WIDTH, HEIGHT = 171, 203  # not a multiple of any block's side

# Left, top, width, height: from the first row, across the middle, to the last row.
BOXES = [(0, 0, 40, 1), (3, 5, 90, 11), (17, 60, 100, 68), (0, 100, 171, 90), (5, 0, 160, 203)]


def photo(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Returns coloured waves with noise, in which each row differs from the next."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + k)) + np.cos(y / (3 + 2 * k)) for k in range(3)]
    pixels = np.stack(waves, -1) * 60 + 128 + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def pillow(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turbo(subsampling: str) -> bytes:
    """Encodes with libjpeg-turbo, which knows more ways of subsampling than Pillow."""
    pixels = np.ascontiguousarray(photo())
    return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling=subsampling)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return pillow(photo(), exif=exif)


# Files whose first rows can be decoded alone.
PLAIN = {
    "4:4:4": pillow(photo(), subsampling=0),
    "4:2:2": pillow(photo(), subsampling=1),
    "4:2:0": pillow(photo(), subsampling=2),
    "4:1:1": turbo("411"),
    "4:4:0": turbo("440"),
    "grey": pillow(photo().convert("L")),
    "print colours": pillow(photo().convert("CMYK")),
    "restart markers": pillow(photo(), restart_marker_blocks=3),
    "own tables": pillow(photo(), optimize=True),
    "low quality": pillow(photo(), quality=5),
    "upright by EXIF": turned(1),
    "comment": pillow(photo(), comment=b"\xff\xc0\xff\xd9" * 9),
}
# Files that have to be decoded whole.
OTHER = {
    "progressive": pillow(photo(), progressive=True),
    "on its side": turned(6),
    "mirrored": turned(2),
    "more after the end": pillow(photo()) + b"\n",
    "PNG": pillow(photo(), "PNG"),
    "WebP": pillow(photo(), "WEBP", lossless=True),
}
FILES = PLAIN | OTHER


def crop(encoded: bytes, box, size: int = 32, decode_as: str = "exact", **options) -> np.ndarray:
    return np.asarray(
        resized_crop(encoded, lambda *_: box, (size, size), decode_as=decode_as, **options).image
    )


def whole(encoded: bytes, box, size: int = 32, interpolation: str = "bilinear") -> np.ndarray:
    return np.asarray(crop_and_resize_image(decode(encoded), box, (size, size), interpolation))


@pytest.mark.parametrize("name", FILES)
def test_an_exact_crop_is_that_of_the_whole_image(name):
    seen = set()

    def choose(*size: int) -> tuple[int, int, int, int]:
        seen.add(size)
        return 0, 0, 1, 1

    assert resized_crop(FILES[name], choose, (8, 8)).image_size in seen
    for box in BOXES:
        np.testing.assert_array_equal(crop(FILES[name], box), whole(FILES[name], box))
    assert seen == {decode(FILES[name]).size}  # the box is chosen in the upright image


@pytest.mark.parametrize("name", PLAIN)
def test_only_the_rows_down_to_the_crop_are_decoded(name):
    encoded = PLAIN[name]
    frame = jpeg.read_frame(encoded)
    assert frame is not None
    assert (frame.width, frame.height) == (WIDTH, HEIGHT)
    for rows in (1, 8, 40, 128):
        part = Image.open(io.BytesIO(jpeg.first_rows(encoded, frame, rows)))
        # At most the block of the last row, and one more for the interpolation of colours.
        assert rows + frame.block_rows <= part.height < rows + 2 * frame.block_rows
    assert jpeg.first_rows(encoded, frame, HEIGHT) == encoded


@pytest.mark.parametrize("name", OTHER)
def test_other_files_are_left_whole(name):
    assert jpeg.read_frame(OTHER[name]) is None or name in ("on its side", "mirrored")


@pytest.mark.parametrize("decode_as", ["exact", "fast"])
@pytest.mark.parametrize("keep", [0, 1, 2, 3, 20, 300, 0.5, 0.98])
def test_a_file_cut_short_is_refused_wherever_the_crop_lies(decode_as, keep):
    encoded = pillow(photo())
    cut = encoded[: keep if isinstance(keep, int) else int(keep * len(encoded))]
    with pytest.raises(UnreadableImage, match=rf"^cannot decode the image \({len(cut)} bytes\): "):
        crop(cut, (0, 0, 8, 8), decode_as=decode_as)


@pytest.mark.parametrize("decode_as", ["exact", "fast"])
def test_damage_in_the_header_never_ends_in_another_error(decode_as):
    """A wrong byte anywhere in the header leads to an image or to UnreadableImage."""
    encoded = pillow(photo(40, 40), quality=20)
    start = encoded.index(b"\xff\xda")
    for at in range(start + 12):
        damaged = bytearray(encoded)
        damaged[at] ^= 0xFF
        with contextlib.suppress(UnreadableImage):
            assert crop(bytes(damaged), (0, 0, 8, 8), 8, decode_as).shape == (8, 8, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_fast_crop_is_within_two_levels(name, interpolation):
    """Two passes with 16-bit coefficients round by a level or two, up as often as down.

    Bicubic has negative coefficients, which add up to a third level.
    """
    for box in BOXES:
        size = 64  # too large for the decoder to shrink the photo
        fast = crop(PLAIN[name], box, size, "fast", interpolation=interpolation).astype(int)
        difference = fast - whole(PLAIN[name], box, size, interpolation)
        assert np.abs(difference).max() <= (2 if interpolation == "bilinear" else 3)
        assert abs(difference.mean()) < 0.1


@pytest.mark.parametrize("name", [*OTHER, "print colours"])
def test_files_that_the_fast_decoder_cannot_read_are_exact(name):
    for box in BOXES:
        np.testing.assert_array_equal(
            crop(FILES[name], box, decode_as="fast"), whole(FILES[name], box)
        )


def with_sampling(encoded: bytes, sampling: int) -> bytes:
    """Returns the file with other sampling factors, which decodes to another picture."""
    frame = jpeg.read_frame(encoded)
    assert frame is not None
    changed = bytearray(encoded)
    changed[frame.height_at + 6] = sampling  # after height, width, number and name
    return bytes(changed)


@pytest.mark.parametrize("sampling", [0x31, 0x13, 0x42, 0x24])
def test_samplings_that_the_fast_decoder_does_not_know_are_exact(sampling):
    encoded = with_sampling(PLAIN["4:4:4"], sampling)
    for box in BOXES:
        np.testing.assert_array_equal(crop(encoded, box, decode_as="fast"), whole(encoded, box))


def test_too_little_memory_is_no_fault_of_the_image(monkeypatch):
    """Otherwise a run that skips unreadable images would skip sound ones."""

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(PLAIN["4:2:0"])


def test_fast_crops_of_real_photos_stay_near_the_exact_ones(check_data):
    """Checks the bounds in data/fast_decoding.py: of pixels, and of means if the decoder shrinks.

    Shrinking by averaging blocks is not the triangle filter: single pixels at edges differ by up to
    some 30 levels.
    """
    paths = sorted((check_data / "data" / "imagenet_sample").rglob("*.JPEG"))[::10]
    assert len(paths) == 50
    for path in paths:
        encoded = path.read_bytes()
        width, height = Image.open(path).size
        box = (width // 7, height // 9, width - width // 5, height - height // 6)
        for size in (224, 32):
            fast = crop(encoded, box, size, "fast").astype(int)
            difference = np.abs(fast - whole(encoded, box, size))
            if min(box[2:]) >= 4 * size:
                assert difference.mean() < 2, path
            else:
                assert difference.max() <= 2, path
                assert difference.mean() < 0.3, path


@pytest.mark.parametrize(("side", "shrink"), [(127, 1), (128, 2), (255, 2), (256, 4), (512, 8)])
def test_a_large_photo_is_decoded_smaller(monkeypatch, side, shrink):
    import simplejpeg

    sizes = []
    original = simplejpeg.decode_jpeg

    def spy(*args, **options):
        pixels = original(*args, **options)
        sizes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    encoded = pillow(photo(side, side))
    result = crop(encoded, (0, 0, side, side), 32, "fast").astype(int)
    assert sizes == [(-(-side // shrink), -(-side // shrink))]
    # The means of smooth waves with a little noise differ by less than a level.
    assert abs((result - whole(encoded, (0, 0, side, side))).mean()) < 1


def test_fast_without_its_libraries_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"simplejpeg, cykooz_resizer, which .* pip install '\.\[fast\]'"
    ):
        fast_decoding.require()


def test_exact_needs_neither_of_them(monkeypatch):
    for name in ("simplejpeg", "cykooz_resizer"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    box = (3, 5, 90, 11)
    np.testing.assert_array_equal(crop(PLAIN["4:2:0"], box), whole(PLAIN["4:2:0"], box))


@pytest.mark.parametrize("spec", ["random_resized_crop(size)|random_flip(0.5)", "resize(size)"])
def test_a_pipeline_gives_the_same_from_the_file_as_from_the_image(spec):
    transform = make_transform(spec, 24)
    for encoded in FILES.values():
        for seed in range(4):
            np.testing.assert_array_equal(
                pixels_from(transform, encoded, np.random.default_rng(seed)),
                pixels(transform, decode(encoded), np.random.default_rng(seed)),
            )
