"""Vectors from several places: 16-byte pieces of blocks, scales, single bytes."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..portable import half_to_float
from ..scalar import FLOAT, HALF, I16, I32, I64
from ..vector import constant, shuffle, splat, vector_op
from .registers import (
    F16_VECTOR,
    F32_VECTOR,
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


@vector_op(bytes_, int64, int64, int64)
def gather_pieces_2(builder, address, stride, pair_stride):
    """Piece i is the 16 bytes at address + (i % 2) * stride + (i // 2) * pair_stride"""
    return _pieces(
        builder, [offset(builder, address, (i % 2, stride), (i // 2, pair_stride)) for i in range(PIECES)]
    )


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


def make_gather_f16(stride):
    """gather_f16 for an even stride known when compiling: by permutes of whole vectors where they reach 8 lanes."""
    permute = LEVEL.bits == 512 and 7 * stride + 2 <= 128

    @vector_op(f32, int64)
    def gather(builder, address):
        if not permute:
            return _gather_f16(builder, address, ir.Constant(I64, stride))
        words, lanes = ir.VectorType(I16, 32), [lane * stride // 2 for lane in range(8)]
        eights = []
        for start in (0, 8 * stride):
            low = load_vector(builder, builder.add(address, ir.Constant(I64, start)), words)
            high = load_vector(builder, builder.add(address, ir.Constant(I64, start + 64)), words)
            eights.append(shuffle(builder, low, high, lanes))
        return half_to_float(builder, builder.bitcast(side_by_side(builder, eights), F16_VECTOR), F32_VECTOR)

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
