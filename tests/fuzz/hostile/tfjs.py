"""Hostile models of TensorFlow.js: paths that lead elsewhere, shapes that lie, and configs."""

import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

from . import configs
from .files import Files, Originals, zip_file


def description(originals: Originals) -> Files:
    """Returns contents of model.json."""
    return [text.encode() for text in _texts(originals[0].read_text())]


def archive(originals: Originals) -> Files:
    """Returns zip archives of a model."""
    members = _members(originals[0])
    (shard,) = members.keys() - {"model.json"}
    zeros = bytes(300 << 20)
    changed = [members | {"model.json": text.encode()} for text in _texts(_text(members))]
    metadata = [members | {"metadata.json": text} for text in _METADATA]
    compressed = zipfile.ZIP_DEFLATED
    return [
        *(zip_file(each, compressed) for each in changed),
        *(zip_file(each, compressed) for each in metadata),
        zip_file(members | {shard: zeros}, compressed),
        zip_file(members | {"model.json": zeros}, compressed),
        zip_file(members | {shard: b""}),
        zip_file({"model.json": members["model.json"]}),
        zip_file({f"{n}/model.json": members["model.json"][:100] for n in range(50_000)}),
        zip_file({f"../../{name}": content for name, content in members.items()}),
        zip_file(members | {"a" * 60_000 + "/model.json": b"{}"}),
    ]


def _members(path: pathlib.Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as original:
        return {name: original.read(name) for name in original.namelist()}


def _text(members: dict[str, bytes]) -> str:
    return members["model.json"].decode()


def _texts(text: str) -> list[str]:
    """Returns texts in place of a real model.json."""
    real = json.loads(text)
    manifests = []
    for change in _CHANGES:
        changed = json.loads(text)
        change(changed["weightsManifest"][0])
        manifests.append(json.dumps(changed))
    mark = '"to be replaced"'
    around = json.dumps(real | {"modelTopology": {"model_config": json.loads(mark)}})
    models = [
        around.replace(mark, config)
        for config in configs.texts(real["modelTopology"]["model_config"])
    ]
    return [
        *manifests,
        *(json.dumps(real | {"weightsManifest": value}) for value in _MANIFESTS),
        *(json.dumps(real | {"modelTopology": value}) for value in _TOPOLOGIES),
        text.replace('"shape": [', '"shape": [1e400, '),
        text.replace('"shape": [', '"shape": [' + "9" * 4_000 + ", "),
        text.replace('"shape": [', '"shape": [' + "9" * 9_000 + ", "),
        *models,
    ]


def _paths(*paths: Any) -> Callable[[Any], None]:
    return lambda group: group.update(paths=list(paths))


def _every(**values: Any) -> Callable[[Any], None]:
    """Returns a change of the description of every array."""

    def change(group: Any) -> None:
        for spec in group["weights"]:
            spec.update(values)

    return change


def _scaled(scale: Any, least: Any = 0.0, **others: Any) -> Callable[[Any], None]:
    return _every(quantization={"dtype": "float32", "scale": scale, "min": least} | others)


def _more(count: int, **spec: Any) -> Callable[[Any], None]:
    """Returns a change that adds arrays."""

    def change(group: Any) -> None:
        plain = {"name": "a/kernel", "shape": [0], "dtype": "float32"}
        group["weights"] += [plain | spec | {"name": f"a{n}/kernel"} for n in range(count)]

    return change


_CHANGES: list[Callable[[Any], None]] = [
    _paths("../../../../etc/passwd"),
    _paths("/etc/passwd"),
    _paths("file:///etc/passwd"),
    _paths("https://example.org/a.bin"),
    _paths("a/../../b.bin"),
    _paths("..\\..\\a.bin"),
    _paths("C:\\a.bin"),
    _paths("group1-shard1of1.bin", "group1-shard1of1.bin"),
    _paths("group1-shard1of1.bin", "./group1-shard1of1.bin", "a/../group1-shard1of1.bin"),
    _paths(*(f"{'./' * n}group1-shard1of1.bin" for n in range(500))),
    _paths("a\0b"),
    _paths("a\nb"),
    _paths("a" * 1_000_000),
    _paths(""),
    _paths("."),
    _paths(None),
    _paths(["a"]),
    _paths("\ud800"),
    _paths(),
    _every(shape=[1 << 62, 4]),
    _every(shape=[1 << 40]),
    _every(shape=[-1]),
    _every(shape=[0] * 100),
    _every(shape=[1] * 10_000),
    _every(shape=[True]),
    _every(shape=[0.5]),
    _every(shape="32"),
    _every(shape=7),
    _every(name="same"),
    _every(name=""),
    _every(name=None),
    _every(name=["a"]),
    _every(name="a\nb\x1b[31m", dtype="a"),
    _every(name="a" * 30_000, dtype="a"),
    _every(dtype="string"),
    _every(dtype=["a"]),
    _every(dtype="complex64"),
    _scaled(float("nan")),
    _scaled(float("inf")),
    _scaled(1e300),
    _scaled(1, 1e300),
    _scaled(10**400),
    _scaled("1"),
    _scaled([1, 2]),
    _scaled(None),
    _scaled(1, dtype="uint8"),
    _scaled(1, dtype="float16"),
    _scaled(1, dtype={}),
    _every(quantization=[1]),
    _every(quantization="a"),
    _more(40_000),
    _more(3_000, shape=[0, 1 << 40]),
    _more(1, shape=[10**300]),
]
_TOPOLOGIES: list[Any] = [None, [], "a", {}, 1e300]
_MANIFESTS: list[Any] = [None, [], {}, "a", [None], [[]], [{}], [{"paths": [], "weights": None}]]
_METADATA = [
    b"[" * 100_000,
    b" " * (60 << 20),
    b'{"labels": [' + b'"",' * 1_000_000 + b'""]}',
    b'{"labels": ["a\\nb\\u001b[31m", "b", "c"]}',
    b'{"labels": ["a", "a", "a"]}',
    b'{"labels": [1]}',
    b'{"labels": {"a": 1}}',
    b'{"labels": ["\\ud800", "b", "c"]}',
    b'{"packageName": ["a"]}',
    b"\xff\xfe",
]
