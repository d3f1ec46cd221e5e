"""Register tiles: the sums of 2 W rows by a few tokens, held in registers while a panel streams by.

A tile is a tuple of vectors, row halves first: value [half][token]. Its words are outer products, written out flat in
LLVM IR: 2 loads of weights and one broadcast a token feed 2 * n_tokens multiply-adds. These are the float32 ones, of
attention and of float weights; the int8 ones are in dot_tile.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from .dot import dot_bf16_value
from .portable import multiply_add
from .scalar import FLOAT, I64
from .simd.memory import f16_at, f32_at
from .simd.registers import F32_VECTOR, I8_LANES, W, f32, load_at, load_vector, store_vector
from .vector import pack, splat, unpack, vector_op

int64 = types.int64
VECTOR = 4 * W  # bytes of a vector
BLOCK, ENTRY = 32, 4  # bytes of a token in a tile of quantized activations: of a block's integers, of a table's entries


@dataclass(frozen=True)
class IntegerWords:
    """The words of an int8 tile that make integers (dot_tile.py), and what these are."""

    kind: types.Type
    dot_u4: Any
    dot_u4_alone: Any
    dot_u5_alone: Any
    dot_i8: Any
    dot_u6_low: Any
    dot_u6_high: Any
    sum_of: Callable[[ir.IRBuilder, ir.Value, int], ir.Value]  # vector i of them


@dataclass(frozen=True)
class Tile:
    """The words of a tile of one width; `stride` is the bytes between two tokens' rows of float32."""

    zero: Any  # () -> tile of zeros
    fma: Any  # (f, rows, x, stride) -> f + rows * x[t]; rows of the element given to make_tile
    fma_scaled: Any  # (f, rows, scale, x, stride) -> f + (rows * scale) * x[t]
    add_scaled: Any  # (f, g, scales) -> f + g * scales; scales: 2 W float16
    load: Any  # (address, stride) -> rows of 2 W float32, `stride` bytes apart
    store: Any  # (address, stride, f): the same
    add: Any  # (f, g) -> f + g


def _load_i8(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.sitofp(load_vector(builder, address, I8_LANES), F32_VECTOR)


# How W of them are loaded, their bytes, and how they are multiplied.
ELEMENTS = {
    "f32": (f32_at, 4 * W, multiply_add),
    "f16": (f16_at, 2 * W, multiply_add),
    "i8": (_load_i8, W, multiply_add),
    "bf16_pairs": (f32_at, 4 * W, dot_bf16_value),
}


def _at_token(builder: ir.IRBuilder, base: ir.Value, stride: ir.Value, t: int) -> ir.Value:
    return builder.add(base, builder.mul(stride, ir.Constant(I64, t)))


def make_tile(n_tokens: int, element: str = "f32") -> Tile:  # noqa: C901 - one list of small words
    """The words for tiles of 2 W rows by `n_tokens`; `element` is what fma reads rows of."""
    count = 2 * n_tokens
    load_as_f32, row_bytes, product = ELEMENTS[element]
    floats = types.UniTuple(f32, count)

    @vector_op(floats, int64)
    def zero(builder, _):
        return pack(builder, [ir.Constant(F32_VECTOR, None)] * count)

    def by_token(builder: ir.IRBuilder, f: ir.Value, rows: list[ir.Value], x: ir.Value, stride: ir.Value) -> ir.Value:
        """f + rows * x[t], token by token, so that only one x[t] needs a register at a time."""
        values = unpack(builder, f)
        for t in range(n_tokens):
            token = splat(builder, load_vector(builder, _at_token(builder, x, stride, t), FLOAT), W)
            for half in range(2):
                i = half * n_tokens + t
                values[i] = product(builder, rows[half], token, values[i])
        return pack(builder, values)

    @vector_op(floats, floats, int64, int64, int64)
    def fma(builder, f, rows, x, stride):
        values = [load_as_f32(builder, builder.add(rows, ir.Constant(I64, half * row_bytes))) for half in range(2)]
        return by_token(builder, f, values, x, stride)

    @vector_op(floats, floats, int64, types.float32, int64, int64)
    def fma_scaled(builder, f, rows, scale, x, stride):
        factor = splat(builder, scale, W)
        values = [load_as_f32(builder, builder.add(rows, ir.Constant(I64, half * row_bytes))) for half in range(2)]
        return by_token(builder, f, [builder.fmul(value, factor) for value in values], x, stride)

    @vector_op(floats, floats, floats, int64)
    def add_scaled(builder, f, g, scales):
        rows = [f16_at(builder, builder.add(scales, ir.Constant(I64, half * 2 * W))) for half in range(2)]
        sums = zip(unpack(builder, f), unpack(builder, g), strict=True)
        return pack(builder, [multiply_add(builder, b, rows[i // n_tokens], a) for i, (a, b) in enumerate(sums)])

    @vector_op(floats, int64, int64)
    def load(builder, address, stride):
        places = [(half, t) for half in range(2) for t in range(n_tokens)]
        return pack(builder, [load_at(builder, _at_token(builder, address, stride, t), half * VECTOR, F32_VECTOR)
                              for half, t in places])  # fmt: skip

    @vector_op(types.void, int64, int64, floats)
    def store(builder, address, stride, f):
        for i, value in enumerate(unpack(builder, f)):
            half, t = divmod(i, n_tokens)
            where = builder.add(_at_token(builder, address, stride, t), ir.Constant(I64, half * VECTOR))
            store_vector(builder, where, value)

    @vector_op(floats, floats, floats)
    def add(builder, f, g):
        return pack(builder, [builder.fadd(a, b) for a, b in zip(unpack(builder, f), unpack(builder, g), strict=True)])

    return Tile(zero, fma, fma_scaled, add_scaled, load, store, add)
