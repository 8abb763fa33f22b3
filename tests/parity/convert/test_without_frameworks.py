"""Files of every framework convert where none of them can be imported."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.fuzz import seeds
from tests.support import REPOSITORY, commands, peers

# Converts the files on the command line, and prints the classes of each.
CONVERT = """
import json, sys

class Forbidden:
    names = {"torch", "torchvision", "tensorflow", "keras", "timm", "transformers", "mmengine",
             "mmpretrain", "tf_keras", "ai_edge_litert", "huggingface_hub", "tensorflowjs"}

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Forbidden())
from mbv2_jax.convert import importer

found = {path: len(importer.load(path).saved.classes) for path in sys.argv[1:]}
assert not Forbidden.names & {name.partition(".")[0] for name in sys.modules}
print(json.dumps(found))
"""
PREDICT = (
    CONVERT.partition("found =")[0]
    + """
import mbv2_jax

weights, *photos = sys.argv[1:]
predictor = mbv2_jax.init_model(weights)
print(json.dumps([result["pred_label"] for result in predictor.predict(photos)]))
"""
)


def run(code: str, cache: pathlib.Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env=commands.environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def hub_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes a folder of timm and one of transformers, with five classes."""
    timm, transformers = folder / "timm", folder / "transformers"
    model = peers.timm().create_model("mobilenetv2_035", num_classes=5)
    peers.timm().models.save_for_hf(model, timm, safe_serialization=True)
    module = peers.transformers()
    config = module.MobileNetV2Config(depth_multiplier=0.35, num_labels=5)
    module.MobileNetV2ForImageClassification(config).save_pretrained(transformers)
    return [timm, transformers]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")
def test_every_container_converts(cache, tmp_path):
    files = [path for name in seeds.CONTAINERS for path in seeds.write(name, tmp_path)]
    files += hub_folders(tmp_path)
    found = json.loads(run(CONVERT, cache, *files))
    assert list(found) == list(map(str, files))
    assert set(found.values()) <= {3, 5}  # Keras's have three classes, the others five


def test_the_photos_keep_their_classes(check_data, cache):
    golden = np.load(check_data / "golden" / "mmpretrain_eval.npz")
    folder = check_data / "data" / "imagenet_sample"
    by_name = {path.name: path for path in folder.glob("*/*.JPEG")}
    photos = [by_name[pathlib.Path(str(name)).name] for name in golden["filename"]]
    weights = check_data / "weights" / "mm_mobilenet_v2.pth"
    found = json.loads(run(PREDICT, cache, weights, *photos))
    assert len(found) == 500
    np.testing.assert_array_equal(found, golden["logits"].argmax(-1))
