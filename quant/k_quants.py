"""Encoders of the K-quants: super-blocks of 256 elements whose sub-block scales are themselves quantized.

Kernels over addresses, as in legacy.py; `importance` is the address of a row's row_blocks * 256 importances
(gguf/imatrix.py), or 0. Lanes of the searches are sub-blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2cpp.kernels.compiler import device, kernel
from lfm2cpp.kernels.scalar import load_f32, load_u8, load_u16, store_f32, store_i8, store_i16, store_i64

from .legacy import finite_half
from .search import (
    GROUP_MAX_EPS,
    MAX_STEP,
    WEIGHTED_SHIFT,
    WEIGHTED_STEP,
    WEIGHTED_STEPS,
    affine_search,
    level_of,
    nearest,
    plain_steps,
    signed_search,
    sum_of_squares,
    transpose,
    weigh_by_importance,
    weigh_by_magnitude,
    weigh_by_square,
    weighted_steps,
)
from .vectors import (
    INFINITY,
    MAGNITUDE,
    bits,
    f16_of_f32,
    f32_of_f16,
    first_true,
    greater,
    largest,
    lesser,
    load_f32x16,
    load_f32x32,
    load_u8x32,
    low_byte,
    select,
    splat_16,
    stack,
    store,
    truncated,
)


@device
def finite_elements(x):
    """Of 256 elements"""
    top = bits(load_f32x32(x)) & MAGNITUDE
    for i in range(1, 8):
        top = greater(top, bits(load_f32x32(x + 128 * i)) & MAGNITUDE)
    return largest(top) < INFINITY


@device
def largest_of(values):
    """The lane of largest magnitude, the first of equals; NaN counts as 0."""
    magnitude = select(values == values, bits(values) & MAGNITUDE, 0)
    buffer = stack(64)
    store(buffer, values)
    top = largest(magnitude)
    return load_f32(buffer + 4 * first_true(magnitude == top)) if top > 0 else np.float32(0)


@device
def store_levels_q6_K(x, steps, inverses, levels):
    """256 levels 0 .. 63, a byte each. Where a sub-block's step is zero, those of the search stay, as in ggml."""
    for j in range(16):
        step, inverse = load_f32(steps + 4 * j), load_f32(inverses + 4 * j)
        row = load_f32x16(x + 64 * j)
        level = nearest(row / step) if step != np.float32(0) else nearest(inverse * row)
        level = greater(lesser(level, np.float32(31)), np.float32(-32)) + np.float32(32)
        if inverse == np.float32(0):
            level = splat_16(np.float32(0))
        store(levels + 16 * j, low_byte(truncated(level)))


@device
def store_packed_q6_K(levels, ql, qh):
    """Of each 128 levels: low nibbles of quarters 0 2 and 1 3 share bytes, the high bits of all four share one."""
    for half in range(2):
        a, b = load_u8x32(levels + 128 * half), load_u8x32(levels + 128 * half + 32)
        c, d = load_u8x32(levels + 128 * half + 64), load_u8x32(levels + 128 * half + 96)
        store(ql + 64 * half, (a & 15) | (c << 4))
        store(ql + 64 * half + 32, (b & 15) | (d << 4))
        store(qh + 32 * half, (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6))


@kernel
def quantize_blocks_q6_K(src, dst, n_blocks, row_blocks, importance, bad):
    """x = d * scale * (q - 32): scales of 16 elements by search, then d so that the largest scale is -128"""
    columns, weights, levels, steps, inverses = stack(1024), stack(1024), stack(256), stack(64), stack(64)
    for ib in range(n_blocks):
        x, out = src + 1024 * ib, dst + 210 * ib
        transpose(x, 16, 16, columns)
        if importance:
            transpose(importance + 1024 * (ib % row_blocks), 16, 16, weights)
        else:
            weigh_by_square(columns, 16, weights)
        scale, inverse = signed_search(columns, weights, 16, 32)
        max_scale = largest_of(scale)
        if abs(max_scale) < GROUP_MAX_EPS:
            iscale, d = np.float32(0), np.int64(0)
            inverse = splat_16(np.float32(0))
        else:
            iscale = np.float32(-128) / max_scale
            d = f16_of_f32(np.float32(1) / iscale)
        if not finite_elements(x) or not finite_half(d):
            store_i64(bad, ib)
            return
        scale_level = select(scale == scale, lesser(nearest(iscale * scale), np.float32(127)), np.float32(0))
        store(steps, f32_of_f16(d) * scale_level)
        store(inverses, inverse)
        store_levels_q6_K(x, steps, inverses, levels)
        store_packed_q6_K(levels, out, out + 128)
        store(out + 192, low_byte(truncated(scale_level)))
        store_i16(out + 208, d)
    store_i64(bad, -1)


# Q4_K and Q5_K: sub-blocks of 32 elements, x = d * scale * q - dmin * min


@device
def store_six_bits(scales, minima, out):
    """Eight numbers each, of 6 bits, in 12 bytes: the upper two of the last four are on top of the first four"""
    for j in range(4):
        a, b = load_u8(scales + j), load_u8(minima + j)
        c, d = load_u8(scales + 4 + j), load_u8(minima + 4 + j)
        store_i8(out + j, a | ((c >> 4) << 6))
        store_i8(out + 4 + j, b | ((d >> 4) << 6))
        store_i8(out + 8 + j, (c & 15) | ((d & 15) << 4))


@device
def load_six_bits(packed, scales, minima):
    """What store_six_bits has stored; of larger numbers it has spoilt others"""
    for j in range(4):
        first, second, low = load_u8(packed + j), load_u8(packed + 4 + j), load_u8(packed + 8 + j)
        store_i8(scales + j, first & MAX_STEP)
        store_i8(minima + j, second & MAX_STEP)
        store_i8(scales + 4 + j, (low & 15) | ((first >> 6) << 4))
        store_i8(minima + 4 + j, (low >> 4) | ((second >> 6) << 4))


@device
def store_sub_block_levels(x, n_max, step, minimum, inverse, origin, levels):
    """32 levels, a byte each. Where the step is zero, those of the search stay, as in ggml."""
    row = load_f32x32(x)
    if step != np.float32(0):
        store(levels, low_byte(level_of((row + minimum) / step, n_max)))
    else:
        store(levels, low_byte(level_of(inverse * (row - origin), n_max)))


@device
def store_sigma2(x, y, out):
    """ggml's sigma2, twice the mean square, of the 256 elements at x in eight lanes, and of those at y in eight more"""
    for half in range(2):
        sigma2 = np.float32(2) * sum_of_squares(y if half else x, 256) / np.float32(256)
        for lane in range(8):
            store_f32(out + 32 * half + 4 * lane, sigma2)


def make_quantize_blocks(
    n_max: int, block_bytes: int, first_shift: float, n_steps: int, clamps: bool, store_packed: Any
) -> Any:
    """An encoder of blocks that begin with d, dmin and 6-bit numbers; store_packed(levels, out) does the rest.

    first_shift, n_steps: of the search without importances. clamps: whether steps that have wrapped are clamped before
    they are packed; ggml does so for one of the two types. Lanes are the sub-blocks of two blocks; the last of an odd
    number is done twice.
    """

    @device
    def search(src, first, second, row_blocks, importance, columns, weights, tried, sigma2):
        """affine_search for the sub-blocks of blocks first and second; with importances also their sigma2"""
        transpose(src + 1024 * first, 8, 32, columns)
        transpose(src + 1024 * second, 8, 32, columns + 32)
        shift, step, n = np.float32(first_shift), np.float32(0.1), n_steps
        if importance:
            transpose(importance + 1024 * (first % row_blocks), 8, 32, weights)
            transpose(importance + 1024 * (second % row_blocks), 8, 32, weights + 32)
            store_sigma2(src + 1024 * first, src + 1024 * second, sigma2)
            weigh_by_importance(columns, 32, weights, load_f32x16(sigma2))
            shift, step, n = np.float32(WEIGHTED_SHIFT), np.float32(WEIGHTED_STEP), WEIGHTED_STEPS
        else:
            weigh_by_magnitude(columns, 32, weights)
        return affine_search(columns, weights, tried, 32, n_max, shift, step, n)

    @device
    def store_steps(out, scales, minima, sums, importance, scale_steps, minimum_steps):
        """A block's d, dmin and 6-bit numbers, which stay at scale_steps and minimum_steps; whether both are finite"""
        if importance:
            d, dmin = weighted_steps(scales, sums, scale_steps), weighted_steps(minima, sums, minimum_steps)
        else:
            d, dmin = plain_steps(scales, scale_steps), plain_steps(minima, minimum_steps)
        if clamps:
            for j in range(8):
                store_i8(scale_steps + j, min(load_u8(scale_steps + j), MAX_STEP))
                store_i8(minimum_steps + j, min(load_u8(minimum_steps + j), MAX_STEP))
        store_i16(out, d)
        store_i16(out + 2, dmin)
        store_six_bits(scale_steps, minimum_steps, out + 4)
        load_six_bits(out + 4, scale_steps, minimum_steps)
        return finite_half(d) and finite_half(dmin)

    def quantize_blocks(src, dst, n_blocks, row_blocks, importance, bad):
        columns, weights, tried, levels = stack(2048), stack(2048), stack(2048), stack(256)
        scales, minima, inverses, origins = stack(64), stack(64), stack(64), stack(64)
        sums, sigma2 = stack(64), stack(64)
        scale_steps, minimum_steps = stack(8), stack(8)
        for pair in range(0, n_blocks, 2):
            second = min(pair + 1, n_blocks - 1)
            found = search(src, pair, second, row_blocks, importance, columns, weights, tried, sigma2)
            store(scales, found[0])
            store(minima, np.float32(0) - found[1])
            store(inverses, found[2])
            store(origins, found[3])
            store(sums, found[4])
            for ib in range(pair, second + 1):
                x, out, lane = src + 1024 * ib, dst + block_bytes * ib, 32 * (ib - pair)
                finite = store_steps(
                    out, scales + lane, minima + lane, sums + lane, importance, scale_steps, minimum_steps
                )
                finite = finite and finite_elements(x)
                if importance:  # else all sums would be infinite or NaN
                    finite = finite and bits(load_f32(sigma2 + lane)) & MAGNITUDE < INFINITY
                if not finite:
                    store_i64(bad, ib)
                    return
                d, dmin = f32_of_f16(load_u16(out)), f32_of_f16(load_u16(out + 2))
                for j in range(8):
                    step = d * np.float32(load_u8(scale_steps + j))
                    minimum = dmin * np.float32(load_u8(minimum_steps + j))
                    inverse, origin = load_f32(inverses + lane + 4 * j), load_f32(origins + lane + 4 * j)
                    store_sub_block_levels(x + 128 * j, n_max, step, minimum, inverse, origin, levels + 32 * j)
                store_packed(levels, out + 16)
        store_i64(bad, -1)

    return kernel(quantize_blocks)


@device
def store_packed_q4_K(levels, out):
    """Of each 64 levels, 32 bytes: the first half in the low nibbles."""
    for part in range(4):
        a, b = load_u8x32(levels + 64 * part), load_u8x32(levels + 64 * part + 32)
        store(out + 32 * part, (a & 15) | (b << 4))


@device
def store_packed_q5_K(levels, out):
    """32 bytes of fifth bits, bit j for sub-block j, then the others as in Q4_K"""
    high = load_u8x32(levels) >> 4
    for j in range(1, 8):
        high = high | ((load_u8x32(levels + 32 * j) >> 4) << j)
    store(out, high)
    store_packed_q4_K(levels, out + 32)


quantize_blocks_q4_K = make_quantize_blocks(15, 144, -1.0, 20, False, store_packed_q4_K)
quantize_blocks_q5_K = make_quantize_blocks(31, 176, -0.5, 15, True, store_packed_q5_K)
