"""What a vector register is at this level: its sizes, its types, and how LLVM code loads and stores one."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from .. import level
from ..scalar import HALF, I16, I64, pointer
from ..vector import Vec, shuffle

LEVEL = level.target().level
W = LEVEL.lanes  # float32 lanes of a vector
PIECES = W // 4  # 16-byte pieces of a vector

f32, i32, bytes_ = Vec("f32", W), Vec("i32", W), Vec("i8", 4 * W)
int64, float32 = types.int64, types.float32
F32_VECTOR, I32_VECTOR, I8_VECTOR = f32.llvm, i32.llvm, bytes_.llvm
F16_VECTOR, I16_VECTOR = ir.VectorType(HALF, W), ir.VectorType(I16, W)
I8_LANES = ir.VectorType(ir.IntType(8), W)


def load_vector(builder, address, vector, align=1):
    return builder.load(pointer(builder, address, vector), align=align)


def load_at(builder, address, at, vector):
    """From `at` bytes behind address"""
    return load_vector(builder, builder.add(address, ir.Constant(I64, at)), vector)


def store_vector(builder, address, value):
    builder.store(value, pointer(builder, address, value.type), align=1)


def offset(builder, address, *terms):
    """address + the sum of count * stride over (count, stride) pairs."""
    for count, stride in terms:
        address = builder.add(address, builder.mul(stride, ir.Constant(I64, count)))
    return address


def side_by_side(builder, parts):
    """Vectors of one size, joined."""
    while len(parts) > 1:
        both = list(range(2 * parts[0].type.count))
        parts = [shuffle(builder, a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
