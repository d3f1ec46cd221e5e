"""Tensor bytes of a checkpoint -> those of a GGUF file, a piece at a time, rounded as by llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.ggml import GGMLType

from .safetensors_file import StoredTensor

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
F32 = NDArray[np.float32]
EncodeRows = Callable[..., U8]  # quant.encode.encode_rows

QUANTIZE_CHUNK = 4 << 20  # of stored values at once, so that several threads have work

# The float types that are read, with the integer view, the exponent's mask and the item size of each.
FLOATS: dict[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F80_0000), "F64": ("<u8", 0x7FF0 << 48),
}  # fmt: skip
NATIVE = {GGMLType.F32: "F32", GGMLType.F16: "F16", GGMLType.BF16: "BF16"}
MAX_F16 = 65504.0


@dataclass
class ValueReport:
    """What was odd about the values of all tensors so far."""

    nonfinite: int = 0
    nonfinite_tensor: str = ""
    overflow: int = 0  # finite values that became infinite in float16
    overflow_tensor: str = ""
    largest: float = 0.0


def encode_tensor(
    tensor: StoredTensor, ggml_type: GGMLType, report: ValueReport, encode_rows: EncodeRows | None = None
) -> Iterator[Any]:
    """The tensor's bytes in `ggml_type`, in pieces; each piece is overwritten by the next.

    `encode_rows` makes the block types, and refuses values that they cannot hold.
    """
    if ggml_type not in NATIVE:
        assert encode_rows is not None
        yield from _quantized(tensor, ggml_type, encode_rows)
        return
    for piece in tensor.chunks():
        count = _count_nonfinite(piece, tensor, report)
        if NATIVE[ggml_type] == tensor.dtype:
            yield _quiet_nans(piece) if count and tensor.dtype == "BF16" else piece
            continue
        x = as_f32(piece, tensor.dtype)
        if ggml_type == GGMLType.F16:
            yield _f16(x, tensor.name, report)
        else:
            yield f32_to_bf16(x) if ggml_type == GGMLType.BF16 else x


def _quantized(tensor: StoredTensor, ggml_type: GGMLType, encode_rows: EncodeRows) -> Iterator[U8]:
    n_per_row = tensor.shape[-1]
    row_nbytes = n_per_row * item_size(tensor.dtype)
    rows_at_once = max(1, QUANTIZE_CHUNK // row_nbytes)
    first_row = 0
    for piece in tensor.chunks(rows_at_once * row_nbytes):
        rows = as_f32(piece, tensor.dtype).reshape(-1, n_per_row)
        yield encode_rows(rows, ggml_type, name=tensor.name, first_row=first_row)
        first_row += len(rows)


def item_size(dtype: str) -> int:
    """Bytes of one value."""
    return np.dtype(FLOATS[dtype][0]).itemsize


def as_f32(piece: memoryview, dtype: str) -> F32:
    """The values of a piece as float32: exact, but for F64, which is rounded."""
    values: F32
    if dtype == "BF16":
        values = np.left_shift(np.frombuffer(piece, "<u2"), 16, dtype="<u4").view(np.float32)
        return values
    x = np.frombuffer(piece, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        values = x.astype(np.float32, copy=False)
    return values


def f32_to_bf16(x: F32) -> U16:
    """Rounded to nearest, ties to even; a NaN stays one and becomes quiet, as in ggml."""
    bits = x.view(np.uint32)
    nan = (bits & np.uint32(0x7FFF_FFFF)) > 0x7F80_0000
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    out: U16 = rounded.astype("<u2")
    if nan.any():
        out[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(0x40)
    return out


def _quiet_nans(piece: memoryview) -> U16:
    bits: U16 = np.frombuffer(piece, "<u2").copy()
    bits[(bits & 0x7FFF) > 0x7F80] |= 0x40
    return bits


def _f16(x: F32, name: str, report: ValueReport) -> NDArray[np.float16]:
    with np.errstate(over="ignore", invalid="ignore"):
        half = x.astype("<f2")
    if (half.view("<u2") & 0x7FFF).max(initial=0) >= 0x7C00:
        lost = np.isinf(half) & np.isfinite(x)
        if count := int(lost.sum()):
            report.overflow += count
            report.overflow_tensor = report.overflow_tensor or name
            report.largest = max(report.largest, float(np.abs(x[lost]).max()))
    return half


def _count_nonfinite(piece: memoryview, tensor: StoredTensor, report: ValueReport) -> int:
    """How many values of the piece are NaN or infinite; a maximum of the exponents says quickly that none is."""
    integer, exponent = FLOATS[tensor.dtype]
    bits = np.frombuffer(piece, integer)
    masked = bits & bits.dtype.type(exponent)
    if masked.max(initial=0) < exponent:
        return 0
    count = int((masked == exponent).sum())
    report.nonfinite += count
    report.nonfinite_tensor = report.nonfinite_tensor or tensor.name
    return count
