"""Ways to spoil a checkpoint: each makes a function that changes a directory in place."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from convert_variants import split_into_shards, update_json

Change = Callable[[Path], None]

W1, NORM = "model.layers.0.feed_forward.w1.weight", "model.embedding_norm.weight"


def remove(*names: str) -> Change:
    return lambda path: [(path / name).unlink() for name in names] and None


def text(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path / name).write_bytes(data) and None


def config(**changes: Any) -> Change:
    """Set keys of config.json; None removes one."""

    def change(path: Path) -> None:
        content = {**json.loads((path / "config.json").read_text()), **changes}
        content = {k: v for k, v in content.items() if v is not None or k == "block_ffn_dim_multiplier"}
        (path / "config.json").write_text(json.dumps(content))

    return change


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda path: update_json(path / "tokenizer.json", lambda t: change(t) and None)


def tensors(change: Callable[[dict[str, list[Any]]], Any]) -> Change:
    """Rewrite model.safetensors with changed entries, name -> [dtype, shape, bytes]."""

    def rewrite(path: Path) -> None:
        file = path / "model.safetensors"
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__")
        entries = {
            name: [e["dtype"], e["shape"], raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]]]
            for name, e in header.items()
        }
        change(entries)
        end, header = 0, {}
        for name, (dtype, shape, data) in entries.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
        encoded = json.dumps(header).encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(e[2] for e in entries.values()))

    return rewrite


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Rewrite the header of model.safetensors only; what `change` returns, if not None, is written as it is."""

    def rewrite(path: Path) -> None:
        file = path / "model.safetensors"
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8:start])
        changed = change(content)
        encoded = changed if isinstance(changed, bytes) else json.dumps(content).encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[start:])

    return rewrite


def index(change: Callable[[dict[str, str]], Any]) -> Change:
    def rewrite(path: Path) -> None:
        split_into_shards(path, 2)
        update_json(path / "model.safetensors.index.json", lambda i: change(i["weight_map"]) and None)

    return rewrite


def shards(change: Change) -> Change:
    def rewrite(path: Path) -> None:
        split_into_shards(path, 2)
        change(path)

    return rewrite


def only_pickle(path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path / "exploded"),)

    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def adapter(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"x")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def link_outside(path: Path) -> None:
    """The second shard as a link that leaves the checkpoint."""
    shard = path / "model-00002-of-00002.safetensors"
    shard.rename(path.parent / "elsewhere.safetensors")
    shard.symlink_to(path.parent / "elsewhere.safetensors")


def tensor_set(name: str, dtype: str, shape: list[int], fill: bytes) -> Change:
    n = int(np.prod(shape))
    return tensors(lambda t: t.__setitem__(name, [dtype, shape, fill * n]))
