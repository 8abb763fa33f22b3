"""scikit-learn's handwritten digits: real images without a download.

The command writes held-out digits as image files, to predict from:

    python -m mbv2_jax.data.digits --export=DIR [--count=10] [--scenes[=yolo]]
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mbv2_jax.data.sample import Boxes
from mbv2_jax.errors import UserError, report
from mbv2_jax.installed import require

TEST_EXAMPLES = 360
CLASS_NAMES = tuple(str(digit) for digit in range(10))


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loads the 1,797 digits, split the same way on every machine.

    "test" has the same number of examples of every class, 36, taken in a seeded order, since the
    file groups them by writer.

    Returns:
      {"train": (images, labels), "test": (images, labels)} of 1,437 and 360 examples; images are
      uint8 (N, 8, 8) from 0 to 255, labels int64 (N,).

    Raises:
      UserError: scikit-learn is not installed.
    """
    require("the digits dataset", "sklearn", extra="demo")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    labels = digits.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(labels))  # a stream that NumPy never changes
    per_class = TEST_EXAMPLES // len(CLASS_NAMES)
    test = np.concatenate([order[labels[order] == label][:per_class] for label in range(10)])
    held_out = np.isin(order, test)
    return {
        "train": (images[order[~held_out]], labels[order[~held_out]]),
        "test": (images[order[held_out]], labels[order[held_out]]),
    }


def encode(image: np.ndarray) -> bytes:
    """Returns the PNG file of a grey image, uint8 (8, 8)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def export(directory: Path, count: int) -> list[Path]:
    """Writes the first `count` held-out digits as `digit_LABEL_INDEX.png` into `directory`.

    The files hold the dataset's own 8 x 8 pixels, so that a prediction sees the same image as an
    evaluation.

    Returns:
      The files' paths.

    Raises:
      UserError: `count` is impossible, or a file cannot be written.
    """
    images, labels = load()["test"]
    if not 1 <= count <= len(labels):
        raise UserError(f"--count={count} must be from 1 to {len(labels)}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for index in range(count):
            path = directory / f"digit_{labels[index]}_{index}.png"
            path.write_bytes(encode(images[index]))
            paths.append(path)
    except OSError as error:
        raise UserError(f"cannot write to --export={directory}: {error.strerror}") from error
    return paths


def export_scenes(directory: Path, count: int) -> list[Path]:
    """Writes the first `count` test scenes of digits with their masks, as `pairs:DIR` reads them.

    They are test/images/scene_INDEX.png, test/masks/scene_INDEX.png and classes.txt in `directory`.

    Returns:
      The images' paths.

    Raises:
      UserError: `count` is impossible, or a file cannot be written.
    """
    from mbv2_jax.data.sources.digit_scenes import DigitScenes  # which imports this module

    scenes = DigitScenes("test")
    if not 1 <= count <= len(scenes):
        raise UserError(f"--count={count} must be from 1 to {len(scenes)}")
    try:
        for kind in ("images", "masks"):
            (directory / "test" / kind).mkdir(parents=True, exist_ok=True)
        (directory / "classes.txt").write_text("\n".join(scenes.class_names) + "\n")
        paths = []
        for index in range(count):
            scene = scenes[index]
            path = directory / "test" / "images" / f"scene_{index}.png"
            path.write_bytes(scene.image)
            scene.targets["mask"].save(directory / "test" / "masks" / path.name)
            paths.append(path)
    except OSError as error:
        raise UserError(f"cannot write to --export={directory}: {error.strerror}") from error
    return paths


def export_boxes(directory: Path, count: int) -> list[Path]:
    """Writes scenes of digits with their boxes, as `yolo:DIR` reads them.

    They are the first `count` of the training scenes and of the test scenes: images/train and
    images/val, with labels/ beside them and data.yaml.

    Returns:
      The images' paths.

    Raises:
      UserError: `count` is impossible, or a file cannot be written.
    """
    from mbv2_jax.data.sources.digit_scenes import SIDE, SIZES, BoxedDigitScenes

    if not 1 <= count <= SIZES["test"]:
        raise UserError(f"--count={count} must be from 1 to {SIZES['test']}")
    try:
        paths = []
        for split, name in (("train", "train"), ("test", "val")):
            scenes = BoxedDigitScenes(split)
            images, labels = (directory / kind / name for kind in ("images", "labels"))
            images.mkdir(parents=True, exist_ok=True)
            labels.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                scene = scenes[index]
                path = images / f"scene_{index}.png"
                path.write_bytes(scene.image)
                text = _yolo_lines(scene.targets["boxes"], SIDE)
                (labels / f"scene_{index}.txt").write_text(text)
                paths.append(path)
        listing = "".join(f"  {number}: '{name}'\n" for number, name in enumerate(CLASS_NAMES))
        text = f"train: images/train\nval: images/val\nnames:\n{listing}"
        (directory / "data.yaml").write_text(text)
    except OSError as error:
        raise UserError(f"cannot write to --export={directory}: {error.strerror}") from error
    return paths


def _yolo_lines(boxes: Boxes, side: int) -> str:
    """Returns the text of a file of labels, for a square picture of `side` pixels."""
    low, high = boxes.corners[:, :2] / side, boxes.corners[:, 2:] / side
    shares = np.concatenate([(low + high) / 2, high - low], axis=1).tolist()
    return "".join(
        f"{label} {' '.join(map(str, each))}\n"
        for label, each in zip(boxes.labels.tolist(), shares, strict=True)
    )


_SCENES = {"pairs": export_scenes, "yolo": export_boxes}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mbv2_jax.data.digits",
        description="Write held-out handwritten digits as PNG files, to predict from.",
        epilog="examples: python -m mbv2_jax.data.digits --export=digits --count=10; "
        "python -m mbv2_jax.data.digits --export=scenes --scenes=yolo --count=100",
    )
    parser.add_argument(
        "--export",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the files digit_LABEL_INDEX.png; created if missing",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=10,
        metavar="N",
        help=f"number of images, up to {TEST_EXAMPLES} digits or 200 scenes (default: 10)",
    )
    parser.add_argument(
        "--scenes",
        nargs="?",
        const="pairs",
        choices=tuple(_SCENES),
        help="write scenes of several digits: with masks, for segmentation, as pairs:DIR reads "
        "them (pairs, the default); or with boxes, for detection, as yolo:DIR reads them, N for "
        "training and N for evaluation (yolo)",
    )
    options = parser.parse_args(arguments)
    try:
        write = _SCENES[options.scenes] if options.scenes else export
        paths = write(options.export, options.count)
    except UserError as error:
        return report(error)
    kind = "scenes" if options.scenes else "digits"
    print(f"wrote {len(paths)} {kind} to {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
