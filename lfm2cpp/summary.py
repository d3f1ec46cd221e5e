"""What `lfm2cpp inspect` tells about a GGUF file, as plain data: every number and verdict, no layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .arch.validate import ModelFacts, validate_model
from .errors import LFM2Error
from .ggml import TRAITS, FileType, GGMLType
from .gguf import GGUFFile, Value, ValueType
from .gguf.check import find_non_finite
from .gguf.values import INTEGER_TYPES

MAX_ITEMS = 64  # of an array; longer ones are given by their length and first items
FIRST_ITEMS = 8
Q8_0 = TRAITS[GGMLType.Q8_0]
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": Q8_0.type_size / Q8_0.block_size}  # per element


def summarize(
    gguf: GGUFFile, *, check_tensors: bool = False, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """A JSON-ready description of an open file. `check_tensors` reads all data and looks for NaN and Inf.

    Keys: file, metadata, tensors, types, parameters, bits_per_weight, model, state, template, non_finite, warnings,
    refused, chat_refused. The last two are None, or say why the file cannot be run or its template cannot be used;
    `model` and `state` are None when they could not be made sense of.
    """
    n_params = sum(_elements(info.shape) for info in gguf.tensors.values())
    data_bytes = sum(info.nbytes for info in gguf.tensors.values())
    facts, refused, chat_refused = _verdict(gguf)
    return {
        "file": {
            "path": str(gguf.path),
            "shards": len(gguf.paths),
            "nbytes": gguf.nbytes,
            "version": gguf.version,
            "alignment": gguf.alignment,
            "data_offset": gguf.data_offset,
            "file_type": _file_type(gguf),
        },
        "metadata": {key: _value(value) for key, value in gguf.metadata.items()},
        "tensors": [
            {
                "name": info.name,
                "type": info.ggml_type.name,
                "shape": list(info.shape),
                "offset": info.offset,
                "nbytes": info.nbytes,
                "shard": info.file,
            }
            for info in gguf.tensors.values()
        ],
        "types": _types(gguf),
        "parameters": n_params,
        "bits_per_weight": 8 * data_bytes / n_params if n_params else None,
        "model": None if facts is None else {"architecture": facts.arch.NAME, **asdict(facts.hparams)},
        "state": None if facts is None else _state(facts),
        "template": _template(gguf),
        "non_finite": [str(found) for found in find_non_finite(gguf, progress=progress)] if check_tensors else None,
        "warnings": gguf.warnings + (facts.warnings if facts is not None else []),
        "refused": refused,
        "chat_refused": chat_refused,
    }


def _verdict(gguf: GGUFFile) -> tuple[ModelFacts | None, str | None, str | None]:
    """The model's facts, why it would be refused, and why it could not chat. Facts may be sound, the vocabulary not."""
    from .text.template import ChatTemplate
    from .text.vocab import Vocab

    facts = None
    prefix = f"{gguf.path}: "
    try:
        facts = validate_model(gguf)
        vocab = Vocab(gguf)
    except LFM2Error as error:
        return facts, str(error).removeprefix(prefix), None
    try:
        source = gguf.get("tokenizer.chat_template", ValueType.STRING, None)
        if source is not None:
            template = ChatTemplate(source, label=str(gguf.path), special_pieces=vocab.special_pieces)
            template.render([{"role": "user", "content": "Hi"}])
    except LFM2Error as error:
        return facts, None, str(error).removeprefix(prefix)
    return facts, None, None


def _elements(shape: tuple[int, ...]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n


def _file_type(gguf: GGUFFile) -> str | None:
    value = gguf.metadata.get("general.file_type")
    if value is None or value.type not in INTEGER_TYPES:
        return None
    try:
        return FileType(value.value).name
    except ValueError:
        return f"unknown ({value.value})"


def _value(value: Value) -> dict[str, Any]:
    if value.type != ValueType.ARRAY:
        return {"type": value.type.name, "value": _plain(value.value)}
    items = value.value if len(value.value) <= MAX_ITEMS else value.value[:FIRST_ITEMS]
    items = [_plain(item) for item in items]
    key = "value" if len(value.value) <= MAX_ITEMS else "first"
    return {"type": value.type_name, "length": len(value.value), key: items}


def _plain(item: Any) -> Any:
    """JSON knows neither bytes nor NaN."""
    if isinstance(item, bytes):
        return item.decode("utf-8", "backslashreplace")
    return str(item) if isinstance(item, float) and not math.isfinite(item) else item


def _types(gguf: GGUFFile) -> dict[str, dict[str, int]]:
    """Tensors, elements and bytes of each ggml type, the largest share first."""
    types: dict[str, dict[str, int]] = {}
    for info in gguf.tensors.values():
        entry = types.setdefault(info.ggml_type.name, {"tensors": 0, "elements": 0, "nbytes": 0})
        entry["tensors"] += 1
        entry["elements"] += _elements(info.shape)
        entry["nbytes"] += info.nbytes
    return dict(sorted(types.items(), key=lambda item: -item[1]["nbytes"]))


def _state(facts: ModelFacts) -> dict[str, Any]:
    """Memory of one sequence: the KV cache grows with its tokens, the convolution state does not."""
    hp = facts.hparams
    per_token = sum(2 * hp.n_head_kv[il] * hp.n_embd_head for il in hp.attention_layers)
    return {
        "attention_layers": list(hp.attention_layers),
        "conv_layers": list(hp.conv_layers),
        "kv_bytes_per_token": {name: int(per_token * nbytes) for name, nbytes in KV_BYTES.items()},
        "conv_state_bytes": 4 * hp.d_conv * hp.n_embd * len(hp.conv_layers),
    }


def _template(gguf: GGUFFile) -> dict[str, Any] | None:
    value = gguf.metadata.get("tokenizer.chat_template")
    if value is None or value.type != ValueType.STRING:
        return None
    return {"sha256": hashlib.sha256(value.value.encode()).hexdigest(), "text": value.value}
