"""Making vectors, and arithmetic lane by lane beyond the operators of vector.py."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..portable import multiply_add
from ..scalar import I16, I32, I64
from ..vector import call_llvm, constant, pack, shuffle, splat, vector_op
from ..widths import BIT_MATRICES
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
    load_vector,
)


@vector_op(f32, float32)
def splat_f32(builder, value):
    """The same float32 in every lane"""
    return splat(builder, value, W)


@vector_op(i32, int64)
def splat_i32(builder, value):
    """The same int32 in every lane"""
    return splat(builder, builder.trunc(value, I32), W)


@vector_op(bytes_, int64)
def splat_u8(builder, value):
    """The same byte in every lane"""
    return splat(builder, builder.trunc(value, ir.IntType(8)), 4 * W)


@vector_op(bytes_, int64)
def splat_4_bytes(builder, address):
    """The 4 bytes at address, in every lane of 4"""
    return builder.bitcast(splat(builder, load_vector(builder, address, I32), W), I8_VECTOR)


@vector_op(f32, f32, f32, f32)
def fma(builder, a, b, c):
    """a * b + c, with one rounding where the CPU can"""
    return multiply_add(builder, a, b, c)


@vector_op(f32, f32, f32)
def maximum(builder, a, b):
    """The larger of each lane; b where one is NaN"""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@vector_op(f32, f32, f32)
def minimum(builder, a, b):
    """The smaller of each lane; b where one is NaN"""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@vector_op(f32, f32, f32, f32, f32)
def where_greater(builder, a, b, x, y):
    """x where a > b, else y, as where one of them is NaN"""
    return builder.select(builder.fcmp_ordered(">", a, b), x, y)


@vector_op(f32, f32, i32)
def add_exponent(builder, a, n):
    """a * 2**n for results that stay normal"""
    bits = builder.add(builder.bitcast(a, I32_VECTOR), builder.shl(n, constant(I32_VECTOR, 23)))
    return builder.bitcast(bits, F32_VECTOR)


@vector_op(f32, f32)
def absolute(builder, a):
    """|a|"""
    return call_llvm(builder, f"llvm.fabs.v{W}f32", F32_VECTOR, a)


@vector_op(f32, f32)
def negative(builder, a):
    return builder.fneg(a)


@vector_op(f32, i32)
def to_f32(builder, a):
    """int32 -> float32"""
    return builder.sitofp(a, F32_VECTOR)


NONE = ir.Constant(I8_VECTOR, None)  # bytes of zeros
MAGIC = 12582912.0  # 1.5 * 2**23: the last bits of a number's sum with it are the rounded number


@vector_op(i32, f32, f32)
def product_to_i32(builder, a, b):
    """a * b -> int32, to nearest even, of the exact product where the CPU can; |a * b| < 2**22"""
    bits = builder.bitcast(multiply_add(builder, a, b, constant(F32_VECTOR, MAGIC)), I32_VECTOR)
    return builder.sub(bits, constant(I32_VECTOR, 0x4B400000))


@vector_op(f32, f32)
def from_whole(builder, a):
    """a minus the nearest whole number; |a| < 2**22"""
    if LEVEL.bits == 512:
        name, nearest = "llvm.x86.avx512.mask.reduce.ps.512", ir.Constant(I32, 0)
        all_lanes, as_set = ir.Constant(I16, -1), ir.Constant(I32, 4)
        return call_llvm(builder, name, F32_VECTOR, a, nearest, a, all_lanes, as_set)
    magic = constant(F32_VECTOR, MAGIC)
    return builder.fsub(a, builder.fsub(builder.fadd(a, magic), magic))


@vector_op(f32, f32)
def reciprocal(builder, a):
    """1 / a to the last bit but one, for 1 <= a < 2**127"""
    one = constant(F32_VECTOR, 1.0)
    if LEVEL.bits != 512:
        return builder.fdiv(one, a)
    # A division takes 16 cycles: 14 bits from a table instead, and a step of Newton's.
    zero, all_lanes = ir.Constant(F32_VECTOR, None), ir.Constant(I16, -1)
    y = call_llvm(builder, "llvm.x86.avx512.rcp14.ps.512", F32_VECTOR, a, zero, all_lanes)
    off = multiply_add(builder, builder.fneg(a), y, one)
    return multiply_add(builder, off, y, y)


@vector_op(f32, i32)
def bits_to_f32(builder, a):
    """Reinterpret"""
    return builder.bitcast(a, F32_VECTOR)


@vector_op(types.UniTuple(f32, 2), i32, int64)
def i8_of_lanes(builder, a, i):
    """Of the four int8 in each lane: number i and the one behind it, as float32"""
    bits = builder.mul(builder.trunc(i, I32), ir.Constant(I32, 8))
    from_i = builder.lshr(a, splat(builder, bits, W))
    two_bytes, three_bytes = (constant(I32_VECTOR, n) for n in (16, 24))
    first = builder.ashr(builder.shl(from_i, three_bytes), three_bytes)
    second = builder.ashr(builder.shl(from_i, two_bytes), three_bytes)
    return pack(builder, [builder.sitofp(value, F32_VECTOR) for value in (first, second)])


@vector_op(bytes_, bytes_)
def low_nibbles(builder, a):
    """a & 15 of every byte"""
    return builder.and_(a, constant(I8_VECTOR, 15))


@vector_op(bytes_, bytes_)
def high_nibbles(builder, a):
    """a >> 4 of every byte"""
    return builder.lshr(a, constant(I8_VECTOR, 4))


def bits_by_piece(builder, a, shifts, mask, left=0):
    """Every byte of piece i becomes ((byte >> shifts[i]) & mask) << left; no bit is shifted in from another byte"""
    assert mask << max(shifts) < 256 and mask << left < 256, "bits of other bytes would be asked for"
    if BIT_MATRICES and (any(shifts) or left):
        return _times_matrices(builder, a, [_bit_matrix(shift, mask, left) for shift in shifts])
    if len(set(shifts)) > 1:  # lanes of four bytes can be shifted each by its own number of bits
        lanes = constant(I32_VECTOR, [shift for shift in shifts for _ in range(4)])
        a = builder.bitcast(builder.lshr(builder.bitcast(a, I32_VECTOR), lanes), I8_VECTOR)
    else:
        a = builder.lshr(a, constant(I8_VECTOR, shifts[0]))
    return builder.shl(builder.and_(a, constant(I8_VECTOR, mask)), constant(I8_VECTOR, left))


def _bit_matrix(shift, mask, left):
    """Byte 7 - k says which bits of a byte make bit k of the result (Intel's manual, GF2P8AFFINEQB)."""
    return sum(1 << (8 * (7 - k) + k - left + shift) for k in range(8) if (mask << left) >> k & 1)


def _times_matrices(builder, a, matrices):
    """a's bytes, as columns of bits, times the matrix of their piece"""
    longs = constant(ir.VectorType(I64, 2 * PIECES), [matrix for matrix in matrices for _ in range(2)])
    return _affine(builder, a, builder.bitcast(longs, I8_VECTOR))


def _affine(builder, a, matrices):
    """a's bytes, as columns of bits, times the matrix at the same 8 bytes of `matrices`"""
    zero = ir.Constant(ir.IntType(8), 0)
    return call_llvm(builder, f"llvm.x86.vgf2p8affineqb.{LEVEL.bits}", I8_VECTOR, a, matrices, zero)


def make_bits_by_piece(shifts, mask, left):
    """bits(a): every byte of piece i becomes ((byte >> shifts[i]) & mask) << left"""

    @vector_op(bytes_, bytes_)
    def bits(builder, a):
        return bits_by_piece(builder, a, shifts, mask, left)

    return bits


def _spread_bits(builder, a, bits, value):
    """Byte i of every piece becomes `value` if bit bits[i] of that piece of a is set, else 0"""
    places = [16 * piece + bit // 8 for piece in range(PIECES) for bit in bits]
    masks = constant(I8_VECTOR, [1 << bit % 8 for bit in bits] * PIECES)
    is_clear = builder.icmp_unsigned("==", builder.and_(shuffle(builder, a, a, places), masks), NONE)
    return builder.select(is_clear, NONE, constant(I8_VECTOR, value))


def make_spread_bits(bits, value):
    """spread(a): byte i of every piece becomes `value` if bit bits[i] of that piece of a is set, else 0"""

    @vector_op(bytes_, bytes_)
    def spread(builder, a):
        return _spread_bits(builder, a, bits, value)

    return spread


def make_look_up(table):
    """look_up(a): every byte 0..15 becomes the table's byte of that number"""
    pieces = constant(I8_VECTOR, list(table) * PIECES)
    shuffles = {512: "llvm.x86.avx512.pshuf.b.512", 256: "llvm.x86.avx2.pshuf.b"}

    def by_bits(builder, a, values, bit):
        """Of a table as long as there are numbers of the bits up to `bit`"""
        if bit < 0:
            return constant(I8_VECTOR, values[0])
        half = len(values) // 2
        low, high = by_bits(builder, a, values[:half], bit - 1), by_bits(builder, a, values[half:], bit - 1)
        is_clear = builder.icmp_unsigned("==", builder.and_(a, constant(I8_VECTOR, 1 << bit)), NONE)
        return builder.select(is_clear, low, high)

    @vector_op(bytes_, bytes_)
    def look_up(builder, a):
        if LEVEL.bits in shuffles:
            return call_llvm(builder, shuffles[LEVEL.bits], I8_VECTOR, pieces, a)
        if "neon" in LEVEL.features:
            return call_llvm(builder, "llvm.aarch64.neon.tbl1.v16i8", I8_VECTOR, pieces, a)
        return by_bits(builder, a, list(table), 3)

    return look_up


@vector_op(types.UniTuple(bytes_, 2), bytes_, bytes_)
def fives(builder, nibbles, fifth):
    """Numbers of 5 bits, two vectors: low nibbles below the first 16 bits of their piece of `fifth`, and high nibbles
    below the 16 bits that follow"""
    low_four, high_four = constant(I8_VECTOR, 15), constant(I8_VECTOR, 240)
    if not BIT_MATRICES:
        low, high = builder.and_(nibbles, low_four), builder.lshr(nibbles, constant(I8_VECTOR, 4))
        tops = [_spread_bits(builder, fifth, range(first, first + 16), 16) for first in (0, 16)]
        return pack(builder, [builder.or_(low, tops[0]), builder.or_(high, tops[1])])
    # For 8 numbers each: the byte of first bits as the matrix' row that makes bit 4, that of next ones as bit 0's.
    zero = 4 * W
    rows = [row for half in range(2) for row in (zero, zero, zero, half, zero, zero, zero, 2 + half)]
    places = [16 * piece + row if row < zero else zero for piece in range(PIECES) for row in rows]
    columns = constant(I8_VECTOR, [1 << i % 8 for i in range(4 * W)])
    tops = _affine(builder, columns, shuffle(builder, fifth, NONE, places))
    low = builder.or_(builder.and_(nibbles, low_four), builder.and_(tops, high_four))
    high = builder.or_(builder.and_(nibbles, high_four), builder.and_(tops, low_four))
    swap = sum(1 << (8 * (7 - k) + (k + 4) % 8) for k in range(8))  # of the two halves of a byte
    return pack(builder, [low, _times_matrices(builder, high, [swap] * PIECES)])


@vector_op(f32, f32, int64, float32)
def keep_first(builder, a, n, other):
    """Lanes i < n of a, `other` elsewhere"""
    index = constant(I32_VECTOR, list(range(W)))
    limit = splat(builder, builder.trunc(n, I32), W)
    return builder.select(builder.icmp_signed("<", index, limit), a, splat(builder, other, W))
