"""The recipes of segmentation: the paper's figures, TensorFlow's hyperparameters, a few steps."""

import pytest

from mbv2_jax.errors import UserError
from mbv2_jax.training import config as config_lib
from mbv2_jax.training import info
from mbv2_jax.training.schedule import epochs_to_steps, schedule
from tests.support.recipes import recipe

NAME = "deeplabv3_mobilenet_v2_voc"


def test_the_size_of_the_papers_network():
    """Table 7: 2.11 M parameters and 2.75 B multiply-adds; with ASPP 4.52 M parameters."""
    text = info.describe(recipe(NAME))
    assert "2,113,557" in text and "2,740,709,056" in text  # transformers' port, counted by hooks
    assert "4,523,541" in info.describe(recipe(NAME, "aspp"))


def test_the_recipe_of_tensorflows_deeplab():
    """Its train.py: 30,000 steps of 16, 0.007 * (1 - step / 30,000) ** 0.9, momentum 0.9, 4e-5."""
    config = recipe(NAME)
    settings = config_lib.read(config)
    steps = -(-10_582 // config.batch_size)
    total = epochs_to_steps(config.num_epochs, steps)
    assert total == 30_000
    rate = schedule(settings.schedule, config.batch_size, steps, total)
    for step in (0, 15_000, 29_000):
        wanted = 0.007 * (1 - step / 30_000) ** 0.9
        assert float(rate(step)) == pytest.approx(wanted, rel=1e-5)  # float32
    assert (settings.optimizer.name, settings.optimizer.momentum) == ("sgd", 0.9)
    assert settings.optimizer.weight_decay == 4e-5


def test_the_variants():
    fields = {
        variant: (model.output_stride, tuple(model.aspp_rates))
        for variant in ("", "os8", "aspp", "aspp_os8")
        for model in [recipe(NAME, variant).model]
    }
    rates = (6, 12, 18)
    assert fields == {"": (16, ()), "os8": (8, ()), "aspp": (16, rates), "aspp_os8": (8, rates)}
    with pytest.raises(UserError, match=r"no variant 'os16'.*'os8'"):
        recipe(NAME, "os16")
