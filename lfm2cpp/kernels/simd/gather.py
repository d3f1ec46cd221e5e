"""Vectors from several places: 16-byte pieces of blocks, scales, single bytes."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..portable import half_to_float
from ..scalar import FLOAT, HALF, I16, I32, I64
from ..vector import constant, shuffle, splat, vector_op
from ..widths import block_of
from .arithmetic import bits_by_piece
from .registers import (
    F16_VECTOR,
    F32_VECTOR,
    I8_VECTOR,
    I32_VECTOR,
    LEVEL,
    PIECES,
    W,
    bytes_,
    f32,
    i32,
    int64,
    load_vector,
    offset,
    side_by_side,
)


def _pieces(builder, addresses):
    """16-byte pieces from these addresses, side by side."""
    piece = ir.VectorType(ir.IntType(8), 16)
    return side_by_side(builder, [load_vector(builder, address, piece) for address in addresses])


@vector_op(bytes_, int64, int64)
def gather_pieces(builder, address, stride):
    """Piece i is the 16 bytes at address + i * stride"""
    return _pieces(builder, [offset(builder, address, (i, stride)) for i in range(PIECES)])


def _as_tuple(builder, vectors):
    result = ir.Constant(ir.ArrayType(I8_VECTOR, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        result = builder.insert_value(result, vector, i)
    return result


def _pieces_at(builder, address, places):
    return _pieces(builder, [builder.add(address, ir.Constant(I64, place)) for place in places])


def make_gathers(block_bytes, offset):
    """Four words gather(address), one a vector: the 16 bytes at `offset` of those of W blocks side by side that
    widths.block_of says"""
    return tuple(
        _make_gather([block_of(vector, piece) * block_bytes + offset for piece in range(PIECES)], W * block_bytes)
        for vector in range(4)
    )


def _make_gather(places, nbytes):
    """The 16 bytes at each of the places, of nbytes that may be read"""
    permute = LEVEL.bits == 512 and nbytes % 32 == 0 and _lines_of(places) <= 2

    @vector_op(bytes_, int64)
    def gather(builder, address):
        if not permute:
            return _pieces_at(builder, address, places)
        words = _words(builder, address, nbytes, [place + 2 * i for place in places for i in range(8)])
        return builder.bitcast(words, I8_VECTOR)

    return gather


def _lines_of(places):
    """How many runs of 64 bytes the pieces at `places` touch"""
    return (places[-1] + 15) // 64 - places[0] // 64 + 1


def _words(builder, address, nbytes, places):
    """The int16 at `places` of nbytes at address, by permutes of whole vectors: faster than loads of pieces are.

    The last vector may be a half. Every two vectors that follow each other give what they have of the words.
    """
    whole, half = ir.VectorType(I16, 32), ir.VectorType(I16, 16)

    def load(line):
        at = builder.add(address, ir.Constant(I64, 64 * line))
        if 64 * (line + 1) <= nbytes:
            return load_vector(builder, at, whole)
        value = load_vector(builder, at, half)
        return shuffle(builder, value, value, list(range(32)))

    lines = sorted({at // 64 for at in places})
    result = None
    for i in range(0, len(lines), 2):
        pair = lines[i : i + 2]
        has = [at // 64 in pair for at in places]
        lanes = [32 * pair.index(at // 64) + at % 64 // 2 if at // 64 in pair else 0 for at in places]
        found = shuffle(builder, load(pair[0]), load(pair[-1]), lanes)
        if result is not None:
            found = shuffle(builder, result, found, [len(places) * is_here + i for i, is_here in enumerate(has)])
        result = found
    return result


def make_gather_halves(places):
    """gather(address): of the 32 bytes at each of PIECES places the first 16 in one vector, the others in another"""

    @vector_op(types.UniTuple(bytes_, 2), int64)
    def gather(builder, address):
        halves = [[place + start for place in places] for start in (0, 16)]
        return _as_tuple(builder, [_pieces_at(builder, address, half) for half in halves])

    return gather


def make_gather_nibbles(places, is_high):
    """gather(address): of the 32 bytes at each place the nibbles, high ones where is_high, as make_gather_halves does

    With AVX-512 the places must be within 64 bytes, which are read whole.
    """

    @vector_op(types.UniTuple(bytes_, 2), int64)
    def gather(builder, address):
        vectors, first = [], min(places)
        for start in (0, 16):
            if LEVEL.bits == 512:
                whole = load_vector(builder, builder.add(address, ir.Constant(I64, first)), I8_VECTOR)
                low, high = builder.and_(whole, constant(I8_VECTOR, 15)), builder.lshr(whole, constant(I8_VECTOR, 4))
                at = [64 * high + place - first + start for place, high in zip(places, is_high, strict=True)]
                vectors.append(shuffle(builder, low, high, [byte + i for byte in at for i in range(16)]))
            else:
                pieces = _pieces_at(builder, address, [place + start for place in places])
                vectors.append(bits_by_piece(builder, pieces, [4 * high for high in is_high], 15))
        return _as_tuple(builder, vectors)

    return gather


@vector_op(types.UniTuple(i32, 2), int64, int64)
def gather_i8_pairs(builder, address, stride):
    """Lane i: the int8 at address + 2 * (i % 8) + (i // 8) * stride; and the one behind it"""
    words = ir.VectorType(I16, min(W, 8))
    runs = [load_vector(builder, offset(builder, address, (i, stride)), words) for i in range(-(-W // 8))]
    pairs = builder.sext(side_by_side(builder, runs), I32_VECTOR)
    eight, three_bytes = constant(I32_VECTOR, 8), constant(I32_VECTOR, 24)
    result = ir.Constant(ir.ArrayType(I32_VECTOR, 2), ir.Undefined)
    result = builder.insert_value(result, builder.ashr(builder.shl(pairs, three_bytes), three_bytes), 0)
    return builder.insert_value(result, builder.ashr(pairs, eight), 1)


def _six_bits(builder, words):
    """Of each block's four words, the last three: 16 bytes of 6-bit numbers, scales 0..3, minima 0..3, scales 4..7 and
    minima 4..7.

    The first four of both are in bytes of their own, below two bits of the other four, whose low four bits share bytes.
    """
    n_blocks = words.type.count // 4

    def part(places, shifts, masks):
        lanes = shuffle(builder, words, words, [4 * i + place for i in range(n_blocks) for place in places])
        shifted = builder.lshr(lanes, constant(lanes.type, shifts * n_blocks))
        return builder.and_(shifted, constant(lanes.type, [0x01010101 * mask for mask in masks] * n_blocks))

    low, high = part([1, 2, 3, 3], [0, 0, 0, 4], [63, 63, 15, 15]), part([1, 2, 1, 2], [2] * 4, [0, 0, 48, 48])
    return builder.bitcast(builder.or_(low, high), ir.VectorType(ir.IntType(8), 16 * n_blocks))


@vector_op(types.UniTuple(f32, 2), int64, int64, int64)
def gather_sub_block_scales(builder, address, stride, half):
    """Lane i, of sub-block i % 8 of the Q4_K or Q5_K block at address + (i // 8) * stride: d * scale and dmin * min

    With four lanes, those of the given half of the block.
    """
    n_blocks = -(-W // 8)
    four = ir.VectorType(I32, 4)
    blocks = [load_vector(builder, offset(builder, address, (i, stride)), four) for i in range(n_blocks)]
    words = side_by_side(builder, blocks)  # of a block: d and dmin, then 12 bytes of 6-bit numbers
    halves, numbers = builder.bitcast(words, ir.VectorType(HALF, 8 * n_blocks)), _six_bits(builder, words)
    result = ir.Constant(ir.ArrayType(F32_VECTOR, 2), ir.Undefined)
    for place in range(2):
        at = [4 * place + start + i for start in (0, 8) for i in range(4)]
        mine = shuffle(builder, numbers, numbers, [16 * block + i for block in range(n_blocks) for i in at])
        unit = shuffle(builder, halves, halves, [8 * block + place for block in range(n_blocks) for _ in at])
        if W == 4:
            both = [shuffle(builder, mine, mine, list(range(i, i + 4))) for i in (4, 0)]
            mine = builder.select(builder.trunc(half, ir.IntType(1)), *both)
            unit = shuffle(builder, unit, unit, list(range(4)))
        unit = half_to_float(builder, unit, F32_VECTOR)
        result = builder.insert_value(result, builder.fmul(unit, builder.uitofp(mine, F32_VECTOR)), place)
    return result


@vector_op(f32, int64, int64)
def repeat_f16(builder, address, stride):
    """Lane i is the float16 at address + (i // 8) * stride, as float32"""
    parts = []
    for i in range(-(-W // 8)):
        value = half_to_float(builder, load_vector(builder, offset(builder, address, (i, stride)), HALF), FLOAT)
        parts.append(splat(builder, value, min(W, 8)))
    return side_by_side(builder, parts)


def make_gather_f16(block_bytes, offset=0):
    """gather(address): lane b is the float16 at `offset` of block b, of W blocks side by side"""
    permute = LEVEL.bits == 512 and W * block_bytes % 32 == 0 and W * block_bytes <= 6 * 64

    @vector_op(f32, int64)
    def gather(builder, address):
        if not permute:
            address = builder.add(address, ir.Constant(I64, offset))
            return _gather_f16(builder, address, ir.Constant(I64, block_bytes))
        words = _words(builder, address, W * block_bytes, [block_bytes * b + offset for b in range(W)])
        return half_to_float(builder, builder.bitcast(words, F16_VECTOR), F32_VECTOR)

    return gather


def _gather_f16(builder, address, stride):
    values = [load_vector(builder, offset(builder, address, (i, stride)), I16) for i in range(W)]
    if LEVEL.bits == 512:
        values = [_four_in_one(builder, values[i : i + 4]) for i in range(0, W, 4)]
    gathered = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        gathered = builder.insert_element(gathered, value, ir.Constant(I32, i))
    return half_to_float(builder, builder.bitcast(gathered, F16_VECTOR), F32_VECTOR)


def _four_in_one(builder, values):
    """Four int16 as an int64: a scalar unit's work, where the vectors' have plenty."""
    bits = builder.zext(values[0], I64)
    for i, value in enumerate(values[1:], 1):
        bits = builder.or_(bits, builder.shl(builder.zext(value, I64), ir.Constant(I64, 16 * i)))
    return bits


@vector_op(f32, int64, int64)
def gather_f16(builder, address, stride):
    """Lane i is the float16 at address + i * stride, as float32"""
    return _gather_f16(builder, address, stride)
