"""Decoding and geometry against mmpretrain, torchvision and OpenCV: the same pixels."""

import io
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image

from mbv2_jax.data.decoding import decode
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.data.transforms.resize_and_crop import RandomFlip, RandomResizedCrop
from tests.support import peers
from tests.support.samples import change, pixels, pixels_from

RNG = np.random.default_rng(0)  # for the transforms that draw nothing


def photo(width: int, height: int, channels: int = 3, high: int = 255) -> np.ndarray:
    """Returns a smooth picture with some noise, (height, width, channels) uint8 or uint16."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + k)) + np.cos(y / (7 + k)) for k in range(channels)]
    noisy = np.stack(waves, -1) / 4 + 0.5 + rng.normal(0, 0.02, (height, width, channels))
    return (np.clip(noisy, 0, 1) * high).astype(np.uint8 if high == 255 else np.uint16)


@pytest.fixture(scope="module")
def mmpretrain_transforms():
    peers.mmpretrain()
    import mmcv.transforms
    import mmpretrain.datasets.transforms

    return mmpretrain.datasets.transforms, mmcv.transforms


# Both orientations, odd sides whose halves round to the even number, long sides that truncate.
@pytest.mark.parametrize("size", [(300, 200), (201, 333), (256, 256), (257, 411), (640, 271)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_edge_and_center_crop_are_mmpretrains(mmpretrain_transforms, size, interpolation):
    ours_mm, mmcv_transforms = mmpretrain_transforms
    image = photo(*size)
    result = {"img": image}
    result = ours_mm.ResizeEdge(101, backend="pillow", interpolation=interpolation)(result)
    expected = mmcv_transforms.CenterCrop(90)(result)["img"]
    transform = make_transform(
        f"resize_edge(101, interpolation='{interpolation}')|center_crop(90)", 224
    )
    np.testing.assert_array_equal(pixels(transform, Image.fromarray(image), RNG), expected)


# Ordinary sides, and sides so long that no box fits and the central crop is taken.
@pytest.mark.parametrize("size", [(500, 375), (90, 120), (64, 64), (900, 60), (60, 900), (1, 7)])
def test_random_resized_crop_is_mmpretrains_draw_by_draw(mmpretrain_transforms, monkeypatch, size):
    """mmpretrain's own code, given our random numbers, takes the same boxes and pixels."""
    ours_mm, _ = mmpretrain_transforms
    image = photo(*size)
    theirs = ours_mm.RandomResizedCrop(32, backend="pillow")
    ours = RandomResizedCrop(32)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "uniform", rng.uniform)
            patch.setattr(np.random, "randint", rng.integers)
            expected = theirs({"img": image})["img"]
        crop = change(ours, Image.fromarray(image), np.random.default_rng(seed))
        np.testing.assert_array_equal(np.asarray(crop), expected)


def test_500_photos_give_the_training_crops_of_mmpretrain(
    mmpretrain_transforms, monkeypatch, check_data
):
    """mmpretrain's own pipeline, in which OpenCV decodes, gets our boxes and flips."""
    ours_mm, mmcv_transforms = mmpretrain_transforms
    load = mmcv_transforms.LoadImageFromFile(to_float32=False)
    crop = ours_mm.RandomResizedCrop(224, backend="pillow")
    flip = mmcv_transforms.RandomFlip(prob=1.0)
    ours = make_transform("random_resized_crop(size)|random_flip(0.5)", 224)
    different, flips = [], 0
    paths = sorted((check_data / "data" / "imagenet_sample").rglob("*.JPEG"))
    for seed, path in enumerate(paths):
        rng = np.random.default_rng(seed)
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "uniform", rng.uniform)
            patch.setattr(np.random, "randint", rng.integers)
            # OpenCV gives B, G, R, which mmpretrain's preprocessor turns round for the network.
            result = crop(load({"img_path": str(path)}))
        if rng.random() < 0.5:
            result, flips = flip(result), flips + 1
        crop_of_ours = pixels_from(ours, path.read_bytes(), np.random.default_rng(seed))
        if not np.array_equal(crop_of_ours, result["img"][..., ::-1]):
            different.append(path.name)
    assert len(paths) == 500
    assert 200 < flips < 300
    assert different == []


def test_random_resized_crop_of_a_box_is_torchvisions():
    peers.torchvision()
    from torchvision.transforms import functional

    image = Image.fromarray(photo(500, 375))
    for seed in range(20):
        left, top, width, height = RandomResizedCrop(224).box(500, 375, np.random.default_rng(seed))
        expected = functional.resized_crop(image, top, left, height, width, [224, 224])
        crop = change(RandomResizedCrop(224), image, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.asarray(crop), np.asarray(expected))


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the largest difference between two samples' cumulative distributions."""
    both = np.sort(np.concatenate([first, second]))
    shares = [np.searchsorted(np.sort(s), both, side="right") / len(s) for s in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def test_random_resized_crop_draws_as_torchvision_does():
    """Area, ratio and place have the distributions of torchvision's get_params."""
    peers.torchvision()
    import torch
    from torchvision.transforms import RandomResizedCrop as Peer

    torch.manual_seed(0)
    image, draws = Image.new("RGB", (500, 375)), 4000
    theirs = np.array([Peer.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)])
    rng = np.random.default_rng(0)
    boxes = np.array([RandomResizedCrop(224).box(500, 375, rng) for _ in range(draws)])
    ours = boxes[:, [1, 0, 3, 2]]  # top, left, height, width, as torchvision's
    for name, values in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
    }.items():
        # Kolmogorov and Smirnov's distance: if both draw from one distribution, it exceeds
        # 1.95 sqrt(2 / draws) once in a thousand times, and both seeds are fixed.
        assert distance(values(ours), values(theirs)) < 1.95 * np.sqrt(2 / draws), name


def test_random_flip_flips_as_mmcv(mmpretrain_transforms):
    _, mmcv_transforms = mmpretrain_transforms
    image = photo(40, 30)
    expected = mmcv_transforms.RandomFlip(prob=1.0)({"img": image})["img"]
    flipped = change(RandomFlip(1.0), Image.fromarray(image), RNG)
    np.testing.assert_array_equal(np.asarray(flipped), expected)


def pillow_file(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opencv_file(pixels: np.ndarray, extension: str) -> bytes:
    return cv2.imencode(extension, pixels)[1].tobytes()


def files() -> dict[str, bytes]:
    rgb, grey = Image.fromarray(photo(60, 40)), Image.fromarray(photo(60, 40, 1)[..., 0])
    rgba = Image.fromarray(photo(60, 40, 4))
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    found = {
        "rgb.jpg": pillow_file(rgb, "JPEG"),
        "progressive.jpg": pillow_file(rgb, "JPEG", progressive=True),
        "grey.jpg": pillow_file(grey, "JPEG"),
        "grey.png": pillow_file(grey, "PNG"),
        "grey-transparent.png": pillow_file(grey, "PNG", transparency=5),
        "grey-alpha.png": pillow_file(rgba.convert("LA"), "PNG"),
        "rgba.png": pillow_file(rgba, "PNG"),
        "rgba.webp": pillow_file(rgba, "WEBP", lossless=True),
        "palette.png": pillow_file(palette, "PNG"),
        "palette-transparent.png": pillow_file(palette, "PNG", transparency=3),
        "palette-alpha.png": pillow_file(palette, "PNG", transparency=bytes([0, 128, 255])),
        "1-bit.png": pillow_file(grey.convert("1"), "PNG"),
        "16-bit-grey.png": opencv_file(photo(60, 40, 1, 65535), ".png"),
        "16-bit-grey.tif": opencv_file(photo(60, 40, 1, 65535), ".tiff"),
        "16-bit-grey.pgm": opencv_file(photo(60, 40, 1, 65535), ".pgm"),
        "16-bit-rgb.png": opencv_file(photo(60, 40, 3, 65535), ".png"),
        "16-bit-rgba.png": opencv_file(photo(60, 40, 4, 65535), ".png"),
        "rgb.bmp": pillow_file(rgb, "BMP"),
        "rgb.ppm": pillow_file(rgb, "PPM"),
        "rgb.tif": pillow_file(rgb, "TIFF"),
    }
    for orientation, kind in itertools.product(range(1, 9), ("JPEG", "PNG", "WEBP")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "WEBP" else {}
        found[f"orientation-{orientation}.{kind.lower()}"] = pillow_file(
            rgb, kind, exif=exif, **options
        )
    return found


def opencv_rgb(encoded: bytes) -> np.ndarray:
    bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None
    return bgr[..., ::-1]


@pytest.mark.parametrize("name", files())
def test_decode_gives_the_pixels_of_opencv(name):
    encoded = files()[name]
    np.testing.assert_array_equal(np.asarray(decode(encoded)), opencv_rgb(encoded))


def test_decode_of_cmyk_is_opencvs_to_one_level():
    """JPEG files in CMYK hold inverted samples, as Adobe defined."""
    encoded = pillow_file(Image.fromarray(photo(60, 40)).convert("CMYK"), "JPEG", quality=95)
    # OpenCV shifts by 8 bits (divides by 256) where Pillow divides by 255: one level at most.
    ours, theirs = np.asarray(decode(encoded)).astype(int), opencv_rgb(encoded).astype(int)
    np.testing.assert_allclose(ours, theirs, atol=1)
