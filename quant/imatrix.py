"""Whether an importance matrix fits a model, and what the quantized file says of it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.gguf import Value
from lfm2cpp.gguf.header import quoted
from lfm2cpp.gguf.imatrix import ImportanceMatrix

MAX_TEXT_BYTES = 127  # of a string that llama-quantize adds to the metadata (llama_model_kv_override.val_str)


def check_importances(imatrix: ImportanceMatrix, rows: Mapping[str, int]) -> None:
    """ModelFormatError unless it can be of a model that has matrices of these names and row lengths."""
    for name, columns in imatrix.columns.items():
        if name not in rows:
            raise ModelFormatError(
                f"{imatrix.path}: has importances for {quoted(name)}, which this model lacks; "
                "it was made for another model"
            )
        if len(columns) != rows[name]:
            raise ModelFormatError(
                f"{imatrix.path}: has {len(columns)} importances for {quoted(name)}, whose rows have {rows[name]} "
                "elements; it was made for another model"
            )


def imatrix_metadata(imatrix: ImportanceMatrix) -> dict[str, Value]:
    """What llama-quantize notes of it in the quantized file."""
    found = {"quantize.imatrix.file": _text(os.fsencode(imatrix.path))}
    if imatrix.dataset is not None:
        found["quantize.imatrix.dataset"] = _text(imatrix.dataset)
    found["quantize.imatrix.entries_count"] = Value.u32(len(imatrix.columns))
    if imatrix.n_chunks:
        found["quantize.imatrix.chunks_count"] = Value.u32(imatrix.n_chunks)
    return found


def _text(text: bytes) -> Value:
    """Cut where llama-quantize cuts it, but for a part of a character: strings of a GGUF file are UTF-8."""
    return Value.string(text[:MAX_TEXT_BYTES].decode("utf-8", "ignore"))
