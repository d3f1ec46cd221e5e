"""Register tiles of quantized products: the sums of some rows by a few tokens while int8 weights stream by.

A tile is a tuple of vectors, the outer product of vectors of rows and vectors of tokens: value [row vector][token
vector]. Where the registers do not hold both the integer sums of a block and the float sums of a chain of blocks, one
of them lies in memory, and that tile is an address. Its words are the same for every arrangement:

    columns  a vector is W rows of one token. Each dot takes 4 columns of W rows and of one token, broadcast.
    pairs    for smmla of NEON i8mm: a vector is 2 rows by 2 tokens. Each dot takes 8 columns of 2 rows and of 2 tokens:
             twice the products of an instruction, and the activations are loaded, not broadcast.
    matrices for AMX, in panels: all 32 columns of 2 W rows and of 16 tokens at once, to sums in memory (dot_matrix.py).
             What is done with those is as in columns, half of the rows after the other.

and for both places that weights come from:

    panel      2 W rows in memory (panel.py), used by tile after tile; q and scales are addresses
    registers  W rows straight from the file (few_tokens.py), used by one tile; q is the 8 vectors of columns.py,
               scales are vectors

How the bytes must lie for that is in weights/columns.py and activation.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
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
from .dot_matrix import matrix_words
from .portable import multiply_add
from .scalar import FLOAT, I32, I64
from .simd.registers import F32_VECTOR, I8_VECTOR, I32_VECTOR, W, bytes_, f32, i32, load_at, load_vector, store_vector
from .tile import BLOCK, ENTRY, VECTOR, IntegerWords
from .vector import pack, shuffle, splat, unpack, vector_op
from .widths import FLOATS_IN_MEMORY, MATRICES, PAIR_SUMS, PAIRS, TILE_TOKENS

int64 = types.int64
HALF = 32 if PAIRS else 16  # bytes from a tile's first 16 columns of a block to the others


@dataclass(frozen=True)
class DotTile:
    """The words of a tile of one width.

    q: 32 columns of the rows' integers; scales, factors, minima: one float32 a row; all as their source has them.
    a: int8 activations; z, d, ds: tables of one entry a token; all of a first tile of TILE_TOKENS tokens, those of the
    tile that follows `next_tile` bytes further. room: where an integer tile may lie (matrices: PANEL_SUMS bytes).
    With matrices z is not read: weights are signed already, by the OFFSET of their type.
    """

    dot_u4: Any  # (z, q, a, next_tile, room) -> integer tile: z[t] + 32 columns of weights 0..15 by int8 activations
    dot_u4_alone: Any  # (q, a, next_tile, room): the same without z
    dot_u5_alone: Any  # the same of weights 0..31
    dot_i8: Any  # (z, q, a, next_tile, room): for signed weights, through panel_i8; z: what I8_BIAS added, negative
    dot_u6_low: Any  # (z, q, a, next_tile, room) -> z[t] + the first 16 columns of weights 0..63
    dot_u6_high: Any  # the same of the other 16; a: where those are, a + HALF; q as before
    zero: Any  # (room) -> float tile of zeros, at `room`, if it lies in memory
    scale: Any  # (f, sums, scales, d, next_tile) -> f + sums * (scales * d[t])
    scale_and_add: Any  # (f, sums, scales, d, minima, ds, next_tile): f + sums * (scales * d[t]) + minima * ds[t]
    scale_halves: Any  # (f, low, low_factors, high, high_factors, scales, d, next_tile)
    #                    sums are low * factors + high * factors
    add_to: Any  # (totals, f): totals at an address, 2 W a token
    load: Any  # (address) -> the float tile that store has left there; both where float tiles are in registers
    store: Any  # (address, f)


class Panel:
    """2 W rows in memory; or W of them, one half after the other, for what is done with the sums of matrices."""

    n_vectors = 1 if MATRICES else 2
    columns, floats = int64, int64

    def bytes_of(self, builder: ir.IRBuilder, q: ir.Value, i: int) -> list[ir.Value]:
        """Vector i of 8 of every W rows."""
        return [load_at(builder, q, (2 * i + half) * VECTOR, I8_VECTOR) for half in range(self.n_vectors)]

    def floats_of(self, builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
        return [load_at(builder, values, half * VECTOR, F32_VECTOR) for half in range(self.n_vectors)]


class Registers:
    """W rows in registers."""

    n_vectors = 1
    columns, floats = types.UniTuple(bytes_, 8), f32

    def bytes_of(self, builder: ir.IRBuilder, q: ir.Value, i: int) -> list[ir.Value]:
        return [builder.extract_value(q, i)]

    def floats_of(self, builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
        return [values]


PANEL, REGISTERS = Panel(), Registers()


def at_token(builder: ir.IRBuilder, base: ir.Value, t: int, nbytes: int, next_tile: ir.Value) -> ir.Value:
    """Where token t has its nbytes, of which those of a tile's tokens lie side by side."""
    tile, place = divmod(t, TILE_TOKENS)
    base = builder.add(base, ir.Constant(I64, place * nbytes))
    return builder.add(base, builder.mul(next_tile, ir.Constant(I64, tile))) if tile else base


class Columns:
    """W rows of one token in a vector."""

    step = 4  # columns of a dot
    dot_u7, dot_i8 = staticmethod(dot_u7_value), staticmethod(dot_panel_i8_value)

    def __init__(self, n_tokens: int, source: Panel | Registers) -> None:
        self.n_token_vectors, self.source = n_tokens, source
        self.n_row_vectors = source.n_vectors

    def rows(self, builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
        """A float32 a row, as row vectors."""
        return self.source.floats_of(builder, values)

    def token(self, builder: ir.IRBuilder, table: ir.Value, t: int, element: ir.Type, next_tile: ir.Value) -> ir.Value:
        """Token vector t of a table's entries."""
        return splat(builder, load_vector(builder, at_token(builder, table, t, ENTRY, next_tile), element), W)

    def row_bytes(self, builder: ir.IRBuilder, q: ir.Value, step: int) -> list[ir.Value]:
        return self.source.bytes_of(builder, q, step)

    def token_bytes(self, builder: ir.IRBuilder, a: ir.Value, step: int, next_tile: ir.Value) -> list[ir.Value]:
        tokens = [at_token(builder, a, t, BLOCK, next_tile) for t in range(self.n_token_vectors)]
        if NEON:  # sdot takes a lane of a vector: one load for four steps
            whole = [load_at(builder, token, 16 * (step // 4), I32_VECTOR) for token in tokens]
            four = [shuffle(builder, columns, columns, [step % 4] * 4) for columns in whole]
        else:
            four = [splat(builder, load_at(builder, token, 4 * step, I32), W) for token in tokens]
        return [builder.bitcast(columns, I8_VECTOR) for columns in four]

    def by_token(self, builder: ir.IRBuilder, values: list[ir.Value]) -> list[ir.Value]:
        """The tile as [half][token]."""
        return values


class Pairs:
    """2 rows by 2 tokens in a vector, row by row: W is 4."""

    step = 8
    dot_u7 = dot_i8 = staticmethod(dot_pairs_value)

    def __init__(self, n_tokens: int, source: Panel | Registers) -> None:
        self.n_token_vectors, self.source = n_tokens // 2, source
        self.n_row_vectors = 2 * source.n_vectors

    def rows(self, builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
        halves = self.source.floats_of(builder, values)
        return [shuffle(builder, v, v, lanes) for v in halves for lanes in ([0, 0, 1, 1], [2, 2, 3, 3])]

    def token(self, builder: ir.IRBuilder, table: ir.Value, t: int, element: ir.Type, next_tile: ir.Value) -> ir.Value:
        where = at_token(builder, table, 2 * t, ENTRY, next_tile)
        pair = load_vector(builder, where, ir.VectorType(element, 2))
        return shuffle(builder, pair, pair, [0, 1, 0, 1])

    def row_bytes(self, builder: ir.IRBuilder, q: ir.Value, step: int) -> list[ir.Value]:
        pairs = [self.source.bytes_of(builder, q, 2 * step + pair) for pair in range(2)]
        return [halves[half] for half in range(self.source.n_vectors) for halves in pairs]

    def token_bytes(self, builder: ir.IRBuilder, a: ir.Value, step: int, next_tile: ir.Value) -> list[ir.Value]:
        pairs = [at_token(builder, a, 2 * p, BLOCK, next_tile) for p in range(self.n_token_vectors)]
        return [load_at(builder, pair, VECTOR * step, I8_VECTOR) for pair in pairs]

    def by_token(self, builder: ir.IRBuilder, values: list[ir.Value]) -> list[ir.Value]:
        columns = []
        for half in range(self.source.n_vectors):
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


def vector_words(lay: Columns | Pairs, source: Panel | Registers) -> IntegerWords:
    """The integer words whose sums are held in registers."""
    count, columns = lay.n_row_vectors * lay.n_token_vectors, source.columns
    ints = types.UniTuple(i32, count)

    def zeros() -> list[ir.Value]:
        return [ir.Constant(I32_VECTOR, None)] * count

    def starts(builder: ir.IRBuilder, z: ir.Value | None, next_tile: ir.Value) -> list[ir.Value]:
        if z is None:
            return zeros()
        return [lay.token(builder, z, t, I32, next_tile) for t in range(lay.n_token_vectors)] * lay.n_row_vectors

    def operands(builder: ir.IRBuilder, q: ir.Value, a: ir.Value, next_tile: ir.Value, steps: range) -> Iterator[Any]:
        """Row vectors and token vectors of bytes, step by step; `a` is where the first step's columns are."""
        for step in steps:
            yield lay.row_bytes(builder, q, step), lay.token_bytes(builder, a, step - steps.start, next_tile)

    def sums_of_dots(builder: ir.IRBuilder, sums: Any, steps: Iterator[Any], dot: Any) -> Any:
        for rows, tokens in steps:
            pairs = [(w, x) for w in rows for x in tokens]
            sums = [dot(builder, total, w, x) for total, (w, x) in zip(sums, pairs, strict=True)]
            if PAIR_SUMS:
                sums = in_order(builder, sums)
        return sums

    def sums_of_pairs(builder: ir.IRBuilder, steps: Iterator[Any], largest: int) -> Any:
        """Weights 0..largest, whose products come in pairs: those stay in 16 bits for as many steps as fit."""
        steps = list(steps)
        fit, sums, pairs = min(pairs_that_fit(largest), len(steps)), zeros(), []
        assert len(steps) % fit == 0, "the last pairs would not be added"
        for step, (rows, tokens) in enumerate(steps):
            products = [pair_products(builder, w, x) for w in rows for x in tokens]
            pairs = [builder.add(*two) for two in zip(pairs, products, strict=True)] if step % fit else products
            pairs = in_order(builder, pairs)
            if step % fit == fit - 1:
                sums = [add_pairs(builder, *two) for two in zip(sums, pairs, strict=True)]
        return sums

    def unsigned_dots(builder, z, q, a, next_tile, run, largest):
        """Weights 0..largest of a run of columns, from which on `a` is; z may be None."""
        steps = operands(builder, q, a, next_tile, range(run.start // lay.step, run.stop // lay.step))
        if not PAIR_SUMS:
            return pack(builder, sums_of_dots(builder, starts(builder, z, next_tile), steps, lay.dot_u7))
        sums = sums_of_pairs(builder, steps, largest)
        return pack(builder, [builder.add(*two) for two in zip(sums, starts(builder, z, next_tile), strict=True)])

    @vector_op(ints, int64, columns, int64, int64, int64)
    def dot_u4(builder, z, q, a, next_tile, _):
        return unsigned_dots(builder, z, q, a, next_tile, range(32), 15)

    @vector_op(ints, columns, int64, int64, int64)
    def dot_u4_alone(builder, q, a, next_tile, _):
        return unsigned_dots(builder, None, q, a, next_tile, range(32), 15)

    @vector_op(ints, columns, int64, int64, int64)
    def dot_u5_alone(builder, q, a, next_tile, _):
        return unsigned_dots(builder, None, q, a, next_tile, range(32), 31)

    @vector_op(ints, int64, columns, int64, int64, int64)
    def dot_u6_low(builder, z, q, a, next_tile, _):
        return unsigned_dots(builder, z, q, a, next_tile, range(16), 63)

    @vector_op(ints, int64, columns, int64, int64, int64)
    def dot_u6_high(builder, z, q, a, next_tile, _):
        return unsigned_dots(builder, z, q, a, next_tile, range(16, 32), 63)

    @vector_op(ints, int64, columns, int64, int64, int64)
    def dot_i8(builder, z, q, a, next_tile, _):
        first = starts(builder, z if I8_BIAS else None, next_tile)
        steps = operands(builder, q, a, next_tile, range(32 // lay.step))
        return pack(builder, sums_of_dots(builder, first, steps, lay.dot_i8))

    return IntegerWords(
        ints, dot_u4, dot_u4_alone, dot_u5_alone, dot_i8, dot_u6_low, dot_u6_high, ir.IRBuilder.extract_value
    )


@cache
def make_dot_tile(n_tokens: int, source: Panel | Registers) -> DotTile:
    """The words for tiles of the rows of `source` by `n_tokens`, which is even for PAIRS."""
    lay = (Pairs if PAIRS else Columns)(n_tokens, source)
    integer = matrix_words() if MATRICES and source is PANEL else vector_words(lay, source)
    count, ints, row_floats = lay.n_row_vectors * lay.n_token_vectors, integer.kind, source.floats
    floats = int64 if FLOATS_IN_MEMORY else types.UniTuple(f32, count)

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

    def add_scaled(builder, f, total, scales, d, next_tile, minima=None, ds=None):
        """f + total(i, r) * (scales * d) + minima * ds; value i is of row vector r.

        Token after token: so only a few of them need a register at a time.
        """
        row_scales, row_minima = lay.rows(builder, scales), lay.rows(builder, minima) if minima else None
        for t in range(lay.n_token_vectors):
            factor = lay.token(builder, d, t, FLOAT, next_tile)
            term = lay.token(builder, ds, t, FLOAT, next_tile) if ds else None
            for r in range(lay.n_row_vectors):
                i = r * lay.n_token_vectors + t
                scale = builder.fmul(row_scales[r], factor)
                value = multiply_add(builder, total(i, r), scale, float_at(builder, f, i))
                if minima:
                    value = multiply_add(builder, row_minima[r], term, value)
                f = with_float(builder, f, i, value)
        return f

    def as_float(builder: ir.IRBuilder, sums: ir.Value, i: int) -> ir.Value:
        return builder.sitofp(integer.sum_of(builder, sums, i), F32_VECTOR)

    @vector_op(floats, floats, ints, row_floats, int64, int64)
    def scale(builder, f, sums, scales, d, next_tile):
        return add_scaled(builder, f, lambda i, r: as_float(builder, sums, i), scales, d, next_tile)

    @vector_op(floats, floats, ints, row_floats, int64, row_floats, int64, int64)
    def scale_and_add(builder, f, sums, scales, d, minima, ds, next_tile):
        return add_scaled(builder, f, lambda i, r: as_float(builder, sums, i), scales, d, next_tile, minima, ds)

    @vector_op(floats, floats, ints, row_floats, ints, row_floats, row_floats, int64, int64)
    def scale_halves(builder, f, low, low_factors, high, high_factors, scales, d, next_tile):
        lows, highs = lay.rows(builder, low_factors), lay.rows(builder, high_factors)

        def total(i, r):
            product = builder.fmul(as_float(builder, high, i), highs[r])
            return multiply_add(builder, as_float(builder, low, i), lows[r], product)

        return add_scaled(builder, f, total, scales, d, next_tile)

    @vector_op(floats, int64)
    def load(builder, address):
        return pack(builder, [load_at(builder, address, i * VECTOR, F32_VECTOR) for i in range(count)])

    @vector_op(types.void, int64, floats)
    def store(builder, address, f):
        for i, value in enumerate(unpack(builder, f)):
            store_vector(builder, builder.add(address, ir.Constant(I64, i * VECTOR)), value)

    @vector_op(types.void, int64, floats)
    def add_to(builder, totals, f):
        for i, value in enumerate(lay.by_token(builder, [float_at(builder, f, i) for i in range(count)])):
            half, t = divmod(i, n_tokens)
            where = builder.add(totals, ir.Constant(I64, (2 * t + half) * VECTOR))
            store_vector(builder, where, builder.fadd(load_vector(builder, where, F32_VECTOR), value))
        # Totals stay in memory: LLVM would keep them in registers by spilling them around every chain.
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)

    return DotTile(
        integer.dot_u4, integer.dot_u4_alone, integer.dot_u5_alone, integer.dot_i8, integer.dot_u6_low,
        integer.dot_u6_high, zero, scale, scale_and_add, scale_halves, add_to, load, store,
    )  # fmt: skip


assert I32_VECTOR.count == W
