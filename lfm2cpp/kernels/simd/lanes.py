"""Words that move values between lanes: sums, maxima, transposes."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..scalar import I16, I32, I64
from ..vector import call_llvm, constant, pack, shuffle, vector_op
from ..widths import place_of
from .memory import f32_at
from .registers import (
    F32_VECTOR,
    I8_VECTOR,
    I32_VECTOR,
    LEVEL,
    PIECES,
    W,
    bytes_,
    f32,
    float32,
    i32,
    int64,
    offset,
    store_vector,
)


def _halve(builder, value, combine):
    while value.type.count > 1:
        half = value.type.count // 2
        low = shuffle(builder, value, value, list(range(half)))
        high = shuffle(builder, value, value, list(range(half, 2 * half)))
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


@vector_op(float32, f32)
def sum_lanes(builder, a):
    """The sum of the lanes, halves first: always in the same order"""
    return _halve(builder, a, builder.fadd)


@vector_op(float32, f32)
def max_lanes(builder, a):
    """The largest lane"""
    return _halve(builder, a, lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


@vector_op(int64, i32)
def sum_lanes_i32(builder, a):
    """The sum of the lanes"""
    return builder.sext(_halve(builder, a, builder.add), I64)


def _within_pieces(builder, a, b, pattern):
    """Shuffle two vectors of 4-byte lanes piece by piece; pattern picks from a's 4 lanes (0..3) and b's (4..7)."""
    lanes = []
    for piece in range(PIECES):
        lanes += [4 * piece + p if p < 4 else W + 4 * piece + p - 4 for p in pattern]
    return shuffle(builder, a, b, lanes)


def transpose_4_values(builder, a, b, c, d):
    """Within each piece, the 4 x 4 lanes of four vectors, transposed."""
    ab_low, ab_high = (_within_pieces(builder, a, b, p) for p in ([0, 4, 1, 5], [2, 6, 3, 7]))
    cd_low, cd_high = (_within_pieces(builder, c, d, p) for p in ([0, 4, 1, 5], [2, 6, 3, 7]))
    return [
        _within_pieces(builder, ab_low, cd_low, [0, 1, 4, 5]),
        _within_pieces(builder, ab_low, cd_low, [2, 3, 6, 7]),
        _within_pieces(builder, ab_high, cd_high, [0, 1, 4, 5]),
        _within_pieces(builder, ab_high, cd_high, [2, 3, 6, 7]),
    ]


@vector_op(types.UniTuple(bytes_, 4), bytes_, bytes_, bytes_, bytes_)
def transpose_4(builder, a, b, c, d):
    """Within each piece, the four 4-byte lanes of a, b, c, d transposed: result j holds lane j of a, b, c, d"""
    rows = transpose_4_values(builder, *(builder.bitcast(v, I32_VECTOR) for v in (a, b, c, d)))
    return pack(builder, [builder.bitcast(row, I8_VECTOR) for row in rows])


@vector_op(bytes_, bytes_, bytes_)
def low_halves(builder, a, b):
    """Within each piece: a's first 8 bytes, then b's"""
    return _halves(builder, a, b, 0)


@vector_op(bytes_, bytes_, bytes_)
def high_halves(builder, a, b):
    """Within each piece: a's last 8 bytes, then b's"""
    return _halves(builder, a, b, 8)


def _halves(builder, a, b, first):
    eight = [piece * 16 + first + i for piece in range(PIECES) for i in range(8)]
    lanes = [start + i for piece in range(0, 8 * PIECES, 8) for start in (0, 4 * W) for i in eight[piece : piece + 8]]
    return shuffle(builder, a, b, lanes)


EVEN, ODD = [0, 2, 4, 6], [1, 3, 5, 7]  # lanes of two pieces
PLACES = [place_of(block) for block in range(W)]


def _sum_pairs(builder, a, b):
    """Within each piece the sums of a's lanes 0 and 1, 2 and 3, then b's"""
    if LEVEL.name.startswith("neon"):  # said by name: LLVM may take the sum apart again where another follows
        return call_llvm(builder, "llvm.aarch64.neon.addp.v4i32", I32_VECTOR, a, b)
    return builder.add(*(_within_pieces(builder, a, b, lanes) for lanes in (EVEN, ODD)))


def _sum_pairs_i16(builder, a, b):
    """The same for lanes that fit 16 bits: fewer instructions on x86"""
    if not LEVEL.name.startswith("avx"):
        return _sum_pairs(builder, a, b)
    wide = LEVEL.bits == 512
    pack_words = "llvm.x86.avx512.packssdw.512" if wide else "llvm.x86.avx2.packssdw"
    multiply_add = "llvm.x86.avx512.pmaddw.d.512" if wide else "llvm.x86.avx2.pmadd.wd"
    words = ir.VectorType(I16, 2 * W)
    return call_llvm(builder, multiply_add, I32_VECTOR, call_llvm(builder, pack_words, words, a, b), constant(words, 1))


def _sum_pieces(builder, a, b, c, d, sum_pairs):
    ab, cd = sum_pairs(builder, a, b), sum_pairs(builder, c, d)
    if PIECES == 1:
        return _sum_pairs(builder, ab, cd)
    pairs = [vector // 2 * W + 4 * piece + vector % 2 * 2 for vector, piece in PLACES]
    return builder.add(*(shuffle(builder, ab, cd, [pair + i for pair in pairs]) for i in range(2)))


@vector_op(i32, i32, i32, i32, i32)
def sum_pieces(builder, a, b, c, d):
    """Lane b: the sum of the four lanes of the piece of a, b, c or d that widths.place_of says"""
    return _sum_pieces(builder, a, b, c, d, _sum_pairs)


@vector_op(i32, i32, i32, i32, i32)
def sum_pieces_i16(builder, a, b, c, d):
    """sum_pieces for lanes that fit 16 bits"""
    return _sum_pieces(builder, a, b, c, d, _sum_pairs_i16)


@vector_op(i32, i32, i32, i32, i32)
def sum_pieces_small(builder, a, b, c, d):
    """sum_pieces for lanes whose pairwise sums fit 16 bits"""
    sums = _sum_pairs_i16(builder, _sum_pairs_i16(builder, a, b), _sum_pairs_i16(builder, c, d))
    return shuffle(builder, sums, sums, [4 * piece + vector for vector, piece in PLACES])


def make_transpose_square(load):
    """transpose(source, stride, destination, step): W x W float32, whose rows load(builder, address) reads `stride`
    bytes apart, become columns: rows at destination, `step` bytes apart."""

    @vector_op(types.void, int64, int64, int64, int64)
    def transpose(builder, source, stride, destination, step):
        rows = [load(builder, offset(builder, source, (i, stride))) for i in range(W)]
        for lane, column in _transposed(builder, rows):
            store_vector(builder, offset(builder, destination, (lane, step)), column)

    return transpose


transpose_square = make_transpose_square(f32_at)


def make_transpose_rows(places):
    """transpose(source, destination, step): rows of W float32, those of `places` bytes behind source, become columns:
    lane i of all of them, one after the other, at destination + i * step."""

    @vector_op(types.void, int64, int64, int64)
    def transpose(builder, source, destination, step):
        for first in range(0, len(places), W):
            some = places[first : first + W]
            rows = [f32_at(builder, builder.add(source, ir.Constant(I64, place))) for place in some]
            rows += [ir.Constant(F32_VECTOR, ir.Undefined)] * (W - len(some))
            to = builder.add(destination, ir.Constant(I64, 4 * first))
            for lane, column in _transposed(builder, rows):
                value = shuffle(builder, column, column, list(range(len(some))))
                store_vector(builder, offset(builder, to, (lane, step)), value)

    return transpose


def _transposed(builder, rows):
    """(lane, its values in W rows): 4 x 4 lanes are transposed within the pieces, then the pieces themselves."""
    groups = [transpose_4_values(builder, *rows[i : i + 4]) for i in range(0, W, 4)]
    for j in range(4):
        for piece, column in enumerate(_transpose_pieces(builder, [group[j] for group in groups])):
            yield 4 * piece + j, column


def _transpose_pieces(builder, vectors):
    """Vector i's piece j becomes vector j's piece i; a word picks pieces of one vector, then of another."""
    if PIECES == 1:
        return vectors
    if PIECES == 4:
        a, b, c, d = vectors
        low, high = [0, 1], [2, 3]
        vectors = [_pick_pieces(builder, *pair, part) for part in (low, high) for pair in ((a, b), (c, d))]
    even, odd = list(range(0, PIECES, 2)), list(range(1, PIECES, 2))
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return [_pick_pieces(builder, *pair, part) for pair in pairs for part in (even, odd)]


def _pick_pieces(builder, a, b, pieces):
    lanes = [4 * piece + lane for piece in pieces for lane in range(4)]
    return shuffle(builder, a, b, lanes + [W + lane for lane in lanes])
