"""Split models: all shards are found and agree, or the message names the file that is wrong (case A29)."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_builder import INT32, STRING, UINT32, RawGGUF, RawTensor, string, u32

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.gguf import read_gguf


def write_shards(directory: Path, n: int = 3) -> list[Path]:
    paths = []
    for i in range(n):
        raw = RawGGUF(tensors=[RawTensor(f"t{i}", [8])])
        raw.kv += [
            ("split.no", 2, struct.pack("<H", i)),
            ("split.count", 2, struct.pack("<H", n)),
            ("split.tensors.count", INT32, u32(n)),
        ]
        paths.append(directory / f"m-{i + 1:05d}-of-{n:05d}.gguf")
        paths[-1].write_bytes(raw.encode())
    return paths


def edit_shard(path: Path, key: str, value_type: int, data: bytes) -> None:
    raw = RawGGUF(tensors=[RawTensor(f"t{int(path.name[2:7]) - 1}", [8])])
    raw.kv += [
        ("split.no", 2, struct.pack("<H", int(path.name[2:7]) - 1)),
        ("split.count", 2, struct.pack("<H", 3)),
        ("split.tensors.count", INT32, u32(3)),
    ]
    raw.replace(key, value_type, data)
    path.write_bytes(raw.encode())


def shard_missing(paths: list[Path]) -> Path:
    paths[1].unlink()
    return paths[0]


def shard_renamed(paths: list[Path]) -> Path:
    return paths[0].rename(paths[0].with_name("model.gguf"))


def shard_wrong_count(paths: list[Path]) -> Path:
    edit_shard(paths[2], "split.count", 2, struct.pack("<H", 4))
    return paths[0]


def shard_wrong_number(paths: list[Path]) -> Path:
    edit_shard(paths[2], "split.no", 2, struct.pack("<H", 1))
    return paths[0]


def shard_wrong_total(paths: list[Path]) -> Path:
    edit_shard(paths[0], "split.tensors.count", INT32, u32(4))
    return paths[0]


def shard_wrong_type(paths: list[Path]) -> Path:
    edit_shard(paths[0], "split.count", STRING, string("3"))
    return paths[0]


def shard_huge_count(paths: list[Path]) -> Path:
    edit_shard(paths[0], "split.count", UINT32, u32(2**31))
    return paths[0]


def shard_repeated(paths: list[Path]) -> Path:
    raw = RawGGUF(tensors=[RawTensor("t0", [8])])
    raw.kv += [("split.no", 2, struct.pack("<H", 1)), ("split.count", 2, struct.pack("<H", 3))]
    paths[1].write_bytes(raw.encode())
    return paths[0]


def shard_truncated(paths: list[Path]) -> Path:
    os.truncate(paths[2], 100)
    return paths[0]


SHARDS: dict[str, tuple[Callable[[list[Path]], Path], str]] = {
    "missing": (shard_missing, "m-00002-of-00003.gguf: shard 2 of 3 is missing"),
    "second-given": (lambda paths: paths[1], "is not the first shard; give DIR/m-00001-of-00003.gguf"),
    "renamed": (shard_renamed, "expected NAME-00001-of-00003.gguf"),
    "wrong-count": (shard_wrong_count, "m-00003-of-00003.gguf: its split.count is 4, but the first shard's is 3"),
    "wrong-number": (shard_wrong_number, "m-00003-of-00003.gguf: its split.no is 1, but shard 3 must have 2"),
    "wrong-total": (shard_wrong_total, "split.tensors.count is 4, but its 3 shards hold 3"),
    "wrong-type": (shard_wrong_type, "'split.count' has type STRING"),
    "huge-count": (shard_huge_count, "split.count is 2147483648"),
    "duplicate-tensor": (shard_repeated, "m-00002-of-00003.gguf: tensor 't0' is also in m-00001-of-00003.gguf"),
    "truncated": (shard_truncated, "m-00003-of-00003.gguf: "),
}


@pytest.mark.parametrize("case", SHARDS)
def test_a29_shards(case: str, tmp_path: Path) -> None:
    prepare, expected = SHARDS[case]
    path = prepare(write_shards(tmp_path))
    with pytest.raises(ModelFormatError) as refused:
        read_gguf(path)
    assert expected.replace("DIR", str(tmp_path)) in str(refused.value)


def test_a29_good_shards(tmp_path: Path) -> None:
    with read_gguf(write_shards(tmp_path)[0]) as g:
        assert list(g.tensors) == ["t0", "t1", "t2"]
