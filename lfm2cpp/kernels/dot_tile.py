"""Register tiles of quantized products: the sums of 2 W rows by a few tokens while a panel of int8 weights streams by.

A tile is a tuple of vectors, the outer product of vectors of rows and vectors of tokens: value [row vector][token
vector]. Its words are the same for both arrangements:

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
from .tile import VECTOR, load_at, pack, unpack
from .vector import shuffle, splat, vector_op
from .widths import PAIR_SUMS, PAIRS

int64 = types.int64
BLOCK, ENTRY = 32, 4  # bytes of a token in a tile: of a block's integers, of a table's entries
HALF = 32 if PAIRS else 16  # bytes from a tile's first 16 columns of a block to the others


@dataclass(frozen=True)
class DotTile:
    """The words of a tile of one width. `scales`, `factors` and `values` are 2 W float32, one a row; z, d and ds tables
    of one entry a token."""

    zero: Any  # () -> float tile of zeros
    zero_int: Any  # () -> integer tile of zeros
    start: Any  # (z) -> integer tile, each token's int32
    dot_u4: Any  # (acc, panel, a) -> acc + 32 columns of weights 0..15, int8 activations
    dot_i8: Any  # the same for signed weights, stored by panel_i8
    dot_u6_half: Any  # (acc, panel, a) -> acc + 16 columns of weights 0..63
    scale: Any  # (f, acc, scales, d) -> f + acc * (scales * d[t])
    add_product: Any  # (f, values, ds) -> f + values * ds[t]
    combine: Any  # (low, low_factors, high, high_factors) -> low * factors + high * factors, as float
    scale_float: Any  # (f, sums, scales, d) -> f + sums * (scales * d[t])
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

    def tokens(self, builder: ir.IRBuilder, table: ir.Value, element: ir.Type) -> list[ir.Value]:
        """A table's entries, as token vectors."""
        entries = [load_at(builder, table, ENTRY * t, element) for t in range(self.n_token_vectors)]
        return [splat(builder, entry, W) for entry in entries]

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

    def tokens(self, builder: ir.IRBuilder, table: ir.Value, element: ir.Type) -> list[ir.Value]:
        two = ir.VectorType(element, 2)
        pairs = [load_at(builder, table, 2 * ENTRY * p, two) for p in range(self.n_token_vectors)]
        return [shuffle(builder, pair, pair, [0, 1, 0, 1]) for pair in pairs]

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
    floats, ints = types.UniTuple(f32, count), types.UniTuple(i32, count)

    def outer(builder: ir.IRBuilder, acc: ir.Value, rows: Any, tokens: Any, combine: Any) -> ir.Value:
        values = iter(unpack(builder, acc))
        return pack(builder, [combine(next(values), row, token) for row in rows for token in tokens])

    @vector_op(floats, int64)
    def zero(builder, _):
        return pack(builder, [ir.Constant(F32_VECTOR, None)] * count)

    @vector_op(ints, int64)
    def zero_int(builder, _):
        return pack(builder, [ir.Constant(I32_VECTOR, None)] * count)

    @vector_op(ints, int64)
    def start(builder, z):
        return pack(builder, lay.tokens(builder, z, I32) * lay.n_row_vectors)

    def operands(builder: ir.IRBuilder, panel: ir.Value, a: ir.Value, n_columns: int) -> Iterator[Any]:
        """Row vectors and token vectors of bytes, step by step."""
        for step in range(n_columns // lay.step):
            yield lay.row_bytes(builder, panel, step), lay.token_bytes(builder, a, step)

    def dots(n_columns: int, dot: Any) -> Any:
        @vector_op(ints, ints, int64, int64)
        def steps(builder, acc, panel, a):
            for rows, tokens in operands(builder, panel, a, n_columns):
                acc = outer(builder, acc, rows, tokens, lambda s, w, x: dot(builder, s, w, x))
                if PAIR_SUMS:
                    acc = pack(builder, in_order(builder, unpack(builder, acc)))
            return acc

        return steps

    def unsigned_dots(n_columns: int, largest: int) -> Any:
        """Weights 0..largest: where products come in pairs, those stay in 16 bits for as many steps as fit."""
        if not PAIR_SUMS:
            return dots(n_columns, lay.dot_u7)
        fit = pairs_that_fit(largest)

        @vector_op(ints, ints, int64, int64)
        def steps(builder, acc, panel, a):
            sums, pairs = unpack(builder, acc), []
            for step, (rows, tokens) in enumerate(operands(builder, panel, a, n_columns)):
                products = [pair_products(builder, w, x) for w in rows for x in tokens]
                pairs = [builder.add(*two) for two in zip(pairs, products, strict=True)] if step % fit else products
                pairs = in_order(builder, pairs)
                if step % fit == fit - 1:
                    sums = [add_pairs(builder, *two) for two in zip(sums, pairs, strict=True)]
            return pack(builder, sums)

        return steps

    def scaled(builder: ir.IRBuilder, f: ir.Value, sums: list[ir.Value], scales: ir.Value, d: ir.Value) -> ir.Value:
        rows, tokens, numbers = lay.rows(builder, scales), lay.tokens(builder, d, FLOAT), iter(sums)
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
        rows, tokens = lay.rows(builder, values), lay.tokens(builder, ds, FLOAT)
        return outer(builder, f, rows, tokens, lambda s, w, x: multiply_add(builder, w, x, s))

    @vector_op(floats, ints, int64, ints, int64)
    def combine(builder, low, low_factors, high, high_factors):
        low_rows, high_rows = lay.rows(builder, low_factors), lay.rows(builder, high_factors)
        values = []
        for i, (a, b) in enumerate(zip(unpack(builder, low), unpack(builder, high), strict=True)):
            r = i // lay.n_token_vectors
            product = builder.fmul(builder.sitofp(b, F32_VECTOR), high_rows[r])
            values.append(multiply_add(builder, builder.sitofp(a, F32_VECTOR), low_rows[r], product))
        return pack(builder, values)

    @vector_op(types.void, int64, floats)
    def add_to(builder, totals, f):
        for i, value in enumerate(lay.by_token(builder, unpack(builder, f))):
            half, t = divmod(i, n_tokens)
            where = builder.add(totals, ir.Constant(I64, (2 * t + half) * VECTOR))
            store_vector(builder, where, builder.fadd(load_vector(builder, where, F32_VECTOR), value))
        # Totals stay in memory: LLVM would keep them in registers by spilling them around every chain.
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)

    return DotTile(
        zero, zero_int, start, unsigned_dots(32, 15), dots(32, lay.dot_i8), unsigned_dots(16, 63),
        scale, add_product, combine, scale_float, add_to,
    )  # fmt: skip


assert I32_VECTOR.count == W
