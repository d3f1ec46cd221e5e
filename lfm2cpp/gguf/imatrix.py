"""Importance matrices: how much an error in each column of a model's matrices counts.

llama-imatrix, and ours, run a model over some text and add up, for every matrix, the squares of the inputs that each of
its columns was multiplied with. The file is a GGUF file with two F32 tensors a matrix, NAME.in_sum2 (the sums) and
NAME.counts (of how many inputs).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.ggml import GGMLType

from .header import quoted
from .reader import GGUFFile, read_gguf
from .values import Value, ValueType
from .writer import TensorToWrite, write_gguf

F32 = NDArray[np.float32]
SUMS, COUNTS = ".in_sum2", ".counts"
MAX_IMPORTANCE = 1e30  # an activation of 1e15: beyond that encoders' sums overflow


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a file of importances holds. `columns`: mean square of each column's inputs, float32, by tensor name."""

    path: str
    columns: dict[str, F32]
    dataset: bytes | None  # the name of the text, as it stands in the file
    n_chunks: int  # of it


def read_imatrix(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """Raises ModelFormatError for a file that is none, or whose numbers cannot be what they are said to be."""
    with _open(path) as gguf:
        datasets = gguf.get("imatrix.datasets", ValueType.ARRAY)
        n_chunks = gguf.get("imatrix.chunk_count", ValueType.UINT32)
        names = [name.removesuffix(SUMS) for name in gguf.tensors if name.endswith(SUMS)]
        if not names:
            raise ModelFormatError(f"{path}: holds no importances, expected tensors named *{SUMS}")
        columns = {name: _mean_squares(gguf, name) for name in names}
    dataset = datasets[0] if datasets and isinstance(datasets[0], bytes) else None
    return ImportanceMatrix(os.fspath(path), columns, dataset, n_chunks)


def write_imatrix(
    path: str | os.PathLike[str],
    sums: Mapping[str, NDArray[np.floating]],
    *,
    dataset: str,
    n_chunks: int,
    chunk_size: int,
    force: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Write sums of squares, (row length,) by tensor name, over n_chunks chunks of chunk_size tokens of the text
    `dataset`, as llama-imatrix does. `inputs` are files that must not be overwritten. Raises OutputError, UsageError.
    """
    metadata = {
        "general.type": Value.string("imatrix"),
        "imatrix.datasets": Value.strings([os.fsencode(dataset)]),
        "imatrix.chunk_count": Value.u32(n_chunks),
        "imatrix.chunk_size": Value.u32(chunk_size),
    }
    tensors = []
    for name in sorted(sums, key=str.encode):
        for suffix, values in ((SUMS, sums[name]), (COUNTS, np.array([n_chunks * chunk_size], np.float32))):
            data = np.ascontiguousarray(values, np.float32).tobytes()
            tensors.append(TensorToWrite(name + suffix, values.shape, GGMLType.F32, partial(list, [data])))
    write_gguf(path, metadata, tensors, force=force, inputs=inputs)


def _open(path: str | os.PathLike[str]) -> GGUFFile:
    try:
        gguf = read_gguf(path)
    except ModelFormatError:
        if not _is_older_format(path):
            raise
        raise ModelFormatError(
            f"{path}: is an importance matrix of the older format; it becomes a GGUF file by: "
            "llama-imatrix --in-file OLD -o NEW.gguf"
        ) from None
    if "imatrix.chunk_count" not in gguf.metadata:
        gguf.close()
        raise ModelFormatError(f"{path}: is a GGUF file without 'imatrix.chunk_count', expected an importance matrix")
    return gguf


def _is_older_format(path: str | os.PathLike[str]) -> bool:
    """A number of entries, then the length of the first one's name, both int32"""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8 or start.startswith(b"GGUF"):
        return False
    n_entries, name_length = struct.unpack("<ii", start)
    return 0 < n_entries < 1 << 20 and 0 < name_length < 256


def _mean_squares(gguf: GGUFFile, name: str) -> F32:
    """Sums by their count, as llama-quantize divides them.

    A count of zero, from which it goes on with importances of 1, is damage: a dense model's matrices meet every token.
    """
    sums, counts = _floats(gguf, name + SUMS), _floats(gguf, name + COUNTS)
    if counts.size != 1:
        raise ModelFormatError(f"{gguf.path}: {quoted(name + COUNTS)} has {counts.size} elements, expected 1")
    if not 0.5 < counts[0] < 2**63:  # it is a whole number of inputs
        raise ModelFormatError(
            f"{gguf.path}: {quoted(name + COUNTS)} is {counts[0]:g}, expected 1 or more; "
            "the model was not run on enough text"
        )
    found = sums / np.float32(np.rint(counts[0]))
    bad = np.flatnonzero(~((found >= 0) & (found < MAX_IMPORTANCE)))
    if len(bad):
        raise ModelFormatError(
            f"{gguf.path}: element {bad[0]} of {quoted(name + SUMS)} is {sums[bad[0]]:g}, expected a sum of squares; "
            "the file is damaged"
        )
    return found


def _floats(gguf: GGUFFile, name: str) -> F32:
    if name not in gguf.tensors:
        raise ModelFormatError(f"{gguf.path}: tensor {quoted(name)} is missing; the file is damaged")
    ggml_type = gguf.tensors[name].ggml_type
    if ggml_type != GGMLType.F32:
        raise ModelFormatError(f"{gguf.path}: {quoted(name)} is {ggml_type.name}, expected F32")
    return gguf.data(name).view(np.float32)
