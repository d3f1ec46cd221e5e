"""Hand-made GGUF bytes in which any field can be wrong; and the command line, run in this process.

    raw = RawGGUF(); raw.tensors[0].offset = 7; path.write_bytes(raw.encode())

Nothing of the project's writer is used: a test of the reader must not agree with our own idea of the format.
"""

from __future__ import annotations

import signal
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q8_0, Q6_K = 0, 1, 2, 8, 14
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34), Q6_K: (256, 210)}


def u32(n: int) -> bytes:
    return struct.pack("<I", n & 0xFFFFFFFF)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n & 0xFFFFFFFFFFFFFFFF)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def array(item_type: int, n: int, data: bytes) -> bytes:
    return u32(item_type) + u64(n) + data


@dataclass
class RawTensor:
    name: str | bytes
    ne: list[int]
    type: int = F32
    offset: int | None = None  # None: where it belongs
    n_dims: int | None = None
    nbytes: int | None = None  # of the data really present, when not what the shape says

    def size(self) -> int:
        """By the shape, in integers that do not wrap."""
        block, width = BLOCKS[self.type]
        n = 1
        for length in self.ne:
            n *= length
        return n // block * width


@dataclass
class RawGGUF:
    """A small valid file until something is changed. `kv` holds (key, value type, encoded value)."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_kv: int | None = None
    kv: list[tuple[str | bytes, int, bytes]] = field(
        default_factory=lambda: [
            ("general.architecture", STRING, string("lfm2")),
            ("some.number", UINT32, u32(7)),
            ("some.flag", BOOL, b"\1"),
            ("some.list", ARRAY, array(INT32, 3, struct.pack("<3i", 0, 2, 0))),
            ("some.pieces", ARRAY, array(STRING, 2, string("a") + string(b"\xff\xfe"))),
        ]
    )
    tensors: list[RawTensor] = field(
        default_factory=lambda: [
            RawTensor("a.weight", [32, 3], Q8_0),
            RawTensor("b.weight", [5]),
            RawTensor("c", [2, 2, 2]),
        ]
    )
    alignment: int = 32
    cut: int = 0  # bytes taken off the end
    trailing: bytes = b""

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_kv = len(self.kv) if self.n_kv is None else self.n_kv
        out = self.magic + u32(self.version) + u64(n_tensors) + u64(n_kv)
        for key, value_type, data in self.kv:
            out += string(key) + u32(value_type) + data
        running = 0
        for t in self.tensors:
            out += string(t.name) + u32(len(t.ne) if t.n_dims is None else t.n_dims)
            out += b"".join(u64(n) for n in t.ne) + u32(t.type) + u64(running if t.offset is None else t.offset)
            if t.type in BLOCKS:
                running += -(-t.size() // self.alignment) * self.alignment
        return out

    def encode(self) -> bytes:
        out = self.header()
        out += bytes(-len(out) % self.alignment)
        for i, t in enumerate(self.tensors):
            n = t.nbytes if t.nbytes is not None else min(t.size(), 1 << 16) if t.type in BLOCKS else 64
            out += bytes([i + 1]) * n + bytes(-n % self.alignment)
        return out[: len(out) - self.cut] + self.trailing

    def replace(self, key: str, value_type: int, data: bytes) -> None:
        self.kv = [(k, value_type, data) if k == key else (k, t, d) for k, t, d in self.kv]


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str | Path
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `lfm2cpp ARGS`, without a new process."""
    from lfm2cpp.cli.group import invoke, lfm2cpp

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(sys, "argv", ["lfm2cpp", *map(str, args)])
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as left:
            invoke(lfm2cpp, "lfm2cpp")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err
