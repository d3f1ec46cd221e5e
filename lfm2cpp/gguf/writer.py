"""GGUF writing, version 3: the bytes that llama.cpp's own writers give for the same metadata and tensors.

Tensor data is produced lazily, in file order; the header goes in last, and the finished file is read back by the
strict reader before it gets its name.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lfm2cpp.errors import ModelFormatError, OutputError
from lfm2cpp.files import atomic_output
from lfm2cpp.ggml import GGMLType, tensor_nbytes
from lfm2cpp.output_file import OutputFile

from .header import DEFAULT_ALIGNMENT, MAGIC, pad, parse_header, quoted
from .reader import read_one
from .values import FORMATS, Metadata, Value, ValueType

VERSION = 3


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to come. `chunks()` yields contiguous buffers that make up its bytes; it is called once."""

    name: str
    shape: tuple[int, ...]  # NumPy order: rows first
    ggml_type: GGMLType
    chunks: Callable[[], Iterable[Any]]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.ggml_type, self.shape)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Metadata,
    tensors: Sequence[TensorToWrite],
    *,
    force: bool = False,
    alignment: int | None = None,
    progress: Callable[[int], None] | None = None,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Write a GGUF file, atomically (see lfm2cpp/files.py).

    `alignment` is what `general.alignment` says, else 32; giving another one is an error. `progress(n)` hears of
    every n bytes of tensor data. `inputs` are files that must not be overwritten.
    """
    header = encode_header(metadata, tensors, alignment=alignment)
    step = _file_alignment(metadata, alignment)
    size = len(header) + sum(pad(tensor.nbytes, step) for tensor in tensors)
    with _refused(path):  # before the work, what the reader would say after it
        parse_header(header, str(path), file_size=size)

    def check(partial: Path) -> None:
        with _refused(path):
            _verify(partial, str(path), tensors, size)

    with atomic_output(path, size=size, force=force, inputs=inputs, check=check) as out:
        out.skip(len(header))
        for tensor in tensors:
            _write_tensor(out, tensor, progress)
            out.write(bytes(pad(tensor.nbytes, step) - tensor.nbytes))
        out.write_at(0, header)


def gguf_size(metadata: Metadata, tensors: Sequence[TensorToWrite], *, alignment: int | None = None) -> int:
    """The exact size of the file that `write_gguf` would make."""
    step = _file_alignment(metadata, alignment)
    header = encode_header(metadata, tensors, alignment=alignment)
    return len(header) + sum(pad(tensor.nbytes, step) for tensor in tensors)


def encode_header(metadata: Metadata, tensors: Sequence[TensorToWrite], *, alignment: int | None = None) -> bytes:
    """Everything before the tensor data, padded to where that begins."""
    step = _file_alignment(metadata, alignment)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key, key), struct.pack("<I", value.type), _encode_value(key, value)]
    offset = 0
    for tensor in tensors:
        ne = tuple(reversed(tensor.shape))
        parts.append(_string(tensor.name, tensor.name))
        parts.append(struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor.ggml_type, offset))
        offset += pad(tensor.nbytes, step)
    header = b"".join(parts)
    # A file without tensors (a vocabulary) has no data section and therefore no padding in front of one.
    return header.ljust(pad(len(header), step), b"\0") if tensors else header


def _file_alignment(metadata: Metadata, asked: int | None) -> int:
    stored = metadata["general.alignment"].value if "general.alignment" in metadata else DEFAULT_ALIGNMENT
    if asked not in (None, stored):
        raise ValueError(f"alignment {asked} contradicts general.alignment {stored}")
    return stored


def _string(text: str | bytes, key: str) -> bytes:
    try:
        raw = text.encode("utf-8") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise OutputError(f"{quoted(key)} holds text that is not valid Unicode: {error.reason}") from None
    return struct.pack("<Q", len(raw)) + raw


def _encode_value(key: str, value: Value) -> bytes:
    if value.type == ValueType.STRING:
        return _string(value.value, key)
    if value.type != ValueType.ARRAY:
        return _pack(key, value.type, [value.value])
    assert value.item_type is not None
    start = struct.pack("<IQ", value.item_type, len(value.value))
    if value.item_type == ValueType.STRING:
        return start + b"".join([_string(item, key) for item in value.value])
    return start + _pack(key, value.item_type, value.value)


def _pack(key: str, value_type: ValueType, items: Sequence[Any]) -> bytes:
    try:
        return struct.pack(f"<{len(items)}{FORMATS[value_type]}", *items)
    except (struct.error, OverflowError) as error:
        raise OutputError(f"metadata key {quoted(key)} does not fit {value_type.name}: {error}") from None


def _write_tensor(out: OutputFile, tensor: TensorToWrite, progress: Callable[[int], None] | None) -> None:
    written = 0
    for chunk in tensor.chunks():
        view = memoryview(np.ascontiguousarray(chunk).view(np.uint8) if isinstance(chunk, np.ndarray) else chunk)
        out.write(view)
        written += view.nbytes
        if progress is not None:
            progress(view.nbytes)
    if written != tensor.nbytes:
        raise OutputError(
            f"{out.target}: tensor {quoted(tensor.name)} came as {written} bytes where {tensor.nbytes} were planned; "
            "nothing was kept"
        )


def _verify(partial: Path, label: str, tensors: Sequence[TensorToWrite], size: int) -> None:
    """Read the finished file back as a stranger would, and compare it with the plan."""
    header, memory = read_one(partial, label=label)
    planned = [(t.name, tuple(t.shape), t.ggml_type) for t in tensors]
    found = [(t.name, t.shape, t.ggml_type) for t in header.tensors.values()]
    if planned != found or len(memory) != size:
        raise OutputError(f"{label}: the file written is not the file planned; nothing was kept")


@contextmanager
def _refused(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the strict reader says about our own file is a failure to write it."""
    try:
        yield
    except ModelFormatError as error:
        raise OutputError(f"{path}: would not be a valid GGUF file: {str(error).removeprefix(f'{path}: ')}") from None
