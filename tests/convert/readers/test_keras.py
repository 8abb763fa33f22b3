"""HDF5 files that do not hold a network's weights are refused."""

import h5py
import numpy as np

from tests.support.weight_files import refusal


def test_other_hdf5_files(tmp_path):
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.ones(3)
    assert "no layers" in refusal(path)


def test_arrays_of_other_files_are_not_read(tmp_path):
    """HDF5 can point to any file that the reader may open."""
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["a"] = np.ones(3)
        file["layer/vars/0"] = np.ones(3)
        file["layer"].attrs["weight_names"] = ["vars/0"]
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file.create_group("layers/dense/vars")["0"] = h5py.ExternalLink(str(secret), "/a")
    assert "another file" in refusal(tmp_path / "linked.h5")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("layers")["dense"] = h5py.ExternalLink(str(secret), "/layer")
    assert "another file" in refusal(tmp_path / "group.h5")
    with h5py.File(tmp_path / "root.h5", "w") as file:
        file["layers"] = h5py.ExternalLink(str(secret), "/")  # where "layer" lies
    assert "another file" in refusal(tmp_path / "root.h5")
    with h5py.File(tmp_path / "keras_2.h5", "w") as file:
        file.attrs["layer_names"] = ["layer"]
        file["layer"] = h5py.ExternalLink(str(secret), "/layer")
    assert "another file" in refusal(tmp_path / "keras_2.h5")
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((3,), np.float64)
        layout[:] = h5py.VirtualSource(str(secret), "a", (3,))
        file.create_group("layers/dense/vars").create_virtual_dataset("0", layout)
    assert "another file" in refusal(tmp_path / "virtual.h5")
    with h5py.File(tmp_path / "external.h5", "w") as file:
        group = file.create_group("layers/dense/vars")
        group.create_dataset("0", (3,), np.uint8, external=[(str(secret), 0, 3)])
    assert "another file" in refusal(tmp_path / "external.h5")
