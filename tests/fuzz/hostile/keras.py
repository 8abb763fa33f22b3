"""Hostile files of Keras: HDF5 that links, lies about sizes or nests, and configs."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from . import configs
from .files import Files, Originals, zip_file

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"

Spoil = Callable[[h5py.Group, str], None]  # gets a group, and the name of a dataset to put there


def weights(originals: Originals) -> Files:
    """Returns files with the structure of Keras 3."""
    del originals
    return [_hdf5(spoil, "layers/dense/vars", "1") for spoil in _SPOILS] + [
        _written(write) for write in _KERAS_3
    ]


def whole_model(originals: Originals) -> Files:
    """Returns files with the structure of Keras 2, and real ones with hostile configs."""
    found = [_hdf5(spoil, "model_weights/dense/dense", "bias:0") for spoil in _SPOILS]
    found += [_written(write, libver="latest") for write in _KERAS_2]
    original = originals[0].read_bytes()
    for text in configs.texts(_config_of(original)):
        buffer = io.BytesIO(original)
        with h5py.File(buffer, "r+", libver="latest") as file:
            del file.attrs["model_config"]
            file.attrs["model_config"] = np.void(text.encode()) if "\0" in text else text
        found.append(buffer.getvalue())
    return found


def _config_of(content: bytes) -> Any:
    with h5py.File(io.BytesIO(content), "r") as file:
        return json.loads(file.attrs["model_config"])


def archive(originals: Originals) -> Files:
    """Returns .keras files, whose weights or config are hostile."""
    with zipfile.ZipFile(originals[0]) as original:
        config, plain = original.read(_CONFIG), original.read(_WEIGHTS)
    texts = configs.texts(json.loads(config))
    zeros = bytes(300 << 20)
    return [
        *(zip_file({_CONFIG: text.encode(), _WEIGHTS: plain}, 8) for text in texts),
        *(zip_file({_CONFIG: config, _WEIGHTS: content}) for content in weights(originals)[:12]),
        zip_file({_CONFIG: b'{"a":' + b" " * (60 << 20), _WEIGHTS: plain}, zipfile.ZIP_DEFLATED),
        zip_file({_CONFIG: config, _WEIGHTS: zeros}, zipfile.ZIP_DEFLATED),
        zip_file({_CONFIG: zeros, _WEIGHTS: plain}, zipfile.ZIP_DEFLATED),
        zip_file({_CONFIG: config, _WEIGHTS: b""}),
        zip_file({_CONFIG: config, _WEIGHTS: config}),
        zip_file({f"a/{n}": b"" for n in range(60_000)} | {_CONFIG: config, _WEIGHTS: plain}),
        zip_file({_CONFIG: config, _WEIGHTS: plain, "../../etc/passwd": b"", "/a": b""}),
    ]


# ---- Files ----


def _written(write: Callable[[h5py.File], None], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        write(file)
    return buffer.getvalue()


def _hdf5(spoil: Spoil, place: str, name: str) -> bytes:
    """Returns a file with a dense layer, of which one dataset is hostile."""

    def write(file: h5py.File) -> None:
        group = file.create_group(place)
        group["0"] = np.ones((3, 2), np.float32)
        if place.startswith("model_weights"):
            group["kernel:0"] = group["0"]
            file["model_weights"].attrs["layer_names"] = [b"dense"]
            group.parent.attrs["weight_names"] = [b"dense/kernel:0", b"dense/bias:0"]
        spoil(group, name)

    return _written(write, libver="latest")


def _datasets(*arguments: Any, **options: Any) -> Spoil:
    return lambda group, name: group.create_dataset(name, *arguments, **options)


def _put(value: Any) -> Spoil:
    def spoil(group: h5py.Group, name: str) -> None:
        group[name] = value

    return spoil


def _itself(group: h5py.Group, name: str) -> None:
    group[name] = group.file


def _virtual(group: h5py.Group, name: str) -> None:
    layout = h5py.VirtualLayout((1 << 20,), np.float32)
    layout[:] = h5py.VirtualSource("/etc/hostname", "a", (1 << 20,))
    group.create_virtual_dataset(name, layout)


def _marked(value: Any, **attributes: Any) -> Spoil:
    """Returns a dataset with attributes."""

    def spoil(group: h5py.Group, name: str) -> None:
        group[name] = value
        for key, attribute in attributes.items():
            group[name].attrs[key] = attribute
            group.attrs[key] = attribute

    return spoil


def _often(group: h5py.Group, name: str) -> None:
    group[name] = np.zeros(1 << 20, np.float32)
    for number in range(2, 1_000):
        group[str(number)] = group[name]


def _bytes_name(group: h5py.Group, name: str) -> None:
    group[name] = np.ones(2)
    group.id.links.create_hard(b"\xff\xfe", group.id, name.encode())


_FIELDS = np.dtype([(f"f{index}", "f4") for index in range(1_000)])
_ODD_FLOAT = h5py.h5t.IEEE_F32LE.copy()
_ODD_FLOAT.set_size(64)


def _odd_type(group: h5py.Group, name: str) -> None:
    space = h5py.h5s.create_simple((4,))
    h5py.h5d.create(group.id, name.encode(), _ODD_FLOAT, space)


_SPOILS: list[Spoil] = [
    _datasets((1 << 34,), np.float32, chunks=(1 << 20,)),
    _datasets((1 << 50,), np.float32),
    _datasets((1 << 30, 1 << 30), np.float32),
    _datasets((2,), np.float32, chunks=(1 << 29,), maxshape=(None,)),
    _datasets(data=np.zeros(1 << 24, np.float32), compression="gzip", chunks=(1 << 24,)),
    _datasets(data=np.zeros(1 << 24, np.float32), compression="lzf"),
    _datasets(data=np.zeros(1 << 10, np.float32), fletcher32=True),
    _put(h5py.SoftLink("/layers")),
    _put(h5py.SoftLink("/layers/dense/vars/1")),
    _put(h5py.SoftLink("nothing")),
    _put(h5py.ExternalLink("/etc/passwd", "/")),
    _put(h5py.ExternalLink("/dev/zero", "/")),
    _datasets((100,), np.uint8, external=[("/etc/passwd", 0, 100)]),
    _virtual,
    _itself,
    _put("text"),
    _put(np.bytes_(b"a" * 100)),
    _put(np.zeros(3, _FIELDS)),
    _put(np.zeros(3, "V100000")),
    _put(np.zeros(3, "V2")),
    _put(np.ones(3, complex)),
    _put(np.ones(3, np.longdouble)),
    _put(np.ones(3, ">f8")),
    _put(np.ones(3, bool)),
    _put(np.float32(1)),
    _put(np.zeros((1,) * 32, np.float32)),
    _put(np.zeros((0, 1 << 40), np.float32)),
    _put(h5py.Empty("f4")),
    _put(np.dtype("f4")),  # a type, in place of a dataset
    _datasets((3,), h5py.vlen_dtype(np.float32)),
    _datasets((3,), h5py.ref_dtype),
    _datasets((3,), np.dtype((np.float32, (1 << 10, 1 << 10)))),
    _datasets((2,), np.float32, fillvalue=np.nan),
    _odd_type,
    _often,
    _bytes_name,
    _marked(np.ones(2, np.float32), name="two\nlines\x1b[31m"),
    _marked(np.ones(2, np.float32), name="n" * 1_000_000),
    _marked(np.ones(2, np.float32), name=h5py.Empty("f4")),
    _marked(np.ones(2, np.float32), name=np.zeros((100, 1_000))),
    _marked(np.ones(3, np.float32), dtype="bfloat16"),
    _marked(np.float32(1), dtype="bfloat16"),
]


def _many_groups(file: h5py.File) -> None:
    for number in range(30_000):
        file.create_group(f"layers/a_{number}")


def _deep(file: h5py.File) -> None:
    group = file
    for _ in range(3_000):
        group = group.create_group("a")
    group["vars/0"] = np.ones(3)


def _many_variables(file: h5py.File) -> None:
    for number in range(15_000):
        file[f"layers/dense/vars/{number}"] = 1.0


def _dataset_as_group(file: h5py.File) -> None:
    file["layers/dense/vars"] = np.ones(3, np.float32)
    file["layers/dense_1"] = np.ones(3, np.float32)


def _number_of_a_layer(file: h5py.File) -> None:
    file["layers/dense_" + "9" * 5_000 + "/vars/0"] = np.ones(3, np.float32)


def _shared_variables(file: h5py.File) -> None:
    file["layers/dense/vars/0"] = np.ones(3, np.float32)
    file["layers/dense_1/vars"] = file["layers/dense/vars"]


_KERAS_3 = [_many_groups, _deep, _many_variables, _dataset_as_group, _number_of_a_layer]
_KERAS_3 += [_shared_variables, lambda file: None]


# ---- The structure of Keras 2 ----


def _attributes(layers: Any, names: Any) -> Callable[[h5py.File], None]:
    """Returns a writer of a file that lists layers, and the names of their weights."""

    def write(file: h5py.File) -> None:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = layers
        root["dense/kernel:0"] = np.zeros((512, 512), np.float32)
        root["dense"].attrs["weight_names"] = names

    return write


def _split(file: h5py.File) -> None:
    for number in range(20_000):
        file.attrs[f"layer_names{number}"] = [f"{number}".encode()]


def _dataset_as_model(file: h5py.File) -> None:
    file["model_weights"] = np.ones(3)
    file["model_weights"].attrs["layer_names"] = [b"dense"]


def _config(value: Any) -> Callable[[h5py.File], None]:
    def write(file: h5py.File) -> None:
        _attributes([b"dense"], [b"kernel:0"])(file)
        file.attrs["model_config"] = value

    return write


_KERAS_2 = [
    _attributes([b"dense"], [b"kernel:0"] * 3_000),
    _attributes([b"dense"] * 5_000, [b"kernel:0"]),
    _attributes([b"none"], [b"kernel:0"]),
    _attributes([b"dense"], [b"../../etc/passwd"]),
    _attributes([b"dense"], [b"/model_weights/dense/kernel:0"]),
    _attributes([b"dense"], [b""]),
    _attributes([b"", b"/", b"."], [b"kernel:0"]),
    _attributes([b"\xff"], [b"kernel:0"]),
    _attributes(np.ones(3), [b"kernel:0"]),
    _attributes(h5py.Empty("S1"), [b"kernel:0"]),
    _attributes("dense", "kernel:0"),
    _attributes([b"dense"], np.zeros((3, 3), "S5")),
    _attributes([b"dense"], np.zeros(3, np.dtype([("a", "f4")]))),
    _split,
    _dataset_as_model,
    _config(np.ones(3)),
    _config(h5py.Empty("f4")),
    _config(np.asarray([b"{}"] * 3)),
    _config(7),
]
