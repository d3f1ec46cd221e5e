"""Loads and stores of whole vectors."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..portable import float_to_half, half_to_float
from ..scalar import I32, I64
from ..vector import call_llvm, constant, vector_op
from ..widths import AGAIN_NEAR, ASKED_NEAR
from .registers import (
    F16_VECTOR,
    F32_VECTOR,
    I8_LANES,
    I8_VECTOR,
    I16_VECTOR,
    I32_VECTOR,
    bytes_,
    f32,
    i32,
    int64,
    load_vector,
    store_vector,
)


def f32_at(builder, address):
    return load_vector(builder, address, F32_VECTOR)


def f16_at(builder, address):
    return half_to_float(builder, load_vector(builder, address, F16_VECTOR), F32_VECTOR)


def bf16_at(builder, address):
    wide = builder.zext(load_vector(builder, address, I16_VECTOR), I32_VECTOR)
    return builder.bitcast(builder.shl(wide, constant(I32_VECTOR, 16)), F32_VECTOR)


@vector_op(f32, int64)
def load_f32(builder, address):
    """W float32 at address"""
    return f32_at(builder, address)


@vector_op(types.void, int64, f32)
def store_f32(builder, address, value):
    """W float32 to address"""
    store_vector(builder, address, value)


@vector_op(i32, int64)
def load_i32(builder, address):
    """W int32 at address"""
    return load_vector(builder, address, I32_VECTOR)


@vector_op(types.void, int64, i32)
def store_i32(builder, address, value):
    """W int32 to address"""
    store_vector(builder, address, value)


@vector_op(bytes_, int64)
def load_bytes(builder, address):
    """4 W bytes at address"""
    return load_vector(builder, address, I8_VECTOR)


@vector_op(types.void, int64, bytes_)
def store_bytes(builder, address, value):
    """4 W bytes to address"""
    store_vector(builder, address, value)


@vector_op(f32, int64)
def load_f16(builder, address):
    """W float16 at address, as float32"""
    return f16_at(builder, address)


@vector_op(types.void, int64, f32)
def store_f16(builder, address, value):
    """W float32 to float16 at address, to nearest even"""
    store_vector(builder, address, float_to_half(builder, value, F16_VECTOR))


@vector_op(f32, int64)
def load_bf16(builder, address):
    """W bfloat16 at address, as float32"""
    return bf16_at(builder, address)


@vector_op(types.void, int64, f32)
def store_bf16(builder, address, value):
    """W float32 to bfloat16 at address, to nearest even"""
    bits = builder.bitcast(value, I32_VECTOR)
    is_odd = builder.and_(builder.lshr(bits, constant(I32_VECTOR, 16)), constant(I32_VECTOR, 1))
    rounded = builder.add(builder.add(bits, constant(I32_VECTOR, 0x7FFF)), is_odd)
    is_nan = builder.fcmp_unordered("uno", value, value)  # which rounding could make another number of
    rounded = builder.select(is_nan, constant(I32_VECTOR, 0x7FC00000), rounded)
    store_vector(builder, address, builder.trunc(builder.lshr(rounded, constant(I32_VECTOR, 16)), I16_VECTOR))


@vector_op(types.void, int64, i32)
def store_i8(builder, address, value):
    """W int32 to int8 at address; the values must fit"""
    store_vector(builder, address, builder.trunc(value, I8_LANES))


def make_store_apart(n, vector):
    """store(address, stride, values): n vectors of a type, `stride` bytes apart."""

    @vector_op(types.void, int64, int64, types.UniTuple(vector, n))
    def store(builder, address, stride, values):
        for i in range(n):
            where = builder.add(address, builder.mul(stride, ir.Constant(I64, i)))
            store_vector(builder, where, builder.extract_value(values, i))

    return store


SECOND_LEVEL, NEXT_TO_CORE = 2, 3  # caches, as LLVM counts them


@vector_op(types.void, int64)
def prefetch_near(builder, address):
    """Ask for the cache line at address: it will be needed soon. Never faults"""
    _prefetch(builder, address, NEXT_TO_CORE)


@vector_op(types.void, int64)
def prefetch_early(builder, address):
    """Ask for the cache line at address of a stream, well before its use. Never faults"""
    _prefetch(builder, address, NEXT_TO_CORE if ASKED_NEAR else SECOND_LEVEL)


@vector_op(types.void, int64)
def prefetch_again(builder, address):
    """Ask once more for the cache line at address of a stream, soon before its use, where that helps. Never faults"""
    if not ASKED_NEAR:
        _prefetch(builder, address, NEXT_TO_CORE if AGAIN_NEAR else SECOND_LEVEL)


@vector_op(types.void, int64)
def prefetch_write(builder, address):
    """Ask for the cache line at address, which will be written soon. Never faults"""
    _prefetch(builder, address, NEXT_TO_CORE, write=1)


def make_prefetch_lines(lines, near):
    """ask(address): the cache lines at these offsets, as near as the first-level cache or as the second-level one. No
    loop, which LLVM might leave as one."""

    @vector_op(types.void, int64)
    def ask(builder, address):
        for line in lines:
            where = builder.add(address, ir.Constant(I64, line))
            _prefetch(builder, where, NEXT_TO_CORE if near else SECOND_LEVEL)

    return ask


def _prefetch(builder, address, locality, write=0):
    where = builder.inttoptr(address, ir.PointerType(ir.IntType(8)))
    hint = [ir.Constant(I32, value) for value in (write, locality, 1)]  # to write, how near, data
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), where, *hint)
