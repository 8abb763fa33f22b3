"""Hostile files of torch.save: code, endless nesting, tensors and storages that lie."""

import pickle
import struct
import zipfile

from .files import Files, Originals, zip_file

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


def torch_zip(originals: Originals) -> Files:
    found = []
    for body in _pickles():
        found.append(zip_file({"a/data.pkl": b"\x80\2" + body + b".", "a/data/0": bytes(40)}))
    state = originals[-1].read_bytes()
    bomb = zip_file({"a/data.pkl": bytes(300 << 20)}, zipfile.ZIP_DEFLATED)
    tensor = b"\x80\2}X\1\0\0\0a" + _tensor(75 << 20, (75 << 20,), (1,)) + b"s."
    return [
        *found,
        bomb,
        zip_file({"a/data.pkl": tensor, "a/data/0": bytes(300 << 20)}, zipfile.ZIP_DEFLATED),
        zip_file({f"a/{n}": b"" for n in range(60_000)} | {"a/data.pkl": b"\x80\2}."}),
        zip_file({"a/data.pkl": b"\x80\2}.", "b/data.pkl": b"\x80\2}."}),
        zip_file({"../../a/data.pkl": b"\x80\2}."}),
        state + state,
        state[: len(state) // 2] + state,
    ]


def torch_legacy(originals: Originals) -> Files:
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
