"""Files that were made to harm whoever opens them, container by container."""

import io
import json
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable

Files = list[bytes]


def files(name: str, originals: list[pathlib.Path]) -> Files:
    """Returns the hostile files of one container.

    Args:
      name: of the container.
      originals: real files of it.
    """
    make = _MAKERS.get(name)
    return make(originals) if make else []


# ---- PyTorch ----

_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def _integer(value: int) -> bytes:
    return pickle.LONG1 + bytes([8]) + struct.pack("<q", value)


def _tensor(count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Returns the instructions of a tensor in a storage of `count` numbers, in a zip archive."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu"
    storage += _integer(count) + b"tQ"
    sizes, strides = (b"(" + b"".join(map(_integer, each)) + b"t" for each in (size, stride))
    return _TENSOR + b"(" + storage + _integer(offset) + sizes + strides + b"\x89NtR"


def _pickles() -> list[bytes]:
    """Returns the bodies of hostile pickles, without protocol and stop."""
    key = b"X\1\0\0\0a"
    deep = 200_000
    shared = b"".join(b"q\1h\1h\1\x86" for _ in range(60))  # a tuple of itself twice, 60 times
    return [
        b"cposix\nsystem\n(X\4\0\0\0truetR",
        b"cbuiltins\nexec\n(X\4\0\0\0passtR",
        b"cbuiltins\neval\n(X\1\0\0\x001tR",
        b"csubprocess\nPopen\n(X\4\0\0\0truetR",
        b"(X\4\0\0\0trueios\nsystem\n",
        b"(cos\nsystem\nX\4\0\0\0trueo",
        b"cbuiltins\ngetattr\n(cbuiltins\nprint\nX\4\0\0\0nametR(tR",
        b"\x8c\5posix\x8c\6system\x93(X\4\0\0\0truetR",
        b"}" * 3_000_000,
        b"]" * deep + b"a" * (deep - 1),
        b"}" + (key + b"}") * deep + b"s" * deep,
        b"(" * 3_000_000,
        b"]q\0h\0a",  # a list that holds itself
        b"})" + shared + b"Ns",  # as a key: its hash takes 2**60 steps
        b"}r\xff\xff\xff\x7f",  # a place in the memo that would take 16 GB
        b"j\xff\xff\xff\x7f",
        b"\x8e" + struct.pack("<Q", 1 << 60) + b"a",
        b"T" + struct.pack("<i", (1 << 31) - 1) + b"a",
        b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"a",
        b"I" + b"9" * 1_000_000 + b"\n",
        b"}" + b"".join(b"I%d\nN" % (n * ((1 << 61) - 1)) + b"s" for n in range(100_000)),
        b"N" * 10 + b"0" * 100,
        b"h\5",
        b"\x82\1",
        b"Pabc\n",
        b"}" + key + _tensor(10, (1 << 40,), (0,)) + b"s",
        b"}" + key + _tensor(10, (1 << 20, 1 << 20), (0, 0)) + b"s",
        b"}"
        + b"".join(
            b"X\5\0\0\0" + b"%05d" % n + _tensor(1, (1 << 20,), (0,)) + b"s" for n in range(2_000)
        ),
        b"}" + key + _tensor(1 << 40, (1 << 40,), (1,)) + b"s",
        b"}" + key + _tensor(10, (5,), (-1,)) + b"s",
        b"}" + key + _tensor(10, (5,), (1,), -3) + b"s",
        b"}" + key + _tensor(10, (5,), (1 << 60,)) + b"s",
        b"}" + key + _tensor(10, (1,) * 100, (1,) * 100) + b"s",
        b"}" + key + _tensor(10, (0,), (1,), 1 << 60) + b"s",
        *_modules(),
    ]


def _modules() -> list[bytes]:
    """Returns whole models whose modules lie in themselves, or in each other many times."""

    def module(children: bytes) -> bytes:
        state = b"}(X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}X\x08\0\0\0_modules}" + children
        return b"ctorch.nn.modules.module\nModule\n)\x81q\7" + state + b"ub"

    itself = module(b"X\1\0\0\0ah\7s")
    twice = module(b"")
    for _ in range(40):
        twice = b"(" + twice + b"l0" + module(b"")  # placed in the memo, and used twice below
    nested = module(b"")
    for _ in range(45):
        nested = module(b"X\1\0\0\0a" + nested + b"s")
    return [itself, twice, nested]


def _torch_zip(originals: list[pathlib.Path]) -> Files:
    found = []
    for body in _pickles():
        found.append(_zip({"a/data.pkl": b"\x80\2" + body + b".", "a/data/0": bytes(40)}))
    state = originals[-1].read_bytes()
    bomb = _zip({"a/data.pkl": bytes(300 << 20)}, zipfile.ZIP_DEFLATED)
    tensor = b"\x80\2}X\1\0\0\0a" + _tensor(75 << 20, (75 << 20,), (1,)) + b"s."
    return [
        *found,
        bomb,
        _zip({"a/data.pkl": tensor, "a/data/0": bytes(300 << 20)}, zipfile.ZIP_DEFLATED),
        _zip({f"a/{n}": b"" for n in range(60_000)} | {"a/data.pkl": b"\x80\2}."}),
        _zip({"a/data.pkl": b"\x80\2}.", "b/data.pkl": b"\x80\2}."}),
        _zip({"../../a/data.pkl": b"\x80\2}."}),
        state + state,
        state[: len(state) // 2] + state,
    ]


def _torch_legacy(originals: list[pathlib.Path]) -> Files:
    head = originals[0].read_bytes()
    second = head.index(b".", head.index(b".") + 1) + 1
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)
    head = head[:second] + system
    keys = pickle.dumps(["0"], 2)
    data = struct.pack("<q", 10) + bytes(40)
    none = pickle.dumps([], 2)
    # There a storage has a fifth field, a part of it.
    bodies = [body.replace(b"tQ", b"NtQ") for body in _pickles()]
    hostile = [
        head + b"\x80\2" + body + b"." + (keys + data if b"NtQ" in body else none)
        for body in bodies
    ]
    many = pickle.dumps(["0"] * 100_000, 2)
    unknown = pickle.dumps(["1" * 100], 2)
    return [
        *hostile,
        head + b"\x80\2}." + many + data,
        head + b"\x80\2}." + unknown + data,
        head + b"\x80\2}." + keys + struct.pack("<q", 1 << 60),
        head[:second] + b"\x80\2" + b"}" * 3_000_000 + b".",
    ]


def _zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# ---- safetensors ----


def _safetensors(originals: list[pathlib.Path]) -> Files:
    del originals

    def file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    headers: list[object] = [
        {"a": tensor([1 << 40], [0, 40])},
        {"a": tensor([1 << 62, 4], [0, 0])},
        {"a": tensor([0] * 1_000, [0, 0])},
        {"a": tensor([10], [0, 40]), "b": tensor([10], [0, 40])},
        {"a": tensor([-1], [0, 40])},
        {f"a{n}": tensor([0], [0, 0]) for n in range(50_000)},
        {"__metadata__": {"model.json": "[" * 100_000}},
        {"__metadata__": {"model.json": json.dumps({"format": 2, "task": "os:system"})}},
        {"__metadata__": {"model.json": json.dumps({"format": 2, "task": "a" * 100_000})}},
        [],
        0,
    ]
    return [
        *(file(json.dumps(header).encode(), bytes(40)) for header in headers),
        file(b"{", length=1 << 62),
        file(b"{" * 100_000),
        file(b'{"a":' * 100_000),
        file(b"{}" + b" " * 10_000_000),
    ]


_MAKERS: dict[str, Callable[[list[pathlib.Path]], Files]] = {
    "torch zip": _torch_zip,
    "torch legacy": _torch_legacy,
    "safetensors": _safetensors,
}
