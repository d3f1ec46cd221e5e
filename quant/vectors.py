"""Vectors as Numba values: an encoder is written on whole blocks, and LLVM chooses the registers.

Only generic LLVM IR (no target intrinsic, no fast-math flag), so that each lane is one IEEE operation in the order
written, on every CPU. In an operation with a vector, a plain number stands for itself in every lane.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import pointer

I32 = ir.IntType(32)
ELEMENT = {
    types.float32: ir.FloatType(), types.int32: I32, types.uint8: ir.IntType(8), types.boolean: ir.IntType(1)
}  # fmt: skip


class Vector(types.Type):
    """`n` lanes of the scalar Numba type `elem`; lanes of type boolean make a mask."""

    def __init__(self, elem: types.Type, n: int) -> None:
        self.elem, self.n = elem, n
        super().__init__(name=f"Vector({elem} x {n})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(ELEMENT[vector.elem], vector.n))


def _lanes(context: Any, builder: ir.IRBuilder, value: ir.Value, ty: types.Type, vector: Vector) -> ir.Value:
    """`value` of type `ty` as lanes of `vector`: itself, or a number in every lane."""
    if isinstance(ty, Vector):
        return value
    one = ir.Constant(ir.VectorType(ELEMENT[vector.elem], vector.n), ir.Undefined)
    first = builder.insert_element(one, context.cast(builder, value, ty, vector.elem), ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, vector.n), [0] * vector.n))


# --- operators, lane by lane


def _binary(emit: Callable[..., ir.Value], *, to_mask: bool = False) -> Any:
    """An intrinsic of two operands, at least one of them a Vector; `emit(builder, elem, a, b)` works on lanes."""

    @intrinsic
    def apply(typing_context: Any, a: Any, b: Any) -> Any:
        vector = a if isinstance(a, Vector) else b
        result = Vector(types.boolean, vector.n) if to_mask else vector

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            x, y = (_lanes(context, builder, v, t, vector) for v, t in zip(args, signature.args, strict=True))
            return emit(builder, vector.elem, x, y)

        return result(types.unliteral(a), types.unliteral(b)), codegen

    return apply


def _arithmetic(float_op: str, int_op: str) -> Callable[..., ir.Value]:
    def emit(builder: ir.IRBuilder, elem: Any, a: ir.Value, b: ir.Value) -> ir.Value:
        return getattr(builder, float_op if elem == types.float32 else int_op)(a, b)

    return emit


def _compare(builder: ir.IRBuilder, symbol: str, elem: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    if elem == types.float32:
        return builder.fcmp_ordered(symbol, a, b)
    return (builder.icmp_signed if elem.signed else builder.icmp_unsigned)(symbol, a, b)


def _shift_right(builder: ir.IRBuilder, elem: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    return (builder.ashr if elem.signed else builder.lshr)(a, b)


def _operator(function: Any, apply: Any) -> None:
    @overload(function)
    def choose(a, b):  # type: ignore[no-untyped-def]  # Numba compares the signatures, annotations included
        return (lambda a, b: apply(a, b)) if isinstance(a, Vector) or isinstance(b, Vector) else None


_operator(operator.add, _binary(_arithmetic("fadd", "add")))
_operator(operator.sub, _binary(_arithmetic("fsub", "sub")))
_operator(operator.mul, _binary(_arithmetic("fmul", "mul")))
_operator(operator.truediv, _binary(_arithmetic("fdiv", "")))
_operator(operator.and_, _binary(_arithmetic("", "and_")))
_operator(operator.or_, _binary(_arithmetic("", "or_")))
_operator(operator.xor, _binary(_arithmetic("", "xor")))
_operator(operator.lshift, _binary(_arithmetic("", "shl")))
_operator(operator.rshift, _binary(_shift_right))
for _function, _symbol in ((operator.lt, "<"), (operator.gt, ">"), (operator.eq, "==")):
    _operator(_function, _binary(lambda b, elem, x, y, s=_symbol: _compare(b, s, elem, x, y), to_mask=True))

lesser = _binary(lambda b, elem, x, y: b.select(_compare(b, "<", elem, x, y), x, y))
greater = _binary(lambda b, elem, x, y: b.select(_compare(b, ">", elem, x, y), x, y))


@intrinsic
def select(typing_context: Any, mask: Any, a: Any, b: Any) -> Any:
    """Lane by lane: a where `mask` is set, else b."""
    vector = a if isinstance(a, Vector) else b

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, y = (_lanes(context, builder, v, t, vector) for v, t in zip(args[1:], signature.args[1:], strict=True))
        return builder.select(args[0], x, y)

    return vector(mask, types.unliteral(a), types.unliteral(b)), codegen


# --- conversions


def _unary(result: Callable[[Any], Any], emit: Callable[..., ir.Value]) -> Any:
    """An intrinsic of one operand; `emit(builder, value, LLVM type of the result)`."""

    @intrinsic
    def apply(typing_context: Any, v: Any) -> Any:
        to = result(v)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return emit(builder, args[0], context.get_value_type(to))

        return to(v), codegen

    return apply


def _shape_of(elem: types.Type) -> Callable[[Any], Any]:
    return lambda v: Vector(elem, v.n) if isinstance(v, Vector) else elem


def _half(first: bool) -> Callable[..., ir.Value]:
    def emit(builder: ir.IRBuilder, v: ir.Value, to: ir.Type) -> ir.Value:
        start = 0 if first else to.count
        lanes = ir.Constant(ir.VectorType(I32, to.count), list(range(start, start + to.count)))
        return builder.shuffle_vector(v, v, lanes)

    return emit


# float32 <-> its bits as int32, of a vector or of one number
bits = _unary(_shape_of(types.int32), lambda b, v, to: b.bitcast(v, to))
as_float = _unary(_shape_of(types.float32), lambda b, v, to: b.bitcast(v, to))
# float32 -> int32 towards zero; the value must fit
truncated = _unary(_shape_of(types.int32), lambda b, v, to: b.fptosi(v, to))
# int32 -> uint8, the low bits
low_byte = _unary(_shape_of(types.uint8), lambda b, v, to: b.trunc(v, to))
# mask -> int32, lane i in bit i; of 32 lanes
mask_bits = _unary(lambda mask: types.int32, lambda b, v, to: b.bitcast(v, to))
low_half = _unary(lambda v: Vector(v.elem, v.n // 2), _half(first=True))
high_half = _unary(lambda v: Vector(v.elem, v.n // 2), _half(first=False))


@intrinsic
def f32x16(typing_context: Any, x: Any) -> Any:
    """`x` in 16 lanes."""
    vector = Vector(types.float32, 16)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _lanes(context, builder, args[0], signature.args[0], vector)

    return vector(types.unliteral(x)), codegen


# --- across the lanes


def _reduction(name: str) -> Any:
    @intrinsic
    def reduce(typing_context: Any, v: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            function_type = ir.FunctionType(I32, [args[0].type])
            symbol = f"llvm.vector.reduce.{name}.v{v.n}i32"
            return builder.call(cgutils.get_or_insert_function(builder.module, function_type, symbol), args)

        return types.int32(v), codegen

    return reduce


largest = _reduction("smax")  # of int32 lanes
smallest = _reduction("smin")


@intrinsic
def first_true(typing_context: Any, mask: Any) -> Any:
    """Index of the first lane that is set; one must be."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        word = builder.bitcast(args[0], ir.IntType(mask.n))
        return builder.zext(builder.cttz(word, ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(mask), codegen


# --- memory


def _loader(vector: Vector) -> Any:
    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return builder.load(pointer(builder, args[0], context.get_value_type(vector)), align=1)

        return vector(types.int64), codegen

    return load


load_f32x16 = _loader(Vector(types.float32, 16))
load_f32x32 = _loader(Vector(types.float32, 32))
load_u8x32 = _loader(Vector(types.uint8, 32))


@intrinsic
def store(typing_context: Any, address: Any, v: Any) -> Any:
    """All lanes of `v` to address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store(args[1], pointer(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, v), codegen


@intrinsic(prefer_literal=True)
def stack(typing_context: Any, nbytes: Any) -> Any:
    """Address of `nbytes` (a literal) bytes of the calling function's stack frame."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        buffer = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), nbytes.literal_value))
        buffer.align = 64
        return builder.ptrtoint(buffer, ir.IntType(64))

    return types.int64(nbytes), codegen


# --- halves, by their bits: a conversion instruction is not on every CPU


@device
def f16_of_f32(x):  # type: ignore[no-untyped-def]
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
def f32_of_f16(h):  # type: ignore[no-untyped-def]
    """The value of a half given by its bits; infinity and NaN come out as numbers from 65536."""
    # As float32 bits the exponent is 112 too small; the product puts it right, subnormals included.
    magnitude = as_float(np.int32((h & 0x7FFF) << 13)) * as_float(np.int32(0x77800000))
    return -magnitude if h & 0x8000 else magnitude
