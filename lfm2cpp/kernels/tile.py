"""Register tiles: the sums of 2 W rows by a few tokens, held in registers while a panel streams by.

A tile is a tuple of vectors, row halves first: value [half][token]. Its words are outer products, written out flat in
LLVM IR: 2 loads of weights and one broadcast a token feed 2 * n_tokens multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from .dot import dot_panel_i8_value, dot_u7_value
from .portable import half_to_float, multiply_add
from .scalar import FLOAT, I32, I64
from .simd.registers import (
    F16_VECTOR,
    F32_VECTOR,
    I8_LANES,
    I8_VECTOR,
    I32_VECTOR,
    W,
    f32,
    i32,
    load_vector,
    store_vector,
)
from .vector import splat, vector_op

int64 = types.int64
VECTOR = 4 * W  # bytes of a vector
BLOCK, ENTRY = 32, 4  # bytes between two tokens of a tile: of a block's integers, of a table's entries


@dataclass(frozen=True)
class Tile:
    """The words of a tile of one width. Quantized activations lie as activation.py says; `stride` is the bytes between
    two tokens' rows of float32."""

    n_tokens: int
    zero: Any  # () -> float tile of zeros
    zero_int: Any  # () -> integer tile of zeros
    start: Any  # (z) -> integer tile, each token's int32
    dot_u7: Any  # (acc, panel, a) -> acc + 32 columns of unsigned weights, int8 activations
    dot_i8: Any  # the same for signed weights, stored by panel_i8
    dot_u7_half: Any  # (acc, panel, a) -> acc + 16 columns
    scale: Any  # (f, acc, scales, d) -> f + acc * (scales * d[t])
    add_product: Any  # (f, values, ds) -> f + values * ds[t]
    combine: Any  # (low, low_factors, high, high_factors) -> low * factors + high * factors, as float
    scale_float: Any  # (f, sums, scales, d) -> f + sums * (scales * d[t])
    fma: Any  # (f, rows, x, stride) -> f + rows * x[t]; rows of the element given to make_tile
    fma_scaled: Any  # (f, rows, scale, x, stride) -> f + (rows * scale) * x[t]
    add_scaled: Any  # (f, g, scales) -> f + g * scales; scales: 2 W float16
    store: Any  # (address, stride, f): rows of 2 W float32, `stride` bytes apart
    add: Any  # (f, g) -> f + g
    add_to: Any  # (totals, f): totals at an address, rows of 2 W, one a token


def _vec_load(builder: ir.IRBuilder, address: ir.Value, offset: int, vector: ir.Type) -> ir.Value:
    return load_vector(builder, builder.add(address, ir.Constant(I64, offset)), vector)


def _load_f32(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load_vector(builder, address, F32_VECTOR)


def _load_f16(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return half_to_float(builder, load_vector(builder, address, F16_VECTOR), F32_VECTOR)


def _load_i8(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.sitofp(load_vector(builder, address, I8_LANES), F32_VECTOR)


ELEMENTS = {"f32": (_load_f32, 4 * W), "f16": (_load_f16, 2 * W), "i8": (_load_i8, W)}  # load, bytes of W of them


def _at_token(builder: ir.IRBuilder, base: ir.Value, stride: ir.Value, t: int) -> ir.Value:
    return builder.add(base, builder.mul(stride, ir.Constant(I64, t)))


def make_tile(n_tokens: int, element: str = "f32") -> Tile:  # noqa: C901 - one list of small words
    """The words for tiles of 2 W rows by `n_tokens`; `element` is what fma reads rows of: f32, f16 or i8."""
    count = 2 * n_tokens
    load_as_f32, row_bytes = ELEMENTS[element]
    floats, ints = types.UniTuple(f32, count), types.UniTuple(i32, count)

    def unpack(builder: ir.IRBuilder, tile: ir.Value) -> list[ir.Value]:
        return [builder.extract_value(tile, i) for i in range(count)]

    def pack(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
        tile = ir.Constant(ir.ArrayType(values[0].type, count), ir.Undefined)
        for i, value in enumerate(values):
            tile = builder.insert_value(tile, value, i)
        return tile

    def halves(builder: ir.IRBuilder, address: ir.Value, vector: ir.Type) -> list[ir.Value]:
        return [_vec_load(builder, address, half * VECTOR, vector) for half in range(2)]

    def broadcast(builder: ir.IRBuilder, base: ir.Value, stride: ir.Value, element: ir.Type) -> list[ir.Value]:
        tokens = [load_vector(builder, _at_token(builder, base, stride, t), element) for t in range(n_tokens)]
        return [splat(builder, token, W) for token in tokens]

    def outer(builder: ir.IRBuilder, acc: ir.Value, rows: Any, tokens: Any, combine: Any) -> ir.Value:
        values = unpack(builder, acc)
        for half in range(2):
            for t in range(n_tokens):
                i = half * n_tokens + t
                values[i] = combine(values[i], rows[half], tokens[t])
        return pack(builder, values)

    @vector_op(floats, int64)
    def zero(builder, _):
        return pack(builder, [ir.Constant(F32_VECTOR, None)] * count)

    @vector_op(ints, int64)
    def zero_int(builder, _):
        return pack(builder, [ir.Constant(I32_VECTOR, None)] * count)

    def entries(builder: ir.IRBuilder, table: ir.Value, element: ir.Type) -> list[ir.Value]:
        return broadcast(builder, table, ir.Constant(I64, ENTRY), element)

    @vector_op(ints, int64)
    def start(builder, z):
        return pack(builder, entries(builder, z, I32) * 2)

    def dots(n_steps: int, dot: Any) -> Any:
        @vector_op(ints, ints, int64, int64)
        def steps(builder, acc, panel, a):
            for step in range(n_steps):
                rows = halves(builder, builder.add(panel, ir.Constant(I64, step * 2 * VECTOR)), I8_VECTOR)
                tokens = broadcast(builder, builder.add(a, ir.Constant(I64, 4 * step)), ir.Constant(I64, BLOCK), I32)
                tokens = [builder.bitcast(token, I8_VECTOR) for token in tokens]
                acc = outer(builder, acc, rows, tokens, lambda s, w, x: dot(builder, s, w, x))
            return acc

        return steps

    def scaled(builder: ir.IRBuilder, f: ir.Value, sums: list[ir.Value], scales: ir.Value, d: ir.Value) -> ir.Value:
        rows, tokens = halves(builder, scales, F32_VECTOR), entries(builder, d, FLOAT)
        numbers = iter(sums)
        return outer(builder, f, rows, tokens,
                     lambda s, w, x: multiply_add(builder, next(numbers), builder.fmul(w, x), s))  # fmt: skip

    @vector_op(floats, floats, ints, int64, int64)
    def scale(builder, f, acc, scales, d):
        sums = [builder.sitofp(value, F32_VECTOR) for value in unpack(builder, acc)]
        return scaled(builder, f, sums, scales, d)

    @vector_op(floats, floats, floats, int64, int64)
    def scale_float(builder, f, sums, scales, d):
        return scaled(builder, f, unpack(builder, sums), scales, d)

    @vector_op(floats, floats, int64, int64)
    def add_product(builder, f, values, ds):
        rows, tokens = halves(builder, values, F32_VECTOR), entries(builder, ds, FLOAT)
        return outer(builder, f, rows, tokens, lambda s, w, x: multiply_add(builder, w, x, s))

    @vector_op(floats, ints, int64, ints, int64)
    def combine(builder, low, low_factors, high, high_factors):
        low_rows, high_rows = halves(builder, low_factors, F32_VECTOR), halves(builder, high_factors, F32_VECTOR)
        values = []
        for i, (a, b) in enumerate(zip(unpack(builder, low), unpack(builder, high), strict=True)):
            half = i // n_tokens
            product = builder.fmul(builder.sitofp(b, F32_VECTOR), high_rows[half])
            values.append(multiply_add(builder, builder.sitofp(a, F32_VECTOR), low_rows[half], product))
        return pack(builder, values)

    def by_token(builder: ir.IRBuilder, f: ir.Value, rows: list[ir.Value], x: ir.Value, stride: ir.Value) -> ir.Value:
        """f + rows * x[t], token by token, so that only one x[t] needs a register at a time."""
        values = unpack(builder, f)
        for t in range(n_tokens):
            token = splat(builder, load_vector(builder, _at_token(builder, x, stride, t), FLOAT), W)
            for half in range(2):
                i = half * n_tokens + t
                values[i] = multiply_add(builder, rows[half], token, values[i])
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
        rows = [_load_f16(builder, builder.add(scales, ir.Constant(I64, half * 2 * W))) for half in range(2)]
        sums = zip(unpack(builder, f), unpack(builder, g), strict=True)
        return pack(builder, [multiply_add(builder, b, rows[i // n_tokens], a) for i, (a, b) in enumerate(sums)])

    @vector_op(types.void, int64, int64, floats)
    def store(builder, address, stride, f):
        for i, value in enumerate(unpack(builder, f)):
            half, t = divmod(i, n_tokens)
            where = builder.add(_at_token(builder, address, stride, t), ir.Constant(I64, half * VECTOR))
            store_vector(builder, where, value)

    @vector_op(floats, floats, floats)
    def add(builder, f, g):
        return pack(builder, [builder.fadd(a, b) for a, b in zip(unpack(builder, f), unpack(builder, g), strict=True)])

    @vector_op(types.void, int64, floats)
    def add_to(builder, totals, f):
        for i, value in enumerate(unpack(builder, f)):
            half, t = divmod(i, n_tokens)
            where = builder.add(totals, ir.Constant(I64, (2 * t + half) * VECTOR))
            store_vector(builder, where, builder.fadd(load_vector(builder, where, F32_VECTOR), value))
        # Totals stay in memory: LLVM would keep them in registers by spilling them around every chain.
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)

    return Tile(
        n_tokens, zero, zero_int, start, dots(8, dot_u7_value), dots(8, dot_panel_i8_value), dots(4, dot_u7_value),
        scale, add_product, combine, scale_float, fma, fma_scaled, add_scaled, store, add, add_to,
    )  # fmt: skip


assert I32_VECTOR.count == W
