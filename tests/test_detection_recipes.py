"""The recipes of detection: published sizes, TensorFlow's hyperparameters, and variants.

Those of mmdet are compared with its own config in tests/parity/test_detection_recipe.py.
"""

import numpy as np
import pytest

from mbv2_jax.errors import UserError
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import info
from tests.support.recipes import rates, recipe, steps_per_epoch

NAME = "ssdlite_mobilenet_v2_coco"


def test_the_size_of_mmdets_network():
    text = info.describe(recipe(NAME))
    assert "4,228,788" in text  # counted by torch in mmdet's network
    assert "746,206,144" in text  # of its convolutions


def test_the_size_of_the_papers_network():
    """Table 6: 4.3 M parameters and 0.8 B multiply-adds, at 320 x 320."""
    config = recipe(NAME, "tf")
    config.data.image_size = 320
    totals = dict(line.rsplit(maxsplit=1) for line in info.describe(config).splitlines()[-2:])
    parameters, multiply_adds = (
        int(totals[name].replace(",", "")) for name in ("parameters", "multiply-adds")
    )
    assert round(parameters / 1e6, 1) == 4.3
    assert round(multiply_adds / 1e9, 1) == 0.8


def test_the_rates_of_mmdet():
    """117,266 images are 611 batches of 192; the rate rises to 0.015 in 500 steps, and falls."""
    steps = np.array([0, 500, 500 + 366_100 // 2, 366_600])
    wanted = [0.015 * 0.001, 0.015, 0.0075, 0]
    np.testing.assert_allclose(rates(recipe(NAME), steps, 117_266), wanted, rtol=1e-9, atol=1e-15)


def test_the_recipe_of_tensorflow():
    """Copied from samples/configs/ssdlite_mobilenet_v2_coco.config of object_detection."""
    config = recipe(NAME, "tf")
    steps = steps_per_epoch(config, 118_287)
    assert (config.batch_size, round(config.num_epochs * steps)) == (24, 200_000)
    found = rates(config, np.array([0, 199_999, 800_719, 800_720]), 118_287)
    np.testing.assert_allclose(found, [0.004, 0.004, 0.004, 0.004 * 0.95], rtol=1e-9)
    optimizer, model = config.optimizer, config.model
    assert (optimizer.name, optimizer.momentum) == ("rmsprop", 0.9)
    assert (optimizer.rms_decay, optimizer.epsilon, optimizer.weight_decay) == (0.9, 1.0, 4e-5)
    assert (model.bn_momentum, model.bn_epsilon, model.padding) == (0.9997, 1e-3, "same")
    assert (model.score_threshold, model.nms_iou, model.max_detections) == (1e-8, 0.6, 100)
    assert not model.clip_first  # post_processing.py clips what NMS leaves
    assert (config.negative_ratio, config.min_negatives) == (3, 3)
    scales = [0.2 + (0.95 - 0.2) * i / 5 for i in range(6)]
    assert config.model.anchor_sizes == pytest.approx((*scales, 1.0), rel=1e-12)


def test_the_variants():
    with pytest.raises(UserError, match=r"no variant 'tensorflow'.*'tf'"):
        recipe(NAME, "tensorflow")


@pytest.mark.parametrize("name", ["finetune_detection", "digit_scenes_detection"])
def test_small_recipes_resolve(name):
    config = recipe(name)
    config.model.num_classes = 10
    spec, task = config_lib.resolve(config_lib.read(config), None)
    assert spec.task == "detection"
    assert task.head.num_classes == 10
    assert spec.preprocessing.eval_transforms == "resize(size)"
