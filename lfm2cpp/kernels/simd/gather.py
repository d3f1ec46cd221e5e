"""Vectors from several places: 16-byte pieces of blocks, scales, single bytes."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..portable import half_to_float
from ..scalar import FLOAT, HALF, I16, I32, I64
from ..vector import constant, pack, shuffle, splat, vector_op
from ..widths import block_of
from .arithmetic import bits_by_piece
from .registers import (
    F16_VECTOR,
    F32_VECTOR,
    I8_LANES,
    I8_VECTOR,
    I32_VECTOR,
    LEVEL,
    PIECES,
    W,
    bytes_,
    f32,
    i32,
    int64,
    load_at,
    load_vector,
    offset,
    side_by_side,
)

PIECE = ir.VectorType(ir.IntType(8), 16)


@vector_op(bytes_, int64, int64)
def gather_pieces(builder, address, stride):
    """Piece i is the 16 bytes at address + i * stride"""
    starts = [offset(builder, address, (i, stride)) for i in range(PIECES)]
    return side_by_side(builder, [load_vector(builder, start, PIECE) for start in starts])


def _pieces_at(builder, address, places):
    return side_by_side(builder, [load_at(builder, address, place, PIECE) for place in places])


def make_gathers(block_bytes, at):
    """Four words gather(address), one a pair of activation vectors: the 16 bytes at `at` in each of its blocks, of W
    blocks of an even number of bytes side by side at address"""
    nbytes = W * block_bytes
    return tuple(
        _make_gather([block_of(pair, piece) * block_bytes + at for piece in range(PIECES)], nbytes) for pair in range(4)
    )


def _make_gather(places, nbytes):
    """The 16 bytes at each of the places, of nbytes that may be read"""
    # A third vector would take a second permute; then loads of pieces are as fast.
    permute = LEVEL.bits == 512 and nbytes % 32 == 0 and (places[-1] + 15) // 64 - places[0] // 64 < 2

    @vector_op(bytes_, int64)
    def gather(builder, address):
        if not permute:
            return _pieces_at(builder, address, places)
        words = _words(builder, address, nbytes, [place + 2 * i for place in places for i in range(8)])
        return builder.bitcast(words, I8_VECTOR)

    return gather


def _words(builder, address, nbytes, places):
    """The int16 at `places`, even and ascending, of nbytes at address, by permutes of whole vectors.

    nbytes is a multiple of 32: the last vector may be a half. Every two vectors that follow each other give what they
    have of the words.
    """
    assert nbytes % 32 == 0 and not any(at % 2 for at in places), "words of whole vectors"
    whole, half = ir.VectorType(I16, 32), ir.VectorType(I16, 16)

    def load(number):
        if 64 * (number + 1) <= nbytes:
            return load_at(builder, address, 64 * number, whole)
        value = load_at(builder, address, 64 * number, half)
        return shuffle(builder, value, value, list(range(32)))

    numbers = sorted({at // 64 for at in places})
    result = None
    for two in (numbers[i : i + 2] for i in range(0, len(numbers), 2)):
        has = [at // 64 in two for at in places]
        lanes = [32 * two.index(at // 64) + at % 64 // 2 if at // 64 in two else 0 for at in places]
        found = shuffle(builder, load(two[0]), load(two[-1]), lanes)
        if result is not None:
            found = shuffle(builder, result, found, [len(places) * is_here + lane for lane, is_here in enumerate(has)])
        result = found
    return result


def make_gather_halves(places):
    """gather(address): of the 32 bytes at each of PIECES places the first 16 in one vector, the others in another"""

    @vector_op(types.UniTuple(bytes_, 2), int64)
    def gather(builder, address):
        halves = [[place + start for place in places] for start in (0, 16)]
        return pack(builder, [_pieces_at(builder, address, half) for half in halves])

    return gather


def make_gather_nibbles(places, is_high):
    """gather(address): of the 32 bytes at each place the nibbles, high ones where is_high, as make_gather_halves does

    With AVX-512, 64 bytes are read from the first place on, and must have all of them.
    """
    first = min(places)
    assert LEVEL.bits < 512 or max(places) + 32 <= first + 64, "places too far apart"

    def of_pieces(builder, address, start):
        pieces = _pieces_at(builder, address, [place + start for place in places])
        return bits_by_piece(builder, pieces, [4 * high for high in is_high], 15)

    def of_whole(builder, low, high, start):
        at = [64 * of_high + place - first + start for place, of_high in zip(places, is_high, strict=True)]
        return shuffle(builder, low, high, [byte + i for byte in at for i in range(16)])

    @vector_op(types.UniTuple(bytes_, 2), int64)
    def gather(builder, address):
        if LEVEL.bits < 512:
            return pack(builder, [of_pieces(builder, address, start) for start in (0, 16)])
        whole = load_at(builder, address, first, I8_VECTOR)
        low, high = builder.and_(whole, constant(I8_VECTOR, 15)), builder.lshr(whole, constant(I8_VECTOR, 4))
        return pack(builder, [of_whole(builder, low, high, start) for start in (0, 16)])

    return gather


@vector_op(types.UniTuple(i32, 2), int64, int64)
def gather_i8_pairs(builder, address, stride):
    """Lane i: the int8 at address + 2 * (i % 8) + (i // 8) * stride; and the one behind it"""
    words = ir.VectorType(I16, min(W, 8))
    runs = [load_vector(builder, offset(builder, address, (i, stride)), words) for i in range(-(-W // 8))]
    pairs = builder.sext(side_by_side(builder, runs), I32_VECTOR)
    eight, three_bytes = constant(I32_VECTOR, 8), constant(I32_VECTOR, 24)
    first = builder.ashr(builder.shl(pairs, three_bytes), three_bytes)
    return pack(builder, [first, builder.ashr(pairs, eight)])


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


def _scales_of_half(builder, address, half):
    """For the half block that a group of four lanes is: d and four scales, dmin and four minima, by a scalar unit"""
    first, second, third = (load_at(builder, address, at, I32) for at in (4, 8, 12))
    is_second = builder.trunc(half, ir.IntType(1))

    def choose(of_second, of_first):
        return builder.select(is_second, of_second, of_first)

    def four(mask):
        return ir.Constant(I32, 0x01010101 * mask)

    low_bits, high_bits = choose(four(15), four(63)), choose(four(48), four(0))
    scales, minima = choose(third, first), choose(builder.lshr(third, ir.Constant(I32, 4)), second)
    for place, low, high in ((0, scales, first), (2, minima, second)):
        high = builder.and_(builder.lshr(high, ir.Constant(I32, 2)), high_bits)
        numbers = builder.or_(builder.and_(low, low_bits), high)
        unit = half_to_float(builder, load_at(builder, address, place, HALF), FLOAT)
        yield splat(builder, unit, W), builder.bitcast(numbers, I8_LANES)


def _scales_of_blocks(builder, address, stride):
    """For whole blocks: d and scales, dmin and minima, a lane a sub-block"""
    n_blocks = W // 8
    four = ir.VectorType(I32, 4)
    blocks = [load_vector(builder, offset(builder, address, (i, stride)), four) for i in range(n_blocks)]
    words = side_by_side(builder, blocks)  # of a block: d and dmin, then 12 bytes of 6-bit numbers
    halves, numbers = builder.bitcast(words, ir.VectorType(HALF, 8 * n_blocks)), _six_bits(builder, words)
    for place in range(2):
        at = [4 * place + start + i for start in (0, 8) for i in range(4)]
        mine = shuffle(builder, numbers, numbers, [16 * block + i for block in range(n_blocks) for i in at])
        unit = shuffle(builder, halves, halves, [8 * block + place for block in range(n_blocks) for _ in at])
        yield half_to_float(builder, unit, F32_VECTOR), mine


@vector_op(types.UniTuple(f32, 2), int64, int64, int64)
def gather_sub_block_scales(builder, address, stride, half):
    """Lane i, of sub-block i % 8 of the Q4_K or Q5_K block at address + (i // 8) * stride: d * scale and dmin * min

    With four lanes, those of the given half of the block.
    """
    parts = _scales_of_half(builder, address, half) if W == 4 else _scales_of_blocks(builder, address, stride)
    values = [builder.fmul(unit, builder.uitofp(numbers, F32_VECTOR)) for unit, numbers in parts]
    return pack(builder, values)


@vector_op(f32, int64, int64)
def repeat_f16(builder, address, stride):
    """Lane i is the float16 at address + (i // 8) * stride, as float32"""
    parts = []
    for i in range(-(-W // 8)):
        value = half_to_float(builder, load_vector(builder, offset(builder, address, (i, stride)), HALF), FLOAT)
        parts.append(splat(builder, value, min(W, 8)))
    return side_by_side(builder, parts)


def make_gather_f16(block_bytes, at):
    """gather(address): lane b is the float16 at `at` in block b, of W blocks of an even number of bytes side by side"""
    nbytes = W * block_bytes
    permute = LEVEL.bits == 512 and nbytes % 32 == 0 and nbytes <= 6 * 64  # of Q4_0 to Q5_1, who load them anyway

    @vector_op(f32, int64)
    def gather(builder, address):
        if not permute:
            return _gather_f16(builder, builder.add(address, ir.Constant(I64, at)), ir.Constant(I64, block_bytes))
        words = _words(builder, address, nbytes, [block_bytes * block + at for block in range(W)])
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
