"""docs/library.md runs as it is written, on generated photos and a small random network."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support import REPOSITORY, commands

CLASSES = ("black", "blue", "green", "red", "white")
COLOURS = np.array([(30, 30, 30), (30, 30, 220), (30, 220, 30), (220, 30, 30), (225, 225, 225)])

# Besides the name of the weights, which would be downloaded, nothing of the page is replaced.
SCRIPT = """
import json
import numpy as np
from tests.support import document

names = document.run("library.md", {'"mmpretrain"': '"mobilenet_v2_0.35_96"'})
logits = np.asarray(names["predictor"](names["pixels"][:3]))
result = {
    "evaluated": next(json.loads(l) for l in names["outputs"][0].splitlines() if l[0] == "{"),
    "right": float(np.mean(names["right"])),
    "losses": [float(names["loss"]), float(names["metrics"]["loss"])],
    "exported": float(abs(np.asarray(names["logits"]) - logits).max() / abs(logits).max()),
    "maps": [list(each.shape) for each in names["maps"]],
    "pixel_loss": float(names["value"]),
    "box_loss": float(names["box_value"]),
    "objects": {name: len(values) for name, values in names["objects"].items()},
    "mask": [list(names["found"][0]["mask"].shape), len(names["found"])],
    "step": int(names["current"].step),
    "channels": [list(names["pyramid"].module.channels), [m.shape[-1] for m in names["maps"]]],
    "reductions": list(names["pyramid"].module.reductions),
}
print("result", json.dumps(result))
"""


def write_photos(folder: pathlib.Path) -> None:
    """Writes photos of five plain colours with noise: eight a class to train on, three beside."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in zip(CLASSES, COLOURS, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 10, (110, 120, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.jpg")


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path, cache):
    write_photos(tmp_path / "photos")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=commands.environment(cache) | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("result "))
    # The command, on the saved model, counts what the predictor did.
    assert result["evaluated"]["examples"] == 15
    np.testing.assert_allclose(result["evaluated"]["top1"], 100 * result["right"], rtol=1e-6)
    assert np.isfinite(result["losses"]).all()
    # The same program, compiled for a batch of any size: sums of float32 in another order.
    assert result["exported"] < 1e-5
    assert [shape[1:3] for shape in result["maps"]] == [[24, 24], [12, 12], [6, 6], [6, 6]]
    assert result["channels"][0] == result["channels"][1]
    assert result["reductions"] == [4, 8, 16, 16]
    assert np.isfinite(result["pixel_loss"])
    assert result["mask"] == [[110, 120], 2]
    assert np.isfinite(result["box_loss"])
    assert set(result["objects"]) == {"boxes", "scores", "labels", "classes"}
    assert len(set(result["objects"].values())) == 1  # as many of each
    assert result["step"] == 10
    assert (tmp_path / "runs" / "averaged" / "model.json").is_file()
