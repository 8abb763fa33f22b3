"""Hostile safetensors files: headers that lie about sizes, or are nested or long."""

import json
import struct

from .files import Files, Originals


def safetensors(originals: Originals) -> Files:
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
