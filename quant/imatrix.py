"""Importance matrices: how much an error in each column of a model's matrices counts.

llama-imatrix runs a model over some text and adds up, for every matrix, the squares of the inputs that each of its
columns was multiplied with. The file is a GGUF file with two F32 tensors a matrix, NAME.in_sum2 (the sums) and
NAME.counts (of how many inputs).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import GGUFFile, Value, ValueType, read_gguf

F32 = NDArray[np.float32]
SUMS, COUNTS = ".in_sum2", ".counts"
MAX_TEXT_BYTES = 127  # of what llama-quantize notes in a file


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a file of importances holds. `columns`: mean square of each column's inputs, float32, by tensor name."""

    path: str
    columns: dict[str, F32]
    dataset: str | None  # the name of the text
    n_chunks: int  # of it

    def metadata(self) -> dict[str, Value]:
        """What llama-quantize notes of it in the quantized file."""
        found = {"quantize.imatrix.file": Value.string(_cut(self.path))}
        if self.dataset is not None:
            found["quantize.imatrix.dataset"] = Value.string(_cut(self.dataset))
        found["quantize.imatrix.entries_count"] = Value.u32(len(self.columns))
        if self.n_chunks:
            found["quantize.imatrix.chunks_count"] = Value.u32(self.n_chunks)
        return found


def read_imatrix(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """Raises ModelFormatError for a file that is none, or whose numbers cannot be what they are said to be."""
    with _open(path) as gguf:
        datasets = gguf.get("imatrix.datasets", ValueType.ARRAY)
        n_chunks = gguf.get("imatrix.chunk_count", ValueType.UINT32)
        names = [name.removesuffix(SUMS) for name in gguf.tensors if name.endswith(SUMS)]
        if not names:
            raise ModelFormatError(f"{path}: holds no importances, expected tensors named *{SUMS}")
        columns = {name: _mean_squares(gguf, name) for name in names}
    dataset = datasets[0].decode("utf-8", "replace") if datasets and isinstance(datasets[0], bytes) else None
    return ImportanceMatrix(os.fspath(path), columns, dataset, n_chunks)


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


def _open(path: str | os.PathLike[str]) -> GGUFFile:
    try:
        gguf = read_gguf(path, use_mmap=False)
    except ModelFormatError as error:
        if "not a GGUF file: it starts" not in str(error):
            raise
        raise ModelFormatError(
            f"{path}: not an importance matrix in a GGUF file; one of the older format becomes one by: llama-imatrix "
            "--in-file OLD -o NEW.gguf"
        ) from None
    if "imatrix.chunk_count" not in gguf.metadata:
        gguf.close()
        raise ModelFormatError(f"{path}: is a GGUF file without 'imatrix.chunk_count', expected an importance matrix")
    return gguf


def _mean_squares(gguf: GGUFFile, name: str) -> F32:
    """Sums by their count, as llama-quantize divides them."""
    sums, counts = _floats(gguf, name + SUMS), _floats(gguf, name + COUNTS)
    if counts.size != 1:
        raise ModelFormatError(f"{gguf.path}: {name}{COUNTS} has {counts.size} elements, expected 1")
    if not 0.5 < counts[0] < 2**63:  # it is a whole number of inputs
        raise ModelFormatError(
            f"{gguf.path}: {name}{COUNTS} is {counts[0]:g}, expected 1 or more; the model was not run on enough text"
        )
    found = sums / np.float32(np.rint(counts[0]))
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(bad):
        raise ModelFormatError(
            f"{gguf.path}: {name}{SUMS}[{bad[0]}] is {sums[bad[0]]}, expected a sum of squares; the file is damaged"
        )
    return found


def _floats(gguf: GGUFFile, name: str) -> F32:
    if name not in gguf.tensors:
        raise ModelFormatError(f"{gguf.path}: tensor {name} is missing; the file is damaged")
    ggml_type = gguf.tensors[name].ggml_type
    if ggml_type != GGMLType.F32:
        raise ModelFormatError(f"{gguf.path}: {name} is {ggml_type.name}, expected F32")
    return gguf.data(name).view(np.float32)


def _cut(text: str) -> str:
    return os.fsencode(text)[:MAX_TEXT_BYTES].decode("utf-8", "ignore")
