"""safetensors files: a strict header, and tensor bytes read in pieces.

The header is checked by a parser of our own, because the library takes the last of two tensors of one name; and the
bytes are read, not mapped, because the touched pages of a map count as our memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2cpp.errors import CheckpointError

from .json_file import parse_json
from .shown import shown

MAX_HEADER = 16 << 20  # 150,000 tensors; the format's own limit is 100 MB
READ_CHUNK = 1 << 20

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file. `shape` is in NumPy order, `offset` counts from the file's start."""

    name: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def chunks(self, size: int = READ_CHUNK) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of `size`; each piece is overwritten by the next."""
        buffer = memoryview(bytearray(min(size, self.nbytes)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                piece = buffer[: min(size, left)]
                _read_full(file, piece, self)
                left -= len(piece)
                yield piece


def _read_full(file: Any, piece: memoryview, tensor: StoredTensor) -> None:
    done = 0
    while done < len(piece):
        try:
            n = file.readinto(piece[done:])
        except OSError as error:
            raise CheckpointError(f"{tensor.path}: cannot be read: {error.strerror or error}") from None
        if not n:
            raise CheckpointError(f"{tensor.path}: ends inside tensor {tensor.name!r}; it changed while being read")
        done += n


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the file's order. Raises CheckpointError for the least flaw."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            length = _header_length(path, start, size)
            header = start[8:] + file.read(length - 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(header) != length:
        raise CheckpointError(f"{path}: truncated header")
    entries = parse_json(header, f"{path}: header")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(entries).__name__}, expected an object")
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, list(tensors.values()), 8 + length, size)
    return tensors


def _header_length(path: Path, start: bytes, size: int) -> int:
    if start.startswith(b"version h"):
        raise CheckpointError(f"{path}: is a git-LFS pointer; run 'git lfs pull' in its repository")
    if len(start) < 9:
        raise CheckpointError(f"{path}: not a safetensors file: only {size} bytes; download it again")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        raise CheckpointError(f"{path}: not a safetensors file: no JSON header after the first 8 bytes")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: a header of {length} bytes, more than the {MAX_HEADER} allowed")
    if length > size - 8:
        raise CheckpointError(f"{path}: truncated: a header of {length} bytes in a file of {size}; download it again")
    return length


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    where = f"{path}: tensor {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)!r}")
    if not _is_int_list(shape) or len(shape) > 8:
        raise CheckpointError(f"{where}: shape {shown(shape)} is not a list of sizes")
    if not _is_int_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)} are not two rising positions")
    nbytes = ITEM_SIZE[dtype]
    for n in shape:
        nbytes *= n
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} {shown(shape)} takes {shown(nbytes)} bytes, its data_offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _is_int_list(value: Any) -> bool:
    # Booleans are integers to Python; digits without end are refused before anything multiplies them.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The tensors must fill the file after the header: no hole, no overlap, nothing missing, nothing left."""
    end = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            problem = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {tensor.name[:80]!r} {problem} (at byte {tensor.offset}, not {end})")
        end += tensor.nbytes
    if end > size:
        raise CheckpointError(f"{path}: truncated: {end - size} bytes are missing; download it again")
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor; download it again")
