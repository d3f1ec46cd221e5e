"""The SIMD vocabulary: the same words at every level, so that a kernel is written once.

A vector register is seen in two ways: as W float32 or int32 lanes (`f32`, `i32`), and as W/4 pieces of 16 bytes
(`bytes_`), the unit in which quantized blocks are moved. Words that work "within each piece" are what every
instruction set has, from NEON's one piece to AVX-512's four.

Generic LLVM IR wherever LLVM selects the right instruction from it; a level's own intrinsics only in dot.py.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from . import level
from .scalar import FLOAT, HALF, I16, I32, I64, pointer
from .vector import Vec, call_llvm, constant, shuffle, splat, vector_op

LEVEL = level.target().level
W = LEVEL.lanes  # float32 lanes of a vector
PIECES = W // 4  # 16-byte pieces of a vector

f32, i32, bytes_ = Vec("f32", W), Vec("i32", W), Vec("i8", 4 * W)
int64, float32 = types.int64, types.float32
_F32, _I32, _I8 = f32.llvm, i32.llvm, bytes_.llvm
_F16, _I16 = ir.VectorType(HALF, W), ir.VectorType(I16, W)
_I8W = ir.VectorType(ir.IntType(8), W)
UNDEFINED = ir.Undefined


def _load(builder, address, vector, align=1):
    return builder.load(pointer(builder, address, vector), align=align)


def _store(builder, address, value):
    builder.store(value, pointer(builder, address, value.type), align=1)


# Loads and stores


@vector_op(f32, int64)
def load_f32(builder, address):
    """W float32 at address"""
    return _load(builder, address, _F32)


@vector_op(types.void, int64, f32)
def store_f32(builder, address, value):
    """W float32 to address"""
    _store(builder, address, value)


@vector_op(i32, int64)
def load_i32(builder, address):
    """W int32 at address"""
    return _load(builder, address, _I32)


@vector_op(types.void, int64, i32)
def store_i32(builder, address, value):
    """W int32 to address"""
    _store(builder, address, value)


@vector_op(bytes_, int64)
def load_bytes(builder, address):
    """4 W bytes at address"""
    return _load(builder, address, _I8)


@vector_op(types.void, int64, bytes_)
def store_bytes(builder, address, value):
    """4 W bytes to address"""
    _store(builder, address, value)


@vector_op(f32, int64)
def load_f16(builder, address):
    """W float16 at address, as float32"""
    return builder.fpext(_load(builder, address, _F16), _F32)


@vector_op(types.void, int64, f32)
def store_f16(builder, address, value):
    """W float32 to float16 at address, to nearest even"""
    _store(builder, address, builder.fptrunc(value, _F16))


@vector_op(f32, int64)
def load_bf16(builder, address):
    """W bfloat16 at address, as float32"""
    wide = builder.zext(_load(builder, address, _I16), _I32)
    return builder.bitcast(builder.shl(wide, constant(_I32, 16)), _F32)


@vector_op(f32, int64)
def load_i8_as_f32(builder, address):
    """W int8 at address, as float32"""
    return builder.sitofp(_load(builder, address, _I8W), _F32)


@vector_op(types.void, int64, i32)
def store_i8(builder, address, value):
    """W int32 to int8 at address; the values must fit"""
    _store(builder, address, builder.trunc(value, _I8W))


def _pieces(builder, addresses):
    """16-byte pieces from these addresses, side by side."""
    piece = ir.VectorType(ir.IntType(8), 16)
    return _side_by_side(builder, [_load(builder, address, piece) for address in addresses])


def _side_by_side(builder, parts):
    while len(parts) > 1:
        both = list(range(2 * parts[0].type.count))
        parts = [shuffle(builder, a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _offset(builder, address, *terms):
    for count, stride in terms:
        address = builder.add(address, builder.mul(stride, ir.Constant(I64, count)))
    return address


@vector_op(bytes_, int64, int64)
def gather_pieces(builder, address, stride):
    """Piece i is the 16 bytes at address + i * stride"""
    return _pieces(builder, [_offset(builder, address, (i, stride)) for i in range(PIECES)])


@vector_op(bytes_, int64, int64, int64)
def gather_pieces_2(builder, address, stride, pair_stride):
    """Piece i is the 16 bytes at address + (i % 2) * stride + (i // 2) * pair_stride"""
    return _pieces(
        builder, [_offset(builder, address, (i % 2, stride), (i // 2, pair_stride)) for i in range(PIECES)]
    )


@vector_op(i32, int64, int64, int64)
def gather_i8(builder, address, stride, stride_8):
    """Lane i is the int8 at address + (i % 8) * stride + (i // 8) * stride_8"""
    values = ir.Constant(_I8W, UNDEFINED)
    for i in range(W):
        where = _offset(builder, address, (i % 8, stride), (i // 8, stride_8))
        values = builder.insert_element(values, _load(builder, where, ir.IntType(8)), ir.Constant(I32, i))
    return builder.sext(values, _I32)


@vector_op(f32, int64, int64)
def repeat_f16(builder, address, stride):
    """Lane i is the float16 at address + (i // 8) * stride, as float32"""
    parts = []
    for i in range(-(-W // 8)):
        value = builder.fpext(_load(builder, _offset(builder, address, (i, stride)), HALF), FLOAT)
        parts.append(splat(builder, value, min(W, 8)))
    return _side_by_side(builder, parts)


@vector_op(f32, int64, int64)
def gather_f16(builder, address, stride):
    """Lane i is the float16 at address + i * stride, as float32"""
    values = ir.Constant(_I16, UNDEFINED)
    for i in range(W):
        where = _offset(builder, address, (i, stride))
        values = builder.insert_element(values, _load(builder, where, I16), ir.Constant(I32, i))
    return builder.fpext(builder.bitcast(values, _F16), _F32)


@vector_op(types.void, int64)
def prefetch(builder, address):
    """Ask for the cache line at address; never faults"""
    byte = ir.PointerType(ir.IntType(8))
    where = builder.inttoptr(address, byte)
    hint = [ir.Constant(I32, value) for value in (0, 3, 1)]  # read, keep in every cache, data
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), where, *hint)


# Making vectors


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
    return builder.bitcast(splat(builder, _load(builder, address, I32), W), _I8)


# Arithmetic


@vector_op(f32, f32, f32, f32)
def fma(builder, a, b, c):
    """a * b + c with one rounding"""
    return call_llvm(builder, f"llvm.fma.v{W}f32", _F32, a, b, c)


@vector_op(f32, f32, f32)
def maximum(builder, a, b):
    """The larger of each lane; b where one is NaN"""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@vector_op(f32, f32, f32)
def minimum(builder, a, b):
    """The smaller of each lane; b where one is NaN"""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@vector_op(f32, f32, i32)
def add_exponent(builder, a, n):
    """a * 2**n for results that stay normal"""
    bits = builder.add(builder.bitcast(a, _I32), builder.shl(n, constant(_I32, 23)))
    return builder.bitcast(bits, _F32)


@vector_op(f32, f32)
def absolute(builder, a):
    """|a|"""
    return call_llvm(builder, f"llvm.fabs.v{W}f32", _F32, a)


@vector_op(f32, i32)
def to_f32(builder, a):
    """int32 -> float32"""
    return builder.sitofp(a, _F32)


@vector_op(i32, f32)
def round_to_i32(builder, a):
    """float32 -> int32, to nearest even; |a| < 2**22"""
    magic = constant(_F32, 12582912.0)  # 1.5 * 2**23: the sum's low mantissa bits are the rounded integer
    bits = builder.bitcast(builder.fadd(a, magic), _I32)
    return builder.sub(bits, constant(_I32, 0x4B400000))


@vector_op(f32, i32)
def bits_to_f32(builder, a):
    """Reinterpret"""
    return builder.bitcast(a, _F32)


@vector_op(bytes_, bytes_)
def low_nibbles(builder, a):
    """a & 15 of every byte"""
    return builder.and_(a, constant(_I8, 15))


@vector_op(bytes_, bytes_)
def high_nibbles(builder, a):
    """a >> 4 of every byte"""
    return builder.lshr(a, constant(_I8, 4))


@vector_op(f32, f32, int64, float32)
def keep_first(builder, a, n, other):
    """Lanes i < n of a, `other` elsewhere"""
    index = constant(_I32, list(range(W)))
    limit = splat(builder, builder.trunc(n, I32), W)
    return builder.select(builder.icmp_signed("<", index, limit), a, splat(builder, other, W))


# Across lanes


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
    rows = transpose_4_values(builder, *(builder.bitcast(v, _I32) for v in (a, b, c, d)))
    result = ir.Constant(ir.ArrayType(_I8, 4), UNDEFINED)
    for j, row in enumerate(rows):
        result = builder.insert_value(result, builder.bitcast(row, _I8), j)
    return result


@vector_op(i32, i32, i32, i32, i32)
def sum_pieces(builder, a, b, c, d):
    """Within each piece: lane 0 is the sum of a's four lanes, lane 1 of b's, lane 2 of c's, lane 3 of d's"""
    w, x, y, z = transpose_4_values(builder, a, b, c, d)
    return builder.add(builder.add(w, x), builder.add(y, z))


@vector_op(types.void, int64, int64, int64)
def transpose_square(builder, source, destination, stride):
    """W x W float32: rows of W at source, `stride` bytes apart, become columns at destination (rows of 4 W bytes)"""
    rows = [
        _load(builder, builder.add(source, builder.mul(stride, ir.Constant(I64, i))), _F32) for i in range(W)
    ]
    # Transpose 4 x 4 lanes within the pieces, then the pieces themselves.
    groups = [transpose_4_values(builder, *rows[i : i + 4]) for i in range(0, W, 4)]
    for j in range(4):
        for piece in range(PIECES):
            column = _pieces_of(builder, [group[j] for group in groups], piece)
            row = builder.add(destination, ir.Constant(I64, 4 * W * (4 * piece + j)))
            _store(builder, row, column)


def _pieces_of(builder, vectors, piece):
    """Piece `piece` of every vector, side by side."""
    lanes = list(range(4 * piece, 4 * piece + 4))
    return _side_by_side(builder, [shuffle(builder, v, v, lanes) for v in vectors])
