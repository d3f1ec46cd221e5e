"""Token embedding: rows of a weight matrix as float32, one kernel a type."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from .compiler import kernel
from .scalar import f32_of_bits, load_f16, load_f32, load_i32, load_i64, load_u16, store_f32
from .weights import BLOCK_TYPES


def make_get_rows(weights: ModuleType) -> Any:
    dequantize_block, block, block_bytes = weights.dequantize_block, weights.BLOCK, weights.BLOCK_BYTES

    def get_rows(w, row_bytes, n, tokens, out, count, ith, nth):
        """out[t] = row tokens[t] of w; tokens: the address of an int32 array's address"""
        ids = load_i64(tokens)
        for t in range(ith, load_i64(count), nth):
            row = w + load_i32(ids + 4 * t) * row_bytes
            for b in range(n // block):
                dequantize_block(row + b * block_bytes, out + 4 * (t * n + b * block))

    return kernel(get_rows)


def make_get_float_rows(load: Any, size: int) -> Any:
    def get_rows(w, row_bytes, n, tokens, out, count, ith, nth):
        ids = load_i64(tokens)
        for t in range(ith, load_i64(count), nth):
            row = w + load_i32(ids + 4 * t) * row_bytes
            for i in range(n):
                store_f32(out + 4 * (t * n + i), load(row + size * i))

    return kernel(get_rows)


def _make_bf16() -> Any:
    from .compiler import device

    @device
    def load_bf16(address):
        return f32_of_bits(load_u16(address) << 16)

    return load_bf16


get_rows_f32 = make_get_float_rows(load_f32, 4)
get_rows_f16 = make_get_float_rows(load_f16, 2)
get_rows_bf16 = make_get_float_rows(_make_bf16(), 2)
globals().update({f"get_rows_{name}": make_get_rows(weights) for name, weights in BLOCK_TYPES.items()})
