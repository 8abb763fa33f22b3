"""The handwritten digits of data/digits.py as a TFDS dataset."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from mbv2_jax.data import digits


class Digits(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of the digits; since it yields encoded bytes, it needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "scikit-learn's load_digits; 1,437 to train, 360 held out."}

    # TFDS 4.9 looks beside a builder's code for checksums of downloads, through a package
    # (importlib_resources) that it does not install. The digits need no download.
    code_path = None

    def _info(self) -> Any:
        return self.dataset_info_from_configs(
            description="8 x 8 grey images of handwritten digits (UCI optdigits, the part that"
            " scikit-learn ships).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(digits.CLASS_NAMES)),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,  # so that record i is example i of `digits.load`
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # scikit-learn ships the images
        return {split: self._generate_examples(*arrays) for split, arrays in digits.load().items()}

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": digits.encode(image), "label": int(label)}
