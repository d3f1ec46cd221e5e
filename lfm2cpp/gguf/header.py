"""Parsing of a GGUF header: everything up to the tensor data, validated before anything is used.

Works on any byte buffer; knows no paths and opens nothing. No allocation follows a declared length: each count is
checked against the bytes that are really there first. All arithmetic is in Python integers, which do not wrap.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.ggml import REMOVED_TYPES, TRAITS, GGMLType, tensor_nbytes

from .sniff import describe_magic
from .values import FORMATS, WIDTHS, Metadata, Value, ValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_TENSORS = 65536
MAX_ENTRIES = 65536
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # GGML_MAX_NAME with its terminating zero is 64
MAX_STRING_BYTES = 1 << 30
MAX_TEMPLATE_BYTES = 1 << 20
# Python objects take tens of bytes for an item that takes one in the file; 16 times the largest real vocabulary.
MAX_ARRAY_ITEMS = 1 << 22
MAX_DIMS = 4
MAX_DIM = (1 << 31) - 1
MIN_KV_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, n_dims, one ne, type, offset

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_USUAL_KEY = re.compile(r"[a-z0-9_.\-]+")


class Buffer(Protocol):
    """Bytes or an mmap: `buffer[a:b]` gives bytes."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> bytes: ...


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in NumPy order: rows first, the contiguous dimension last."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    offset: int  # absolute, in its file
    nbytes: int
    file: int = 0  # which shard


@dataclass(frozen=True)
class Header:
    version: int
    alignment: int
    data_offset: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    warnings: list[str]


def pad(n: int, alignment: int) -> int:
    """`n` rounded up to a multiple of `alignment`."""
    return -(-n // alignment) * alignment


def quoted(text: str | bytes, limit: int = 80) -> str:
    """Text of a file inside a message: escaped, and cut when long."""
    shown = text if isinstance(text, str) else text.decode("utf-8", "backslashreplace")
    return ascii(shown if len(shown) <= limit else shown[:limit] + "...")


class Cursor:
    """A bounds-checked reading position in a buffer."""

    def __init__(self, buffer: Buffer, label: str) -> None:
        self.buffer = buffer
        self.end = len(buffer)
        self.file_size = self.end
        self.pos = 0
        self.label = label
        self.array_items = 0

    def fail(self, message: str) -> NoReturn:
        raise ModelFormatError(f"{self.label}: {message}") from None

    @property
    def remaining(self) -> int:
        return self.end - self.pos

    def number(self, code: struct.Struct, what: str) -> Any:
        if self.remaining < code.size:
            self.fail(
                f"the file ends inside its header, in {what} at byte {self.pos}: it is cut short; download it again"
            )
        (value,) = code.unpack_from(self.buffer, self.pos)
        self.pos += code.size
        return value

    def u32(self, what: str) -> int:
        return self.number(_U32, what)

    def u64(self, what: str) -> int:
        return self.number(_U64, what)

    def raw_string(self, what: str, limit: int = MAX_STRING_BYTES) -> bytes:
        at = self.pos
        n = self.u64(what)
        if n > self.remaining:
            self.fail(f"{what} at byte {at} claims {n} bytes, but only {self.remaining} remain in the file")
        if n > limit:
            self.fail(f"{what} at byte {at} has {n} bytes; at most {limit} are allowed")
        self.pos += n
        return bytes(self.buffer[self.pos - n : self.pos])

    def text(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        at = self.pos
        raw = self.raw_string(what, limit)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} at byte {at} is not UTF-8: {quoted(raw)} ({error.reason})")

    def take_items(self, what: str, n: int, width: int) -> None:
        """Check a declared number of array items before anything is read."""
        if n * width > self.remaining:
            self.fail(f"{what} claims {n} items, but only {self.remaining} bytes remain in the file")
        self.array_items += n
        if self.array_items > MAX_ARRAY_ITEMS:
            self.fail(f"{what} claims {n} items; the arrays of a file may hold {MAX_ARRAY_ITEMS} in all")

    def numbers(self, what: str, item_type: ValueType, n: int) -> list[Any]:
        width = WIDTHS[item_type]
        self.take_items(what, n, width)
        raw = bytes(self.buffer[self.pos : self.pos + n * width])
        items = np.frombuffer(raw, dtype="<" + np.dtype(FORMATS[item_type]).str[1:])
        if item_type == ValueType.BOOL:
            if n and int(items.max()) > 1:
                self.fail(f"{what} holds the bool {int(items.max())}; only 0 and 1 are bools")
            items = items.astype(bool)
        self.pos += n * width
        return items.tolist()

    def strings(self, what: str, n: int) -> list[bytes]:
        """The hot loop of loading a vocabulary: 130,000 strings of a 65,536-token model."""
        self.take_items(what, n, 8)
        buffer, end, pos, length_at = self.buffer, self.end, self.pos, _U64.unpack_from
        items: list[bytes] = []
        append = items.append
        for i in range(n):
            start = pos + 8
            if start > end:
                self.fail(f"the file ends in item {i} of {what} at byte {pos}: it is cut short; download it again")
            pos = start + length_at(buffer, pos)[0]
            if pos > end:
                self.fail(
                    f"item {i} of {what} at byte {start - 8} claims {pos - start} bytes, "
                    f"but only {end - start} remain in the file"
                )
            append(buffer[start:pos])
        self.pos = pos
        return items


def parse_header(buffer: Buffer, label: str, *, file_size: int | None = None) -> Header:
    """Read and check the whole header; `label` (the path) starts every error message.

    Raises ModelFormatError. The extents of all tensors lie inside the buffer when this returns, or inside a file of
    `file_size` bytes when `buffer` holds no more than its header.
    """
    cursor = Cursor(buffer, label)
    if file_size is not None:
        cursor.file_size = file_size
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensors", MIN_TENSOR_BYTES, MAX_TENSORS)
    n_kv = _read_count(cursor, "metadata entries", MIN_KV_BYTES, MAX_ENTRIES)
    metadata: Metadata = {}
    for i in range(n_kv):
        key = _read_key(cursor, i, metadata)
        metadata[key] = _read_value(cursor, key)
    unusual = [quoted(key) for key in metadata if not _USUAL_KEY.fullmatch(key)]
    warnings = [f"{len(unusual)} metadata keys with unusual characters, such as {unusual[0]}"] if unusual else []
    alignment = _alignment(cursor, metadata)
    declared = [_read_tensor(cursor, i) for i in range(n_tensors)]
    data_offset = pad(cursor.pos, alignment) if n_tensors else cursor.pos
    tensors = _place_tensors(cursor, declared, data_offset, alignment, warnings)
    return Header(version, alignment, data_offset, metadata, tensors, warnings)


def _read_version(cursor: Cursor) -> int:
    if cursor.end < 4 or cursor.buffer[:4] != MAGIC:
        cursor.fail(describe_magic(bytes(cursor.buffer[:1024]), cursor.end))
    cursor.pos = 4
    if cursor.end < 24:
        cursor.fail(
            f"truncated header: a GGUF file of {cursor.end} bytes, where the smallest has 24; download it again"
        )
    version = cursor.u32("the version")
    if version in VERSIONS:
        return version
    if version == 1:
        cursor.fail("GGUF version 1 is no longer supported; convert the original model again")
    if version and version & 0xFFFF == 0:
        cursor.fail(f"GGUF version {version:#x}: a big-endian file? only little-endian files can be read")
    if version == 0:
        cursor.fail("GGUF version 0 does not exist; the file is damaged, download it again")
    cursor.fail(f"GGUF version {version} is newer than the versions {VERSIONS[0]} and {VERSIONS[1]} known here")


def _read_count(cursor: Cursor, what: str, min_bytes: int, limit: int) -> int:
    n = cursor.u64(f"the number of {what}")
    most = cursor.remaining // min_bytes
    if n > most:
        cursor.fail(f"the header claims {n} {what}, but its {cursor.end} bytes hold at most {most}")
    if n > limit:
        cursor.fail(f"the header claims {n} {what}; at most {limit} are allowed")
    return n


def _read_key(cursor: Cursor, i: int, metadata: Metadata) -> str:
    at = cursor.pos
    key = cursor.text(f"metadata key {i}", MAX_KEY_BYTES)
    if not key:
        cursor.fail(f"metadata key {i} at byte {at} is empty")
    if "\0" in key:
        cursor.fail(f"metadata key {quoted(key)} holds a zero byte")
    if key in metadata:
        cursor.fail(f"metadata key {quoted(key)} appears twice")
    return key


def _value_type(cursor: Cursor, key: str) -> ValueType:
    number = cursor.u32(f"the type of metadata key {quoted(key)}")
    try:
        return ValueType(number)
    except ValueError:
        cursor.fail(f"metadata key {quoted(key)} has the unknown value type {number}; types are 0 to 12")


def _read_value(cursor: Cursor, key: str) -> Value:
    value_type = _value_type(cursor, key)
    what = f"metadata key {quoted(key)}"
    if value_type == ValueType.STRING:
        limit = MAX_TEMPLATE_BYTES if key.startswith("tokenizer.chat_template") else MAX_STRING_BYTES
        return Value(value_type, cursor.text(what, limit))
    if value_type == ValueType.ARRAY:
        item_type = _value_type(cursor, key)
        if item_type == ValueType.ARRAY:
            cursor.fail(f"{what} is an array of arrays; nested arrays are not supported")
        n = cursor.u64(f"the length of {what}")
        if item_type == ValueType.STRING:
            return Value(value_type, cursor.strings(what, n), item_type)
        return Value(value_type, cursor.numbers(what, item_type, n), item_type)
    number = cursor.number(struct.Struct("<" + FORMATS[value_type]), what)
    if value_type == ValueType.BOOL:
        if number > 1:
            cursor.fail(f"{what} is the bool {number}; only 0 and 1 are bools")
        number = bool(number)
    return Value(value_type, number)


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    stored = metadata.get("general.alignment")
    if stored is None:
        return DEFAULT_ALIGNMENT
    if stored.type != ValueType.UINT32:
        cursor.fail(f"general.alignment has type {stored.type_name}, expected UINT32")
    n = stored.value
    if not 8 <= n <= MAX_ALIGNMENT or n & (n - 1):
        cursor.fail(f"general.alignment is {n}; expected a power of two from 8 to {MAX_ALIGNMENT}")
    return n


def _read_tensor(cursor: Cursor, i: int) -> TensorInfo:
    """One row of the tensor table, `offset` still relative to the data section."""
    at = cursor.pos
    name = cursor.text(f"the name of tensor {i}", MAX_NAME_BYTES)
    if not name or "\0" in name:
        cursor.fail(f"tensor {i} at byte {at} has the name {quoted(name)}; expected 1 to {MAX_NAME_BYTES} characters")
    what = f"tensor {quoted(name)}"
    n_dims = cursor.u32(f"the dimensions of {what}")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"{what} has {n_dims} dimensions; expected 1 to {MAX_DIMS}")
    ne = [cursor.u64(f"the shape of {what}") for _ in range(n_dims)]
    for n in ne:
        if not 1 <= n <= MAX_DIM:
            cursor.fail(f"{what} has the shape {ne}; every dimension must be from 1 to {MAX_DIM}")
    ggml_type = _ggml_type(cursor, what)
    block_size = TRAITS[ggml_type].block_size
    if ne[0] % block_size:
        cursor.fail(f"{what} has rows of {ne[0]} elements; {ggml_type.name} stores whole blocks of {block_size}")
    shape = tuple(reversed(ne))
    offset = cursor.u64(f"the offset of {what}")
    return TensorInfo(name, shape, ggml_type, offset, tensor_nbytes(ggml_type, shape))


def _ggml_type(cursor: Cursor, what: str) -> GGMLType:
    number = cursor.u32(f"the type of {what}")
    if number in REMOVED_TYPES:
        cursor.fail(
            f"{what} has the type {number} ({REMOVED_TYPES[number]}), which was removed from the format; "
            "quantize the model again"
        )
    try:
        return GGMLType(number)
    except ValueError:
        cursor.fail(f"{what} has the unknown tensor type {number}")


def _place_tensors(
    cursor: Cursor, declared: list[TensorInfo], data_offset: int, alignment: int, warnings: list[str]
) -> dict[str, TensorInfo]:
    """Check that the tensors lie back to back inside the file; make their offsets absolute."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    end = data_offset
    for info in declared:
        what = f"tensor {quoted(info.name)}"
        if info.name in tensors:
            cursor.fail(f"{what} appears twice")
        if info.offset != expected:
            kind = _misplaced(info.offset, expected, alignment)
            cursor.fail(f"{what} is at data offset {info.offset} ({kind}), expected {expected}")
        start = data_offset + info.offset
        end = start + info.nbytes
        expected = pad(info.offset + info.nbytes, alignment)
        tensors[info.name] = TensorInfo(info.name, info.shape, info.ggml_type, start, info.nbytes)
    size = cursor.file_size
    if end > size:
        first = next(info for info in tensors.values() if info.offset + info.nbytes > size)
        cursor.fail(
            f"the file has {size} bytes and tensor {quoted(first.name)} ends beyond them: {end - size} bytes are "
            "missing; download it again"
        )
    if size > pad(end, alignment):
        warnings.append(f"{size - pad(end, alignment)} unused bytes after the end of the data")
    return tensors


def _misplaced(offset: int, expected: int, alignment: int) -> str:
    if offset % alignment:
        return f"not a multiple of the alignment {alignment}"
    return "overlapping the one before" if offset < expected else "a gap after the one before"
