"""Vocabulary-only GGUF files for tests: from a tokenizer.json, or from a list of pieces, with any fault on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

DATA = Path(__file__).parent / "data"
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6

Metadata = Mapping[str, tuple[gguf.GGUFValueType, Any] | None]


def golden_tokenizer() -> dict[str, Any]:
    """The tokenizer.json of the golden checkpoint (tests/data/golden_tokenizer.json)."""
    return json.loads((DATA / "golden_tokenizer.json").read_text(encoding="utf-8"))


def golden_gguf(path: Path, *, n_pad: int = 0, metadata: Metadata | None = None) -> Path:
    """The golden checkpoint's vocabulary as a GGUF without tensors, [PADn] rows behind it."""
    tokenizer = golden_tokenizer()
    vocab = tokenizer["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.__getitem__)
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    kinds = [CONTROL if i in special else NORMAL for i in range(len(pieces))] + [UNUSED] * n_pad
    pieces += [f"[PAD{i}]" for i in range(len(pieces), len(pieces) + n_pad)]
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    return vocab_gguf(path, pieces, kinds, merges, metadata=metadata)


def vocab_gguf(
    path: Path, pieces: list[Any], kinds: list[int], merges: list[Any], *, metadata: Metadata | None = None
) -> Path:
    """A GGUF with these tables; `metadata` overrides or adds keys, and None removes one."""
    T = gguf.GGUFValueType
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": (T.STRING, "gpt2"),
        "tokenizer.ggml.pre": (T.STRING, "lfm2"),
        "tokenizer.ggml.tokens": (T.ARRAY, pieces),
        "tokenizer.ggml.token_type": (T.ARRAY, kinds),
        "tokenizer.ggml.merges": (T.ARRAY, merges),
        "tokenizer.ggml.bos_token_id": (T.UINT32, 1),
        "tokenizer.ggml.eos_token_id": (T.UINT32, 7),
        "tokenizer.ggml.padding_token_id": (T.UINT32, 0),
        "tokenizer.ggml.add_bos_token": (T.BOOL, True),
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, arch="lfm2")
    for key, entry in entries.items():
        if entry is not None:
            writer.add_key_value(key, entry[1], entry[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
