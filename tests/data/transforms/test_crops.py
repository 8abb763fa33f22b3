"""500 photos give the crops that mmpretrain cut of them."""

import hashlib

import numpy as np

from mbv2_jax.data.decoding import decode
from mbv2_jax.data.transforms.pipeline import make_transform
from tests.support.samples import pixels

RNG = np.random.default_rng(0)  # for the transforms that draw nothing


def test_500_photos_give_the_crops_of_mmpretrain(check_data):
    golden = np.load(check_data / "golden" / "mmpretrain_eval.npz")
    transform = make_transform("resize_edge(256)|center_crop(size)", 224)
    folder = check_data / "data" / "imagenet_sample"
    different = []
    for filename, expected in zip(golden["filename"], golden["crop_sha256"], strict=True):
        (path,) = folder.rglob(str(filename).rsplit("/", 1)[-1])
        crop = pixels(transform, decode(path.read_bytes()), RNG)
        if hashlib.sha256(np.ascontiguousarray(crop).tobytes()).hexdigest() != str(expected):
            different.append(path.name)
    assert len(golden["filename"]) == 500
    assert different == []
