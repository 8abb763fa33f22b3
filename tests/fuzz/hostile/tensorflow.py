"""Hostile frozen graphs, and tar archives of them: messages that lie, bombs, odd members."""

import gzip
import io
import struct
import tarfile
from collections.abc import Iterator, Sequence

from .files import Files, Originals

_HUGE = (1 << 64) - 1
_NAME = "MobilenetV2/extra/weights"


# ---- The wire format ----


def _varint(value: int) -> bytes:
    found = b""
    while value >= 0x80:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def _field(number: int, content: bytes | str | int) -> bytes:
    """Returns a field: a message, a text or an integer."""
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content & _HUGE)
    content = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _node(name: bytes | str, op: bytes | str, *inputs: str, **attributes: bytes) -> bytes:
    content = _field(1, name) + _field(2, op) + b"".join(_field(3, each) for each in inputs)
    for key, value in attributes.items():
        content += _field(5, _field(1, key) + _field(2, value))
    return _field(1, content)


def _shape(sizes: Sequence[int]) -> bytes:
    return b"".join(_field(2, _field(1, size)) for size in sizes)


def _constant(sizes: Sequence[int], values: bytes, dtype: int = 1, name: str = _NAME) -> bytes:
    """Returns a node with an array; `values` are fields of its TensorProto."""
    tensor = _field(1, dtype) + _field(2, _shape(sizes)) + values
    return _node(name, "Const", value=_field(8, tensor))


_ONE = _field(5, struct.pack("<f", 1))
_STEM, _BLOCK = "MobilenetV2/Conv/Conv2D", "MobilenetV2/expanded_conv_%s/depthwise/depthwise"


def graph(originals: Originals) -> Files:
    """Returns graphs, most of which begin with all the weights of a real one."""
    real = originals[0].read_bytes()
    return [*(real + more for more in _additions()), *_beginnings()]


def _additions() -> Iterator[bytes]:
    for sizes in ([1 << 40], [1 << 20] * 2, [1 << 62, 4], [-1], [-1, -1], [1] * 40, [1] * 100_000):
        yield _constant(sizes, _ONE)
    yield b"".join(_constant([1 << 20], _ONE, name=f"a{n}/weights") for n in range(2_000))
    yield _constant([0, 1 << 40], b"")
    yield _constant([4], _field(4, b"abc"))
    yield _constant([4], _field(5, b"abc"))
    yield _constant([4], b"")
    yield _constant([1_500_000], _ONE * 1_500_000)  # not packed
    yield _constant([9_000_000], _field(13, b"\1" * 9_000_000), dtype=19)
    yield _constant([4_500_000], _field(13, b"\xff\1" * 4_500_000), dtype=19)
    yield _constant([1], _field(13, _varint(_HUGE)), dtype=19)
    yield _constant([1], _field(13, b"\x80" * 100), dtype=19)
    yield _constant([1], _ONE, dtype=_HUGE)
    yield _constant([1], _field(4, struct.pack("<f", float("nan"))))
    yield b"".join(_constant([0], b"", name=f"a{n}/weights") for n in range(60_000))
    yield _node("a" * 9_000_000 + "/weights", "Const")
    yield _constant([1], _ONE, name="a\nb\x1b[31m/weights")
    yield _constant([1], _ONE, name="/" * 1_000_000 + "weight")
    yield _constant([1], _ONE, name="MobilenetV2/expanded_conv" * 40_000)
    yield _node(b"\xff\xfe", "Const")
    yield _node("a", b"\xff\xfe")
    yield _node("a", "FakeQuant" + "\n" * 1_000)
    yield _node(_STEM, "Conv2D", "images", strides=_field(1, _field(3, b"\1" * 9_000_000)))
    yield _node(_BLOCK % ("1" * 9_000), "DepthwiseConv2dNative") + _node(_STEM, "Conv2D")
    yield _node("MobilenetV2/expanded_conv" * 40_000, "DepthwiseConv2dNative")
    yield _node("a", "a", *["b"] * 1_000_000) + _node("b", "b", "a")
    for side in (1 << 62, -1, 0):
        yield _node("images", "Placeholder", shape=_field(7, _shape([1, side, side, 3])))
    yield b"".join(_node(_BLOCK % n, "DepthwiseConv2dNative", "batches") for n in range(17)) + (
        _node(_STEM, "Conv2D") + _node("batches", "SpaceToBatchND", "x", "batches")
    )
    yield _node("a", "a" + "b" * 9_000_000)
    yield _node("a", "Const") * 500_000
    yield _field(1, b"") * 900_000
    yield b"".join(_field(2, b"") for _ in range(1_000_000))


def _beginnings() -> Iterator[bytes]:
    """Yields files that only begin like a graph."""
    start = _node("a", "Const")
    yield start + b"\n" + _varint(_HUGE)
    yield start + b"\n" + _varint((1 << 63) - 1) + bytes(100)
    yield start + b"\n" + b"\xff" * 1_000
    yield start + b"\x0b" * 1_000_000  # groups in groups
    yield start + b"\0" * 1_000_000
    yield start + _field(_HUGE >> 3, b"")
    nested = b""
    for _ in range(1_000):
        nested = _field(1, nested)
    yield start + nested
    yield b"\n\4\n\x7fab"
    yield start[:-1]


# ---- Archives ----


def archive(originals: Originals) -> Files:
    """Returns tar archives, most of them compressed."""
    with tarfile.open(originals[0]) as original:
        file = original.extractfile(original.getnames()[0])
        content = file.read() if file else b""
    frozen = "net/frozen.pb"
    plain = _tar([(frozen, content)])
    return [
        *(_compressed(_tar([(frozen, each)])) for each in graph_additions(content)),
        *(_compressed(each) for each in _odd_archives(content)),
        _compressed(bytes(300 << 20)),
        _compressed(_tar([(frozen, bytes(300 << 20))])),
        _compressed(_tar([("other", bytes(300 << 20)), (frozen, content)])),
        _compressed(_compressed(plain)),
        _compressed(plain)[:-8],
        _compressed(plain)[:-20_000],
        _compressed(plain) + b"\x1f\x8b" + bytes(1_000),
        _compressed(plain) * 3,
        _compressed(plain)[:-8] + bytes(8),
        plain + bytes(9 << 20),
        plain[:-2_000],
        plain[:600],
        b"".join(_compressed(b"") for _ in range(100_000)),
    ]


def graph_additions(content: bytes) -> list[bytes]:
    """Returns a few of the hostile graphs."""
    return [content + more for more, _ in zip(_additions(), range(5), strict=False)]


def _compressed(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def _tar(members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as new:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            new.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _header(name: str, kind: bytes, size: int, link: str = "", **fields: bytes) -> bytes:
    """Returns a member's header, whose size may be a lie; `fields` are bytes at places."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, size, link
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    for key, value in fields.items():
        place = int(key.removeprefix("at"))
        header[place : place + len(value)] = value
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    return bytes(header)


def _extended(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Returns a header of pax, with any content."""
    return _header("x", kind, len(content)) + content + bytes(-len(content) % 512)


def _record(key: str, value: str) -> bytes:
    length = len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length + len(str(length + 2)), key.encode(), value.encode())


def _odd_archives(content: bytes) -> Iterator[bytes]:
    name, end = "net/frozen.pb", bytes(1_024)
    member = _header(name, tarfile.REGTYPE, len(content)) + content + bytes(-len(content) % 512)
    yield _tar([("../../frozen.pb", content)])
    yield _tar([("/etc/frozen.pb", content)])
    yield _tar([(name, content)] * 2)
    yield _tar([("a/frozen.pb", content), ("b/frozen.pb", content)])
    yield _tar([(f"{n}/frozen.pb", b"a") for n in range(50_000)])
    yield _tar([(f"{n}", b"") for n in range(60_000)])
    yield _tar([("a/" * 4_000 + "frozen.pb", content)])
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        yield _header(name, kind, 0, "/etc/passwd") + end
        yield _header(name, kind, 0, name) + end
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"Z"):
        yield _header(name, kind, 0) + member + end
    yield _header(name, tarfile.REGTYPE, 1 << 60) + content
    yield _header(name, tarfile.REGTYPE, 0, at124=b"\xff" * 12) + content
    yield _header(name, tarfile.REGTYPE, 0, at124=b"99999999999\0") + content
    # A sparse file: 16 bytes, said to be 2**33 of them.
    sparse = b"00000000000\0" + b"00000000020\0" + bytes(72) + b"\0" + b"77777777777\0"
    yield _header(name, tarfile.GNUTYPE_SPARSE, 16, at386=sparse) + bytes(512) + end
    yield _extended(_record("GNU.sparse.map", "0,16") + _record("GNU.sparse.size", "9" * 10)) + (
        member + end
    )
    yield _extended(_record("GNU.sparse.major", "1") + _record("GNU.sparse.minor", "0")) + (
        _header(name, tarfile.REGTYPE, 512) + b"9999999\n" + bytes(504) + end
    )
    yield _extended(_record("size", "9" * 30)) + member + end
    yield _extended(_record("size", "-512")) + member + end
    yield _extended(b"1" * 3_000_000) + member + end
    yield _extended(b"0 a=b\n" * 10_000) + member + end
    yield _extended(b"9 " + b"a" * 3_000_000) + member + end
    yield _extended(b"1" * 3_000) * 3_000 + member + end
    yield _extended(_record("path", "a\nfrozen\x1b.pb")) + member + end
    yield _extended(b"a" * 9_000_000, tarfile.GNUTYPE_LONGNAME) + member + end
    yield _extended(b"a", tarfile.GNUTYPE_LONGNAME) * 5_000 + member + end
    yield _header(name, tarfile.REGTYPE, 7, at0=b"\xff\xfe/frozen.pb") + b"content" + end
