"""The golden files hold what the installed peers compute; `make golden` writes them anew."""

import json

import numpy as np
import pytest

from mbv2_jax.convert import readers
from tests.golden import inputs, make

# Keras itself warns, on the torch backend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")


@pytest.mark.parametrize("maker", make.MAKERS, ids=lambda maker: maker.__name__)
def test_golden_file_is_current(maker):
    path = inputs.FOLDER / maker.__name__
    computed = maker()
    if not path.with_suffix(".npz").exists():
        assert computed == json.loads(path.with_suffix(".json").read_text())
        return
    stored = np.load(path.with_suffix(".npz"))
    assert set(stored) == set(computed)
    # Another CPU orders sums differently. Keras computes in float32, the others in float64, in
    # which training amplifies rounding tenfold a step.
    tolerance = 1e-5 if maker is make.keras else 1e-8
    for name, value in computed.items():
        assert np.abs(value - stored[name]).max() <= tolerance * np.abs(stored[name]).max(), name


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "checkpoint.pth"])
def test_files_of_every_serialisation_are_read(name):
    folder = inputs.FOLDER / "weights"
    expected = dict(np.load(folder / "values.npz"))
    found = readers.read(folder / name).tensors
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
