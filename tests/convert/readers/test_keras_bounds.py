"""HDF5 files and configs made to hang the reader or to fill the memory are refused.

A file of Keras has plain arrays in a tree of groups, and a config of some hundred layers.
"""

import json
import pathlib
import resource
import time
import zipfile
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import pytest

from tests.support.weight_files import refusal


def one_kernel(file: h5py.File) -> h5py.Group:
    """Writes a dense layer, as Keras 3 does; returns its group of variables."""
    variables = file.create_group("layers/dense/vars")
    variables["0"] = np.ones((3, 2), np.float32)
    return variables


def soft_link(file: h5py.File) -> None:
    file["layers/dense/vars/1"] = h5py.SoftLink("/layers/dense/vars/0")


def endless_soft_link(file: h5py.File) -> None:
    file["layers/again"] = h5py.SoftLink("/layers/again")


def group_in_itself(file: h5py.File) -> None:
    file["layers/dense/inner"] = file["layers"]


def declared_only(file: h5py.File) -> None:
    file.create_dataset("layers/dense/vars/1", (1 << 34,), np.float32, chunks=(1 << 20,))


def one_huge_chunk(file: h5py.File) -> None:
    file.create_dataset(
        "layers/dense/vars/1", (2,), np.float32, chunks=(1 << 29,), maxshape=(None,)
    )


def compressed(file: h5py.File) -> None:
    zeros = np.zeros((1 << 12, 1 << 12), np.float32)
    file.create_dataset("layers/dense/vars/1", data=zeros, compression="gzip")


def the_same_array_often(file: h5py.File) -> None:
    array = file.create_dataset("array", data=np.zeros(1 << 20, np.float32))
    for number in range(1, 200):
        file[f"layers/dense_{number}/vars/0"] = array


def many_groups(file: h5py.File) -> None:
    for number in range(30_000):
        file.create_group(f"layers/a_{number}")


def repeated_names(file: h5py.File) -> None:
    file["dense/kernel:0"] = np.zeros((512, 512), np.float32)
    file["dense"].attrs["weight_names"] = [b"kernel:0"] * 3000
    file.attrs["layer_names"] = [b"dense"]


def text(file: h5py.File) -> None:
    file["layers/dense/vars/1"] = "weights"


def group_in_place_of_an_array(file: h5py.File) -> None:
    file.create_group("layers/dense/vars/1")


def array_in_place_of_a_group(file: h5py.File) -> None:
    file["layers/dense_1/vars"] = np.ones(3, np.float32)


def two_lines(file: h5py.File) -> None:
    file["layers/dense/vars"].attrs["name"] = "two\nlines"


def deep_groups(file: h5py.File) -> None:
    file["/".join(["layers", *["a"] * 3_000, "vars/0"])] = np.ones(3)


HDF5: dict[Callable[[h5py.File], None], str] = {
    soft_link: "is a link",
    endless_soft_link: "is a link",
    group_in_itself: "has two names",
    declared_only: "far larger than the file",
    one_huge_chunk: "far larger than the file",
    compressed: "h5repack -f NONE",
    the_same_array_often: "far larger than the file",
    many_groups: "more than 10,000 groups",
    repeated_names: "repeats a name",
    text: "does not hold numbers",
    group_in_place_of_an_array: "has a group in place",
    array_in_place_of_a_group: "is not a group",
    two_lines: "is named 'two\\nlines/",
    deep_groups: "nested too deeply",
}


@pytest.mark.parametrize("write", HDF5, ids=lambda write: write.__name__)
def test_hdf5(write, tmp_path):
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        one_kernel(file)
        write(file)
    assert HDF5[write] in bounded(path)


def bounded(path: pathlib.Path) -> str:
    """Returns the refusal of a file, which has to come soon and without much memory."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refusal(path)
    assert time.monotonic() - started < 10
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # in KiB on Linux
    assert grown < 5 * path.stat().st_size + (300 << 20)
    return line


def layer(name: str, *sources: str, kind: str = "ReLU") -> dict[str, Any]:
    calls = [[[source, 0, 0, {}] for source in sources]] if sources else []
    return {"class_name": kind, "config": {"name": name}, "name": name, "inbound_nodes": calls}


def functional(layers: list[Any], output: str = "a") -> dict[str, Any]:
    ends = {"input_layers": [["in", 0, 0]], "output_layers": [[output, 0, 0]]}
    return {"class_name": "Functional", "config": {"name": "m", "layers": layers, **ends}}


def nested(depth: int) -> dict[str, Any]:
    """Returns a model in a model, and so on."""
    model = layer("a")
    for level in range(depth):
        model = {"class_name": "Sequential", "config": {"name": f"m{level}", "layers": [model]}}
    return model


def against_the_order() -> list[Any]:
    """Returns layers that are listed before their inputs, of which the last one comes late."""
    wide = [layer(f"l{n}", *["in"] * 120, f"l{n - 1}") for n in range(1, 1_500)]
    return [layer("in"), *reversed(wide), layer("l0", "in")]


CONFIGS = {
    "against the order": (functional(against_the_order(), output="z"), "it lacks 'z'"),
    "two of a name": (functional([layer("in"), layer("a", "in"), layer("a", "in")]), "same name"),
    "cycle": (functional([layer("in"), layer("a", "b"), layer("b", "a")]), "cannot be found"),
    "itself": (functional([layer("in"), layer("a", "a")]), "cannot be found"),
    "no such layer": (functional([layer("in"), layer("a", "b")]), "cannot be found"),
    "no such output": (functional([layer("in")], output="z"), "cannot be read"),
    "many layers": (functional([layer(str(i)) for i in range(9000)]), "more than 2000 layers"),
    "deep": (nested(100), "nested too deeply"),
    "no class": (functional([{"name": "in", "config": {}}]), "cannot be read"),
    "other types": (functional([layer("in"), {**layer("a"), "inbound_nodes": 7}]), "be read"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, tmp_path):
    config, reason = CONFIGS[name]
    assert reason in bounded(keras(tmp_path, json.dumps(config)))


def keras(folder: pathlib.Path, config: str) -> pathlib.Path:
    """Writes a .keras file with a dense layer."""
    with h5py.File(folder / "net.h5", "w") as file:
        one_kernel(file)
    with zipfile.ZipFile(folder / "net.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", config)
        archive.write(folder / "net.h5", "model.weights.h5")
    return folder / "net.keras"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "damaged"),
        ("[" + "[],[]," * (8 << 20) + "[]]", "the description of its model has 48 MiB"),
        ('{"class_name": ', "damaged"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "damaged"),
    ],
    ids=["deep", "long", "cut off", "no text"],
)
def test_json(config, reason, tmp_path):
    assert reason in bounded(keras(tmp_path, config))
