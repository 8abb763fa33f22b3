"""Pictures for comparing transforms."""

import numpy as np
from PIL import Image

# Both orientations, odd and even sides.
SIZES = [(64, 48), (37, 61), (50, 50), (1, 9)]


def draw_pictures() -> list[Image.Image]:
    """Returns synthetic pictures: waves with noise, and one of a single colour."""
    rng = np.random.default_rng(0)
    made = [Image.new("RGB", (20, 30), (17, 130, 255))]
    for width, height in SIZES:
        y, x = np.mgrid[0:height, 0:width]
        waves = np.stack([np.sin(x / (3 + k)) + np.cos(y / (5 + k)) for k in range(3)], -1)
        noisy = 128 + 50 * waves + rng.normal(0, 10, (height, width, 3))
        made.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return made


def assert_same(ours: Image.Image, theirs: Image.Image, what: object) -> None:
    assert ours.mode == theirs.mode == "RGB"
    assert ours.size == theirs.size
    # Compared before numpy is asked for a message: this runs tens of thousands of times.
    assert ours.tobytes() == theirs.tobytes(), what
