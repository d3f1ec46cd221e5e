"""Loads, stores and atomics on addresses. An address is an int64; nothing is checked.

Numba has arrays, but a kernel works on a mapped file, an arena and pages, whose addresses a plan records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import level
from .portable import float_to_half, half_to_float, multiply_add

Convert = Callable[[ir.IRBuilder, ir.Value, ir.Type], ir.Value]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
VECTOR_BYTES = level.target().level.bits // 8
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()


def pointer(builder: ir.IRBuilder, address: ir.Value, pointee: ir.Type) -> ir.Value:
    return builder.inttoptr(address, ir.PointerType(pointee))


def _loader(pointee: ir.Type, numba_type: types.Type, convert: Convert | None, doc: str) -> Any:
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            value = builder.load(pointer(builder, args[0], pointee), align=1)
            return convert(builder, value, context.get_value_type(numba_type)) if convert else value

        return numba_type(types.int64), codegen

    load.__doc__ = doc
    return intrinsic(load)


def _storer(pointee: ir.Type, numba_type: types.Type, convert: Convert | None, doc: str) -> Any:
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            value = convert(builder, args[1], pointee) if convert else args[1]
            builder.store(value, pointer(builder, args[0], pointee), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), codegen

    store.__doc__ = doc
    return intrinsic(store)


load_i64 = _loader(I64, types.int64, None, "int64 at address")
load_i32 = _loader(I32, types.int64, ir.IRBuilder.sext, "int32 at address, as int64")
load_u16 = _loader(I16, types.int64, ir.IRBuilder.zext, "uint16 at address, as int64")
load_u8 = _loader(I8, types.int64, ir.IRBuilder.zext, "uint8 at address, as int64")
load_i8 = _loader(I8, types.int64, ir.IRBuilder.sext, "int8 at address, as int64")
load_f32 = _loader(FLOAT, types.float32, None, "float32 at address")
load_f64 = _loader(DOUBLE, types.float64, None, "float64 at address")
load_f16 = _loader(HALF, types.float32, half_to_float, "float16 at address, as float32")
store_i64 = _storer(I64, types.int64, None, "int64 to address")
store_i32 = _storer(I32, types.int64, ir.IRBuilder.trunc, "int64 to an int32 at address")
store_i16 = _storer(I16, types.int64, ir.IRBuilder.trunc, "int64 to an int16 at address")
store_i8 = _storer(I8, types.int64, ir.IRBuilder.trunc, "int64 to an int8 at address")
store_f32 = _storer(FLOAT, types.float32, None, "float32 to address")
store_f64 = _storer(DOUBLE, types.float64, None, "float64 to address")
store_f16 = _storer(HALF, types.float32, float_to_half, "float32 to a float16 at address, to nearest even")


@intrinsic
def f32_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 whose bits are the low half of an int64."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.trunc(args[0], I32), FLOAT)

    return types.float32(types.int64), codegen


@intrinsic
def far_offset(typingctx: Any, offset: Any) -> Any:
    """A constant offset to an address that is used beside it with small ones.

    An address of ARM's holds small offsets only, and LLVM might choose the far address to begin with: then every other
    one takes an instruction of its own. So it does not learn there what the offset is.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if not level.is_arm64():
            return args[0]
        hidden = builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [args[0]], side_effect=False)
        hidden.attributes.add("readnone")
        return hidden

    return types.int64(types.int64), codegen


@intrinsic
def keep_apart(typingctx: Any) -> Any:
    """First line of a large helper: LLVM must not inline it, so that its inner loop has all registers to itself.

    Its stack is aligned as align_stack says.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.function.attributes.discard("alwaysinline")
        builder.function.attributes.add("noinline")
        builder.function.attributes.alignstack = VECTOR_BYTES
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def hold(typingctx: Any, address: Any) -> Any:
    """The same address in a register of its own. LLVM would see through it to what it is the sum of, and then keep the
    parts, and their sums with every other address of a loop, in more registers than there are.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", list(args), side_effect=False)

    return types.int64(types.int64), codegen


@intrinsic
def align_stack(typingctx: Any) -> Any:
    """First line of a kernel, as keep_apart is of a helper: vectors for which there is no register lie aligned.

    LLVM aligns the stack to 16 bytes only, and whether its vectors then cross cache lines is a matter of chance.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.function.attributes.alignstack = VECTOR_BYTES
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def fma_f32(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32, with one rounding where the CPU can."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return multiply_add(builder, *args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def round_to_i64(typingctx: Any, a: Any) -> Any:
    """float32 -> int64, to nearest even; |a| < 2**22"""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        magic = ir.Constant(FLOAT, 12582912.0)  # 1.5 * 2**23: adding it rounds to a whole number
        rounded = builder.fsub(builder.fadd(args[0], magic), magic)
        return builder.sext(builder.fptosi(rounded, I32), I64)

    return types.int64(types.float32), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at address; returns what it was before. Orders everything around it."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_swap(typingctx: Any, address: Any, value: Any) -> Any:
    """Store value; returns what the int64 at address was before."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("xchg", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def compare_and_swap(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Store value where the int64 at address is `expected`; returns whether it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        where = pointer(builder, args[0], I64)
        return builder.extract_value(builder.cmpxchg(where, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """int64 at address; nothing after it is read before it."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load_atomic(pointer(builder, args[0], I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    """int64 to address; everything before it is written before it."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store_atomic(args[1], pointer(builder, args[0], I64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def call_kernel(typingctx: Any, function: Any, no_result: Any, args: Any, work: Any, ith: Any, nth: Any) -> Any:
    """Call the kernel at an address with library.ENTRY_TYPE's convention."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        entry = pointer(builder, values[0], ir.FunctionType(I32, [I64] * 6))
        builder.call(entry, [values[1], values[1], *values[2:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def call_address(typingctx: Any, function: Any, a: Any, b: Any) -> Any:
    """Call a C function at an address with two int64 arguments; its result is ignored."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        builder.call(pointer(builder, values[0], ir.FunctionType(I64, [I64] * 2)), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any, _: Any) -> Any:
    """Tell the core that this is a spin loop."""
    machine = llvm.get_default_triple().split("-")[0]

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        if machine in ("x86_64", "i686"):
            name, args = "llvm.x86.sse2.pause", []
        elif machine in ("aarch64", "arm64"):
            name, args = "llvm.aarch64.isb", [ir.Constant(I32, 15)]  # empties the pipeline; `yield` would take no time
        else:
            return context.get_dummy_value()
        function_type = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)
        return context.get_dummy_value()

    return types.void(types.int64), codegen
