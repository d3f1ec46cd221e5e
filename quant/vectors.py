"""What the encoders add to the kernels' vectors: whole blocks of a fixed number of lanes, on every CPU alike.

An encoder must give ggml's bytes, so these are generic LLVM IR without fast-math flags: each lane is one IEEE operation
in the order written, and LLVM splits a block over whatever registers there are. The operations take vectors of any
length; where one of two operands is a plain number, it stands in every lane.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import pointer
from lfm2cpp.kernels.vector import Vec, call_llvm, shuffle, splat, vector_op

f32x16, f32x32, i32x32, u8x32 = Vec("f32", 16), Vec("f32", 32), Vec("i32", 32), Vec("i8", 32)
I32 = ir.IntType(32)
MAGNITUDE, INFINITY = 0x7FFFFFFF, 0x7F800000  # as the bits of a float32: all but its sign, and infinity
SCALARS = {"f32": types.float32, "i32": types.int32, "i8": types.uint8}


# Operations on two vectors, or on a vector and a number


def _lanes(context: Any, builder: ir.IRBuilder, value: ir.Value, ty: types.Type, vector: Vec) -> ir.Value:
    """`value` as lanes of `vector`."""
    if isinstance(ty, Vec):
        return value
    return splat(builder, context.cast(builder, value, ty, SCALARS[vector.element]), vector.lanes)


def _binary(emit: Callable[..., ir.Value], *, to_mask: bool = False) -> Any:
    """An intrinsic; `emit(builder, is_float, a, b)` works on lanes."""

    @intrinsic
    def apply(typingctx: Any, a: Any, b: Any) -> Any:
        vector = a if isinstance(a, Vec) else b
        result = Vec("i1", vector.lanes) if to_mask else vector

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            x, y = (_lanes(context, builder, v, t, vector) for v, t in zip(args, sig.args, strict=True))
            return emit(builder, vector.element == "f32", x, y)

        return result(types.unliteral(a), types.unliteral(b)), codegen

    return apply


def _operator(function: Any, apply: Any, *, of_two_vectors: bool) -> None:
    """Let `function` be `apply` for a vector and a number; vector.py has most operators of two vectors."""

    @overload(function)
    def choose(a, b):  # type: ignore[no-untyped-def]  # Numba compares signatures, annotations included
        n_vectors = isinstance(a, Vec) + isinstance(b, Vec)
        return (lambda a, b: apply(a, b)) if n_vectors == 1 or (n_vectors == 2 and of_two_vectors) else None


def _arithmetic(float_op: str, int_op: str) -> Any:
    return _binary(lambda builder, is_float, a, b: getattr(builder, float_op if is_float else int_op)(a, b))


def _compare(symbol: str, builder: ir.IRBuilder, is_float: bool, a: ir.Value, b: ir.Value) -> ir.Value:
    return (builder.fcmp_ordered if is_float else builder.icmp_signed)(symbol, a, b)


def _comparison(symbol: str) -> Any:
    return _binary(lambda *lanes: _compare(symbol, *lanes), to_mask=True)


for _function, _names in {
    operator.add: ("fadd", "add"), operator.sub: ("fsub", "sub"), operator.mul: ("fmul", "mul"),
    operator.truediv: ("fdiv", ""), operator.and_: ("", "and_"), operator.or_: ("", "or_"),
}.items():  # fmt: skip
    _operator(_function, _arithmetic(*_names), of_two_vectors=False)
for _function, _symbol in {operator.lt: "<", operator.gt: ">", operator.eq: "=="}.items():
    _operator(_function, _comparison(_symbol), of_two_vectors=True)

# NaN counts as the larger of two in `lesser`, and as the smaller in `greater`, when it is the first operand.
lesser = _binary(lambda builder, is_float, a, b: builder.select(_compare("<", builder, is_float, a, b), a, b))
greater = _binary(lambda builder, is_float, a, b: builder.select(_compare(">", builder, is_float, a, b), a, b))


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """Lane by lane: a where `mask` is set, else b."""
    vector = a if isinstance(a, Vec) else b if isinstance(b, Vec) else Vec("i32", mask.lanes)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        x, y = (_lanes(context, builder, v, t, vector) for v, t in zip(args[1:], sig.args[1:], strict=True))
        return builder.select(args[0], x, y)

    return vector(mask, types.unliteral(a), types.unliteral(b)), codegen


# Conversions


def _unary(result: Callable[[Any], types.Type], emit: Callable[..., ir.Value]) -> Any:
    """An intrinsic; `emit(builder, value, LLVM type of the result)`."""

    @intrinsic
    def apply(typingctx: Any, v: Any) -> Any:
        to = result(v)

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return emit(builder, args[0], context.get_value_type(to))

        return to(v), codegen

    return apply


def _as(element: str) -> Callable[[Any], types.Type]:
    return lambda v: Vec(element, v.lanes) if isinstance(v, Vec) else SCALARS[element]


def _half(first: bool) -> Any:
    def emit(builder: ir.IRBuilder, v: ir.Value, to: ir.Type) -> ir.Value:
        start = 0 if first else to.count
        return shuffle(builder, v, v, list(range(start, start + to.count)))

    return _unary(lambda v: Vec(v.element, v.lanes // 2), emit)


# float32 <-> its bits as int32, of a vector or of one number
bits = _unary(_as("i32"), lambda builder, v, to: builder.bitcast(v, to))
as_float = _unary(_as("f32"), lambda builder, v, to: builder.bitcast(v, to))
# float32 -> int32 towards zero; the value must fit
truncated = _unary(_as("i32"), lambda builder, v, to: builder.fptosi(v, to))
# int32 -> float32
to_f32 = _unary(_as("f32"), lambda builder, v, to: builder.sitofp(v, to))
# int32 -> its low byte
low_byte = _unary(_as("i8"), lambda builder, v, to: builder.trunc(v, to))
# mask of 32 lanes -> int32, lane i in bit i
mask_bits = _unary(lambda mask: types.int32, lambda builder, v, to: builder.bitcast(v, to))
low_half, high_half = _half(first=True), _half(first=False)


# of each lane, correctly rounded
square_root = _unary(lambda v: v, lambda builder, v, to: call_llvm(builder, f"llvm.sqrt.v{to.count}f32", to, v))


@vector_op(f32x16, types.float32)
def splat_16(builder, x):
    """x in 16 lanes"""
    return splat(builder, x, 16)


# Across the lanes


def _reduction(name: str) -> Any:
    def emit(builder: ir.IRBuilder, v: ir.Value, to: ir.Type) -> ir.Value:
        return call_llvm(builder, f"llvm.vector.reduce.{name}.v{v.type.count}i32", to, v)

    return _unary(lambda v: types.int32, emit)


largest, smallest = _reduction("smax"), _reduction("smin")  # of int32 lanes


@intrinsic
def first_true(typingctx: Any, mask: Any) -> Any:
    """Index of the first lane that is set; one must be."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        word = builder.bitcast(args[0], ir.IntType(mask.lanes))
        return builder.zext(builder.cttz(word, ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(mask), codegen


# Memory


def _loader(vector: Vec) -> Any:
    @vector_op(vector, types.int64)
    def load(builder, address):
        """All lanes from address"""
        return builder.load(pointer(builder, address, vector.llvm), align=1)

    return load


load_f32x16, load_f32x32, load_u8x32 = _loader(f32x16), _loader(f32x32), _loader(u8x32)


@intrinsic
def store(typingctx: Any, address: Any, v: Any) -> Any:
    """All lanes of `v` to address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], pointer(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, v), codegen


@intrinsic(prefer_literal=True)
def stack(typingctx: Any, nbytes: Any) -> Any:
    """Address of `nbytes` (a literal) bytes of the kernel's stack frame."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        buffer = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), nbytes.literal_value))
        buffer.align = 64
        return builder.ptrtoint(buffer, ir.IntType(64))

    return types.int64(nbytes), codegen


# Halves by their bits: not every CPU has an instruction for them


@device
def f16_of_f32(x):
    """The bits of `x` as a half, rounded to nearest even, infinite beyond the largest."""
    word = np.int64(bits(x))
    sign = (word >> 16) & 0x8000
    magnitude = word & 0x7FFFFFFF
    if magnitude >= 0x47800000:  # 65536 and up, infinity, NaN
        return sign | (0x7E00 if magnitude > 0x7F800000 else 0x7C00)
    if magnitude < 0x38800000:  # a subnormal half: adding 0.5 leaves its bits, rounded, at the bottom
        return sign | (bits(abs(x) + np.float32(0.5)) - 0x3F000000)
    return sign | ((magnitude + 0xFFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13)


@device
def f32_of_f16(h):
    """The value of a half given by its bits; infinity and NaN come out as numbers from 65536."""
    # As float32 bits the exponent is 112 too small; the product puts it right, subnormals included.
    magnitude = as_float(np.int32((h & 0x7FFF) << 13)) * as_float(np.int32(0x77800000))
    return -magnitude if h & 0x8000 else magnitude
