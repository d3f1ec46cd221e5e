"""Whether an importance matrix fits a model, and what the quantized file says of it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.gguf import Value
from lfm2cpp.gguf.imatrix import ImportanceMatrix

MAX_TEXT_BYTES = 127  # of a name


def check_importances(imatrix: ImportanceMatrix, rows: Mapping[str, int]) -> None:
    """ModelFormatError unless it can be of a model that has matrices of these names and row lengths."""
    for name, columns in imatrix.columns.items():
        if name not in rows:
            raise ModelFormatError(
                f"{imatrix.path}: has importances for {name}, which this model lacks; it was made for another model"
            )
        if len(columns) != rows[name]:
            raise ModelFormatError(
                f"{imatrix.path}: has {len(columns)} importances for {name}, whose rows have {rows[name]} elements; it "
                "was made for another model"
            )


def imatrix_metadata(imatrix: ImportanceMatrix) -> dict[str, Value]:
    """What llama-quantize notes of it in the quantized file."""
    found = {"quantize.imatrix.file": Value.string(_cut(imatrix.path))}
    if imatrix.dataset is not None:
        found["quantize.imatrix.dataset"] = Value.string(_cut(imatrix.dataset))
    found["quantize.imatrix.entries_count"] = Value.u32(len(imatrix.columns))
    if imatrix.n_chunks:
        found["quantize.imatrix.chunks_count"] = Value.u32(imatrix.n_chunks)
    return found


def _cut(text: str) -> str:
    return os.fsencode(text)[:MAX_TEXT_BYTES].decode("utf-8", "ignore")
