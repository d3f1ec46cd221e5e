"""Register tiles of quantized products: the sums of 2 W rows by a few tokens while a panel of int8 weights streams by.

A tile is a tuple of vectors, the outer product of vectors of rows and vectors of tokens: value [row vector][token
vector]. Where the registers do not hold both the integer sums of a block and the float sums of a chain of blocks, the
latter lie in memory, and their tile is an address. Its words are the same for both arrangements:

    columns  a vector is W rows of one token; 2 row vectors. Each dot takes 4 columns of W rows and of one token,
             broadcast.
    pairs    for smmla of NEON i8mm: a vector is 2 rows by 2 tokens; W row vectors. Each dot takes 8 columns of 2 rows
             and of 2 tokens: twice the products of an instruction, and the activations are loaded, not broadcast.

How the bytes must lie for that is in weights/columns.py and activation.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from .dot import (
    I8_BIAS,
    NEON,
    add_pairs,
    dot_pairs_value,
    dot_panel_i8_value,
    dot_u7_value,
    pair_products,
    pairs_that_fit,
)
from .portable import multiply_add
from .scalar import FLOAT, I32, I64
from .simd.registers import F32_VECTOR, I8_VECTOR, I32_VECTOR, W, f32, i32, load_vector, store_vector
from .tile import VECTOR, load_at, pack
from .vector import shuffle, splat, vector_op
from .widths import FLOATS_IN_MEMORY, PAIR_SUMS, PAIRS

int64 = types.int64
BLOCK, ENTRY = 32, 4  # bytes of a token in a tile: of a block's integers, of a table's entries
HALF = 32 if PAIRS else 16  # bytes from a tile's first 16 columns of a block to the others


@dataclass(frozen=True)
class DotTile:
    """The words of a tile of one width. `scales`, `factors` and `minima` are 2 W float32, one a row; z, d and ds tables
    of one entry a token."""

    zero: Any  # (room) -> float tile of zeros, at `room`, 2 VECTOR bytes a token, if it lies in memory
    dot_u4: Any  # (z, panel, a) -> integer tile: z[t] + 32 columns of weights 0..15, int8 activations
    dot_u4_alone: Any  # (panel, a): the same without z
    dot_i8: Any  # (z, panel, a): the same for signed weights, stored by panel_i8; z: what I8_BIAS added, negative
    dot_u6_half: Any  # (z, panel, a) -> z[t] + 16 columns of weights 0..63
    scale: Any  # (f, sums, scales, d) -> f + sums * (scales * d[t])
    scale_and_add: Any  # (f, sums, scales, d, minima, ds) -> f + sums * (scales * d[t]) + minima * ds[t]
    scale_halves: Any  # (f, low, low_factors, high, high_factors, scales, d): sums are low * factors + high * factors
    add_to: Any  # (totals, f): totals at an address, rows of 2 W, one a token


class Columns:
    """W rows of one token in a vector."""

    step = 4  # columns of a dot
    n_row_vectors = 2
    dot_u7, dot_i8 = staticmethod(dot_u7_value), staticmethod(dot_panel_i8_value)

    def __init__(self, n_tokens: int) -> None:
        self.n_token_vectors = n_tokens

    def rows(self, builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
        """2 W float32, as row vectors."""
        return [load_at(builder, values, half * VECTOR, F32_VECTOR) for half in range(2)]

    def token(self, builder: ir.IRBuilder, table: ir.Value, t: int, element: ir.Type) -> ir.Value:
        """Token vector t of a table's entries."""
        return splat(builder, load_at(builder, table, ENTRY * t, element), W)

    def row_bytes(self, builder: ir.IRBuilder, panel: ir.Value, step: int) -> list[ir.Value]:
        return [load_at(builder, panel, (2 * step + half) * VECTOR, I8_VECTOR) for half in range(2)]

    def token_bytes(self, builder: ir.IRBuilder, a: ir.Value, step: int) -> list[ir.Value]:
        tokens = [BLOCK * t for t in range(self.n_token_vectors)]
        if NEON:  # sdot takes a lane of a vector: one load for four steps
            whole = [load_at(builder, a, token + 16 * (step // 4), I32_VECTOR) for token in tokens]
            four = [shuffle(builder, columns, columns, [step % 4] * 4) for columns in whole]
        else:
            four = [splat(builder, load_at(builder, a, token + 4 * step, I32), W) for token in tokens]
        return [builder.bitcast(columns, I8_VECTOR) for columns in four]

    def by_token(self, builder: ir.IRBuilder, values: list[ir.Value]) -> list[ir.Value]:
        """The tile as [half][token]."""
        return values


class Pairs:
    """2 rows by 2 tokens in a vector, row by row: W is 4."""

    step = 8
    n_row_vectors = 4
    dot_u7 = dot_i8 = staticmethod(dot_pairs_value)

    def __init__(self, n_tokens: int) -> None:
        self.n_token_vectors = n_tokens // 2

    def rows(self, builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
        halves = [load_at(builder, values, half * VECTOR, F32_VECTOR) for half in range(2)]
        return [shuffle(builder, v, v, lanes) for v in halves for lanes in ([0, 0, 1, 1], [2, 2, 3, 3])]

    def token(self, builder: ir.IRBuilder, table: ir.Value, t: int, element: ir.Type) -> ir.Value:
        pair = load_at(builder, table, 2 * ENTRY * t, ir.VectorType(element, 2))
        return shuffle(builder, pair, pair, [0, 1, 0, 1])

    def row_bytes(self, builder: ir.IRBuilder, panel: ir.Value, step: int) -> list[ir.Value]:
        places = [4 * step + 2 * pair + half for half in range(2) for pair in range(2)]
        return [load_at(builder, panel, place * VECTOR, I8_VECTOR) for place in places]

    def token_bytes(self, builder: ir.IRBuilder, a: ir.Value, step: int) -> list[ir.Value]:
        return [load_at(builder, a, 2 * BLOCK * p + VECTOR * step, I8_VECTOR) for p in range(self.n_token_vectors)]

    def by_token(self, builder: ir.IRBuilder, values: list[ir.Value]) -> list[ir.Value]:
        columns = []
        for half in range(2):
            first, second = (values[(2 * half + pair) * self.n_token_vectors :] for pair in range(2))
            for a, b in zip(first[: self.n_token_vectors], second, strict=False):
                columns += [shuffle(builder, a, b, [0, 2, 4, 6]), shuffle(builder, a, b, [1, 3, 5, 7])]
        return columns


def in_order(builder: ir.IRBuilder, values: list[ir.Value]) -> list[ir.Value]:
    """The same values, finished here, before anything that is loaded later.

    LLVM would add integers up in another order, token after token, with a whole block's activations in memory.
    """
    indices, kinds = range(len(values)), [value.type for value in values]
    places = ",".join(["=x"] * len(values) + [str(i) for i in indices] + ["~{memory}"])
    kept = builder.asm(ir.FunctionType(ir.LiteralStructType(kinds), kinds), "", places, values, side_effect=True)
    return [builder.extract_value(kept, i) for i in indices]


def make_dot_tile(n_tokens: int) -> DotTile:
    """The words for tiles of 2 W rows by `n_tokens`, which is even."""
    lay = (Pairs if PAIRS else Columns)(n_tokens)
    count = lay.n_row_vectors * lay.n_token_vectors
    ints, floats = types.UniTuple(i32, count), int64 if FLOATS_IN_MEMORY else types.UniTuple(f32, count)

    def float_at(builder: ir.IRBuilder, f: ir.Value, i: int) -> ir.Value:
        return load_at(builder, f, i * VECTOR, F32_VECTOR) if FLOATS_IN_MEMORY else builder.extract_value(f, i)

    def with_float(builder: ir.IRBuilder, f: ir.Value, i: int, value: ir.Value) -> ir.Value:
        """The float tile f whose value i is this one."""
        if not FLOATS_IN_MEMORY:
            return builder.insert_value(f, value, i)
        store_vector(builder, builder.add(f, ir.Constant(I64, i * VECTOR)), value)
        return f

    @vector_op(floats, int64)
    def zero(builder, room):
        f = room if FLOATS_IN_MEMORY else ir.Constant(ir.ArrayType(F32_VECTOR, count), ir.Undefined)
        for i in range(count):
            f = with_float(builder, f, i, ir.Constant(F32_VECTOR, None))
        return f

    def zeros() -> list[ir.Value]:
        return [ir.Constant(I32_VECTOR, None)] * count

    def starts(builder: ir.IRBuilder, z: ir.Value | None) -> list[ir.Value]:
        if z is None:
            return zeros()
        return [lay.token(builder, z, t, I32) for t in range(lay.n_token_vectors)] * lay.n_row_vectors

    def operands(builder: ir.IRBuilder, panel: ir.Value, a: ir.Value, n_columns: int) -> Iterator[Any]:
        """Row vectors and token vectors of bytes, step by step."""
        for step in range(n_columns // lay.step):
            yield lay.row_bytes(builder, panel, step), lay.token_bytes(builder, a, step)

    def sums_of_dots(builder: ir.IRBuilder, sums: Any, panel: ir.Value, a: ir.Value, n_columns: int, dot: Any) -> Any:
        for rows, tokens in operands(builder, panel, a, n_columns):
            pairs = [(w, x) for w in rows for x in tokens]
            sums = [dot(builder, total, w, x) for total, (w, x) in zip(sums, pairs, strict=True)]
            if PAIR_SUMS:
                sums = in_order(builder, sums)
        return sums

    def sums_of_pairs(builder: ir.IRBuilder, panel: ir.Value, a: ir.Value, n_columns: int, largest: int) -> Any:
        """Weights 0..largest, whose products come in pairs: those stay in 16 bits for as many steps as fit."""
        fit, sums, pairs = pairs_that_fit(largest), zeros(), []
        for step, (rows, tokens) in enumerate(operands(builder, panel, a, n_columns)):
            products = [pair_products(builder, w, x) for w in rows for x in tokens]
            pairs = [builder.add(*two) for two in zip(pairs, products, strict=True)] if step % fit else products
            pairs = in_order(builder, pairs)
            if step % fit == fit - 1:
                sums = [add_pairs(builder, *two) for two in zip(sums, pairs, strict=True)]
        return sums

    def unsigned_dots(builder, z, panel, a, n_columns, largest):
        """Weights 0..largest; z may be None."""
        if not PAIR_SUMS:
            return pack(builder, sums_of_dots(builder, starts(builder, z), panel, a, n_columns, lay.dot_u7))
        sums = sums_of_pairs(builder, panel, a, n_columns, largest)
        return pack(builder, [builder.add(*two) for two in zip(sums, starts(builder, z), strict=True)])

    @vector_op(ints, int64, int64, int64)
    def dot_u4(builder, z, panel, a):
        return unsigned_dots(builder, z, panel, a, 32, 15)

    @vector_op(ints, int64, int64)
    def dot_u4_alone(builder, panel, a):
        return unsigned_dots(builder, None, panel, a, 32, 15)

    @vector_op(ints, int64, int64, int64)
    def dot_u6_half(builder, z, panel, a):
        return unsigned_dots(builder, z, panel, a, 16, 63)

    @vector_op(ints, int64, int64, int64)
    def dot_i8(builder, z, panel, a):
        first = starts(builder, z if I8_BIAS else None)
        return pack(builder, sums_of_dots(builder, first, panel, a, 32, lay.dot_i8))

    def add_scaled(builder, f, total, scales, d, minima=None, ds=None):
        """f + total(i, r) * (scales * d) + minima * ds; value i is of row vector r.

        Token after token: so only a few of them need a register at a time.
        """
        row_scales, row_minima = lay.rows(builder, scales), lay.rows(builder, minima) if minima else None
        for t in range(lay.n_token_vectors):
            factor, term = lay.token(builder, d, t, FLOAT), lay.token(builder, ds, t, FLOAT) if ds else None
            for r in range(lay.n_row_vectors):
                i = r * lay.n_token_vectors + t
                scale = builder.fmul(row_scales[r], factor)
                value = multiply_add(builder, total(i, r), scale, float_at(builder, f, i))
                if minima:
                    value = multiply_add(builder, row_minima[r], term, value)
                f = with_float(builder, f, i, value)
        return f

    def as_float(builder: ir.IRBuilder, sums: ir.Value, i: int) -> ir.Value:
        return builder.sitofp(builder.extract_value(sums, i), F32_VECTOR)

    @vector_op(floats, floats, ints, int64, int64)
    def scale(builder, f, sums, scales, d):
        return add_scaled(builder, f, lambda i, r: as_float(builder, sums, i), scales, d)

    @vector_op(floats, floats, ints, int64, int64, int64, int64)
    def scale_and_add(builder, f, sums, scales, d, minima, ds):
        return add_scaled(builder, f, lambda i, r: as_float(builder, sums, i), scales, d, minima, ds)

    @vector_op(floats, floats, ints, int64, ints, int64, int64, int64)
    def scale_halves(builder, f, low, low_factors, high, high_factors, scales, d):
        lows, highs = lay.rows(builder, low_factors), lay.rows(builder, high_factors)

        def total(i, r):
            product = builder.fmul(as_float(builder, high, i), highs[r])
            return multiply_add(builder, as_float(builder, low, i), lows[r], product)

        return add_scaled(builder, f, total, scales, d)

    @vector_op(types.void, int64, floats)
    def add_to(builder, totals, f):
        for i, value in enumerate(lay.by_token(builder, [float_at(builder, f, i) for i in range(count)])):
            half, t = divmod(i, n_tokens)
            where = builder.add(totals, ir.Constant(I64, (2 * t + half) * VECTOR))
            store_vector(builder, where, builder.fadd(load_vector(builder, where, F32_VECTOR), value))
        # Totals stay in memory: LLVM would keep them in registers by spilling them around every chain.
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)

    return DotTile(zero, dot_u4, dot_u4_alone, dot_i8, dot_u6_half, scale, scale_and_add, scale_halves, add_to)


assert I32_VECTOR.count == W
