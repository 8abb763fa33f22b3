"""The photos with which files are calibrated and checked."""

import numpy as np
import pytest

from mbv2_jax import inference
from mbv2_jax.errors import UserError
from mbv2_jax.export import photos
from mbv2_jax.export.program import Program
from tests.support import tiny_model


def test_a_hundred_photos_of_a_configs_training_split(tmp_path, few_layers):
    pytest.importorskip("sklearn")
    program = Program(inference.open_model(tiny_model.write(tmp_path / "model"), seed=0))
    images = photos.load(program, ["config:digits"], "--calibrate")
    assert images.shape == (100, 32, 32, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 100


def test_a_config_that_is_not_there(tmp_path, few_layers):
    program = Program(inference.open_model(tiny_model.write(tmp_path / "model"), seed=0))
    with pytest.raises(UserError, match=r"there is no config 'digitz'.*did you mean 'digits'"):
        photos.load(program, ["config:digitz"], "--calibrate")
