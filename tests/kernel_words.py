"""Kernels that do nothing but say one word of the SIMD vocabulary after another; test_kernels_words.py checks them.

`x` points to inputs and `out` to where results go, ROW bytes each; what gathers read lies at `far`.
"""

from __future__ import annotations

import numpy as np

from lfm2cpp.kernels import simd
from lfm2cpp.kernels.compiler import kernel
from lfm2cpp.kernels.dot import dot2_u6, dot_bf16, dot_i8, dot_u7
from lfm2cpp.kernels.math import exp, silu
from lfm2cpp.kernels.scalar import (
    fma_f32,
    load_f16,
    load_f32,
    load_i8,
    load_i32,
    load_i64,
    load_u8,
    load_u16,
    round_to_i64,
    store_f16,
    store_f32,
    store_i8,
    store_i16,
    store_i32,
    store_i64,
)
from lfm2cpp.kernels.simd import W

ROW = 256  # bytes: a vector of any level, and room behind it
BLOCKS = ((18, 2), (20, 4), (22, 2), (22, 6), (24, 4), (24, 8), (34, 2), (34, 18))  # bytes, and where in them pieces are gathered, and float16 2 bytes before
RUNS = [48, 16, 16, 48][: simd.PIECES]  # places of 32 bytes, low nibbles or high, and shifts of bits
HIGH = [1, 0, 1, 0][: simd.PIECES]
SHIFTS = [6, 0, 2, 4][: simd.PIECES]
gather_halves, gather_nibbles = simd.make_gather_halves(RUNS), simd.make_gather_nibbles(RUNS, HIGH)
pick_bits, pick_one = simd.make_bits_by_piece(SHIFTS, 3, 4), simd.make_bits_by_piece([5] * simd.PIECES, 7, 0)
SPREAD = [37, 0, 127, 64, 9, 9, 31, 8, 100, 16, 55, 120, 7, 90, 63, 1]  # a bit of a piece for each of its bytes
TABLE = [7, 250, 0, 128, 1, 90, 33, 127, 255, 64, 5, 200, 16, 99, 3, 61]
look_up = simd.make_look_up(TABLE)
spread_bits = simd.make_spread_bits(SPREAD, 32)
PLACES = [2 * (W + 1) * 4, 0, 5 * (W + 1) * 4, (W + 1) * 4, 4 * (W + 1) * 4, 7 * (W + 1) * 4]  # rows of W + 1
transpose_rows = simd.make_transpose_rows(PLACES)
store_two = simd.make_store_apart(2, simd.bytes_)
ask_near, ask_far = simd.make_prefetch_lines([0, 64], True), simd.make_prefetch_lines([128], False)


@kernel
def float_words(x, out):
    a, b, c = simd.load_f32(x), simd.load_f32(x + ROW), simd.load_f32(x + 2 * ROW)
    n = simd.load_i32(x + 3 * ROW)
    simd.store_f32(out, a + b)
    simd.store_f32(out + ROW, a - b)
    simd.store_f32(out + 2 * ROW, a * b)
    simd.store_f32(out + 3 * ROW, a / b)
    simd.store_f32(out + 4 * ROW, simd.fma(a, b, c))
    simd.store_f32(out + 5 * ROW, simd.maximum(a, b))
    simd.store_f32(out + 6 * ROW, simd.minimum(a, b))
    simd.store_f32(out + 7 * ROW, simd.absolute(a))
    simd.store_f32(out + 22 * ROW, simd.negative(a))
    simd.store_f32(out + 8 * ROW, simd.add_exponent(a, n))
    simd.store_f32(out + 9 * ROW, simd.to_f32(n))
    simd.store_i32(out + 10 * ROW, simd.product_to_i32(a, b))
    simd.store_f32(out + 11 * ROW, simd.splat_f32(np.float32(1.5)))
    simd.store_f32(out + 12 * ROW, simd.keep_first(a, 3, np.float32(-7.0)))
    simd.store_f32(out + 13 * ROW, simd.keep_first(a, -5, np.float32(-7.0)))
    simd.store_f32(out + 14 * ROW, simd.keep_first(a, 1000, np.float32(-7.0)))
    store_f32(out + 15 * ROW, simd.sum_lanes(a))
    store_f32(out + 16 * ROW, simd.max_lanes(a))
    store_f32(out + 17 * ROW, fma_f32(np.float32(3.0), np.float32(0.1), np.float32(-0.3)))
    simd.store_f32(out + 18 * ROW, simd.bits_to_f32(n))
    simd.store_f32(out + 19 * ROW, simd.from_whole(a))
    simd.store_f32(out + 20 * ROW, simd.reciprocal(simd.absolute(a) + simd.splat_f32(1.0)))
    simd.store_f32(out + 21 * ROW, simd.where_greater(a, b, b, c))


@kernel
def int_words(x, out):
    a, b = simd.load_i32(x), simd.load_i32(x + ROW)
    c, d = simd.load_i32(x + 2 * ROW), simd.load_i32(x + 3 * ROW)
    simd.store_i32(out, a + b)
    simd.store_i32(out + ROW, a - b)
    simd.store_i32(out + 2 * ROW, a * b)
    simd.store_i32(out + 3 * ROW, a & b)
    simd.store_i32(out + 4 * ROW, a | b)
    simd.store_i32(out + 5 * ROW, a ^ b)
    simd.store_i32(out + 6 * ROW, a >> 5)
    simd.store_i32(out + 7 * ROW, a << 5)
    simd.store_i32(out + 8 * ROW, simd.splat_i32(-3))
    store_i64(out + 9 * ROW, simd.sum_lanes_i32(simd.load_i32(x + 4 * ROW)))
    simd.store_i32(out + 10 * ROW, simd.sum_pieces(a, b, c, d))
    mask, offset = simd.splat_i32(0x7FFF), simd.splat_i32(0x4000)
    simd.store_i32(
        out + 11 * ROW,
        simd.sum_pieces_small((a & mask) - offset, (b & mask) - offset, (c & mask) - offset, (d & mask) - offset),
    )
    simd.store_i8(out + 12 * ROW, simd.load_i32(x + 4 * ROW))
    mask, offset = simd.splat_i32(0xFFFF), simd.splat_i32(0x8000)
    simd.store_i32(
        out + 13 * ROW,
        simd.sum_pieces_i16((a & mask) - offset, (b & mask) - offset, (c & mask) - offset, (d & mask) - offset),
    )


@kernel
def byte_words(x, far, out):
    a, b, c, d = (
        simd.load_bytes(x), simd.load_bytes(x + ROW), simd.load_bytes(x + 2 * ROW), simd.load_bytes(x + 3 * ROW)
    )  # fmt: skip
    simd.store_bytes(out, a & b)
    simd.store_bytes(out + ROW, simd.low_nibbles(a))
    simd.store_bytes(out + 2 * ROW, simd.high_nibbles(a))
    simd.store_bytes(out + 3 * ROW, simd.splat_u8(200))
    simd.store_bytes(out + 4 * ROW, simd.splat_4_bytes(x + 5))
    q = simd.transpose_4(a, b, c, d)
    for j in range(4):
        simd.store_bytes(out + (5 + j) * ROW, q[j])
    simd.store_bytes(out + 9 * ROW, simd.gather_pieces(far + 3, 18))
    simd.store_bytes(out + 10 * ROW, pick_bits(a))
    even, odd = simd.gather_i8_pairs(far + 7, 210)
    simd.store_i32(out + 11 * ROW, even)
    simd.store_i32(out + 15 * ROW, odd)
    simd.store_bytes(out + 12 * ROW, (a | b) ^ c)
    simd.store_bytes(out + 13 * ROW, a >> 2)
    store_two(out + 14 * ROW, 4 * ROW, (a, b))
    simd.store_bytes(out + 16 * ROW, simd.low_halves(a, b))
    simd.store_bytes(out + 17 * ROW, simd.high_halves(a, b))
    simd.store_bytes(out + 19 * ROW, pick_one(a))
    simd.prefetch_near(far + 1000000)  # wherever that is
    simd.prefetch_write(far + 1000000)
    simd.prefetch_early(far + 1000000)
    simd.prefetch_again(far + 1000000)
    ask_near(far + 1000000)
    ask_far(far + 1000000)


def make_piece_words(nbytes, at):
    first, second, third, fourth = simd.make_gathers(nbytes, at)
    halves = simd.make_gather_f16(nbytes, at - 2)

    @kernel
    def piece_words(far, out):
        simd.store_bytes(out, first(far))
        simd.store_bytes(out + ROW, second(far))
        simd.store_bytes(out + 2 * ROW, third(far))
        simd.store_bytes(out + 3 * ROW, fourth(far))
        simd.store_f32(out + 4 * ROW, halves(far))

    return piece_words


globals().update({f"pieces_of_{nbytes}_{at}": make_piece_words(nbytes, at) for nbytes, at in BLOCKS})


@kernel
def run_words(far, out):
    first, second = gather_halves(far)
    simd.store_bytes(out, first)
    simd.store_bytes(out + ROW, second)
    first, second = gather_nibbles(far)
    simd.store_bytes(out + 2 * ROW, first)
    simd.store_bytes(out + 3 * ROW, second)


@kernel
def five_words(x, out):
    a, b = simd.load_bytes(x), simd.load_bytes(x + ROW)
    simd.store_bytes(out, spread_bits(a))
    simd.store_bytes(out + 3 * ROW, look_up(simd.low_nibbles(a)))
    low, high = simd.fives(a, b)
    simd.store_bytes(out + ROW, low)
    simd.store_bytes(out + 2 * ROW, high)


@kernel
def dot_words(x, out):
    acc, u = simd.load_i32(x), simd.load_bytes(x + ROW)
    w, a = simd.load_bytes(x + 2 * ROW), simd.load_bytes(x + 3 * ROW)
    simd.store_i32(out, dot_u7(acc, u, a))
    simd.store_i32(out + ROW, dot_i8(acc, w, a))
    u, v = u & simd.splat_u8(63), u >> 1 & simd.splat_u8(63)
    simd.store_i32(out + 2 * ROW, dot2_u6(acc, u, a, v, w))


@kernel
def half_words(x, out, n):
    """float16 -> float32 of n values, and back; vectors first, then one by one"""
    for i in range(0, n, W):
        value = simd.load_f16(x + 2 * i)
        simd.store_f32(out + 4 * i, value)
    for i in range(n):
        store_f32(out + 4 * (n + i), load_f16(x + 2 * i))


@kernel
def to_half_words(x, out, n):
    for i in range(0, n, W):
        simd.store_f16(out + 2 * i, simd.load_f32(x + 4 * i))
    for i in range(n):
        store_f16(out + 2 * (n + i), load_f32(x + 4 * i))


@kernel
def gather_words(far, out):
    simd.store_f32(out, simd.gather_f16(far, 18))
    simd.store_f32(out + ROW, simd.gather_f16(far + 2, 210))
    simd.store_f32(out + 4 * ROW, simd.repeat_f16(far, 210))
    simd.store_f32(out + 5 * ROW, simd.load_bf16(far))
    for i in range(3):
        first, second = simd.i8_of_lanes(simd.load_i32(far), i)
        simd.store_f32(out + (6 + 2 * i) * ROW, first)
        simd.store_f32(out + (7 + 2 * i) * ROW, second)
    for half in range(2):
        scales, minima = simd.gather_sub_block_scales(far, 144, half)
        simd.store_f32(out + (12 + 2 * half) * ROW, scales)
        simd.store_f32(out + (13 + 2 * half) * ROW, minima)


@kernel
def square(source, stride, destination, step):
    simd.transpose_square(source, stride, destination, step)


@kernel
def rows_to_columns(source, destination, step):
    transpose_rows(source, destination, step)


@kernel
def bf16_words(x, pairs, w, out):
    """x to BF16; then pairs of it by pairs of w, added to the first W of x"""
    simd.store_bf16(pairs, simd.load_f32(x))
    simd.store_bf16(pairs + 2 * W, simd.load_f32(x + 4 * W))
    simd.store_f32(out, dot_bf16(simd.load_f32(w), simd.load_f32(pairs), simd.load_f32(x)))


@kernel
def math_words(x, out, n):
    for i in range(0, n, W):
        value = simd.load_f32(x + 4 * i)
        simd.store_f32(out + 4 * i, exp(value))
        simd.store_f32(out + 4 * (n + i), silu(value))


@kernel
def scalar_words(x, out):
    store_i64(out, load_i64(x))
    store_i64(out + 8, load_i32(x))
    store_i64(out + 16, load_u16(x))
    store_i64(out + 24, load_u8(x))
    store_i64(out + 32, load_i8(x))
    store_i32(out + 40, load_i64(x))
    store_i16(out + 44, load_i64(x))
    store_i8(out + 46, load_i64(x))
    store_i64(out + 48, round_to_i64(np.float32(2.5)))
    store_i64(out + 56, round_to_i64(np.float32(-3.5)))
    store_i64(out + 64, round_to_i64(np.float32(4194303.0)))
