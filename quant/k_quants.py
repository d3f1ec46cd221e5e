"""Encoders of the K-quants: super-blocks of 256 elements whose sub-block scales are themselves quantized.

Kernels over addresses, as in legacy.py. A search for the best scale is many dependent sums in a fixed order, so the
lanes of a vector are the sub-blocks, each summing its own elements one after the other as ggml does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2cpp.kernels.compiler import device, kernel
from lfm2cpp.kernels.scalar import load_f32, load_u8, store_f32, store_i8, store_i16, store_i64

from .legacy import INFINITY, MAGNITUDE, finite_half
from .vectors import (
    as_float,
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
    square_root,
    stack,
    store,
    to_f32,
    truncated,
)

GROUP_MAX_EPS = np.float32(1e-15)  # ggml's: what is below it everywhere counts as zero
ROUNDER = np.float32(12582912)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even


@device
def nearest(v):
    return (v + ROUNDER) - ROUNDER


@device
def transpose(src, n_rows, n_columns, dst):
    """n_rows of n_columns floats -> n_columns of 16 floats, of which the first n_rows are filled"""
    for row in range(n_rows):
        for column in range(n_columns):
            store_f32(dst + 4 * (16 * column + row), load_f32(src + 4 * (n_columns * row + column)))


@device
def finite_elements(x):
    """Of 256 elements"""
    top = bits(load_f32x32(x)) & MAGNITUDE
    for i in range(1, 8):
        top = greater(top, bits(load_f32x32(x + 128 * i)) & MAGNITUDE)
    return largest(top) < INFINITY


@device
def extremes(columns):
    """(whether the sub-block counts as zero, its element of largest magnitude), lane by lane"""
    extreme, magnitude = splat_16(np.float32(0)), splat_16(np.float32(0))
    for i in range(16):
        x = load_f32x16(columns + 64 * i)
        ax = as_float(bits(x) & MAGNITUDE)
        extreme = select(ax > magnitude, x, extreme)
        magnitude = select(ax > magnitude, ax, magnitude)
    is_zero = magnitude < GROUP_MAX_EPS
    return is_zero, select(is_zero, np.float32(1), extreme)


@device
def signed_scale_search(columns, n_max):
    """(scales, inverses) of 16 sub-blocks, lane by lane; both 0 where a sub-block is zero.

    Tries 19 inverse scales around the one that maps the largest element to -n_max and keeps the one whose levels,
    with the scale that suits them best, have the smallest error weighted by x^2: ggml's make_qx_quants.
    """
    is_zero, extreme = extremes(columns)
    scale = inverse = best = splat_16(np.float32(0))
    for step in range(19):
        shift = 0 if step == 0 else step - 10 if step < 10 else step - 9  # 0, -9 .. -1, 1 .. 9
        candidate = -(np.float32(n_max) + np.float32(0.1) * np.float32(shift)) / extreme
        sum_lx = sum_l2 = splat_16(np.float32(0))
        for i in range(16):
            x = load_f32x16(columns + 64 * i)
            level = greater(lesser(nearest(candidate * x), np.float32(n_max - 1)), np.float32(-n_max))
            weight = x * x
            sum_lx = sum_lx + weight * x * level
            sum_l2 = sum_l2 + weight * level * level
        if step == 0:
            scale = select(sum_l2 == np.float32(0), np.float32(0), sum_lx / sum_l2)
            best = scale * sum_lx
            inverse = candidate
        else:
            better = (sum_l2 > np.float32(0)) & (sum_lx * sum_lx > best * sum_l2)
            scale = select(better, sum_lx / sum_l2, scale)
            best = select(better, scale * sum_lx, best)
            inverse = select(better, candidate, inverse)
    return select(is_zero, np.float32(0), scale), select(is_zero, np.float32(0), inverse)


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
def quantize_blocks_q6_K(src, dst, n_blocks, bad):
    """x = d * scale * (q - 32): scales of 16 elements by search, then d so that the largest scale is -128"""
    columns, levels, steps, inverses = stack(1024), stack(256), stack(64), stack(64)
    for ib in range(n_blocks):
        x, out = src + 1024 * ib, dst + 210 * ib
        transpose(x, 16, 16, columns)
        scale, inverse = signed_scale_search(columns, 32)
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
def nearest_int(v):
    """As int32, by ggml's bits, whose results for what is too large, infinite or NaN belong to the format, too"""
    return (bits(v + ROUNDER) & 0x007FFFFF) - 0x00400000


@device
def level_of(v, n_max):
    return greater(lesser(nearest_int(v), np.int32(n_max)), np.int32(0))


@device
def weights_of(columns, weights):
    """Stores weights, the root mean square of a sub-block plus |x|; returns their sum, and that of weight * x"""
    total = splat_16(np.float32(0))
    for i in range(32):
        x = load_f32x16(columns + 64 * i)
        total = total + x * x
    spread = square_root(total / np.float32(32))
    sum_w = sum_x = splat_16(np.float32(0))
    for i in range(32):
        x = load_f32x16(columns + 64 * i)
        weight = spread + as_float(bits(x) & MAGNITUDE)
        store(weights + 64 * i, weight)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * x
    return sum_w, sum_x


@device
def store_levels(columns, n_max, inverse, origin, levels):
    """Those of inverse * (x - origin), as float32"""
    for i in range(32):
        store(levels + 64 * i, to_f32(level_of(inverse * (load_f32x16(columns + 64 * i) - origin), n_max)))


@device
def weighted_error(columns, weights, levels, scale, low):
    """Of the elements as scale * level + low"""
    error = splat_16(np.float32(0))
    for i in range(32):
        x = load_f32x16(columns + 64 * i)
        difference = scale * load_f32x16(levels + 64 * i) + low - x
        error = error + load_f32x16(weights + 64 * i) * (difference * difference)
    return error


@device
def affine_search(columns, weights, levels, n_max, first_shift, n_steps):
    """(scales, minima, inverses, origins) of 16 sub-blocks, lane by lane: x = scale * q - minimum.

    Beside the scale that maps the smallest element (or 0) to 0 and the largest to n_max, tries inverse scales in steps
    of 0.1 from first_shift on, each with the scale and minimum that suit its levels best, and keeps what has the
    smallest weighted error: ggml's make_qkx2_quants. The levels of what is kept are those of inverse * (x - origin).
    weights, levels: room for 32 vectors each.
    """
    low = high = load_f32x16(columns)
    for i in range(1, 32):
        x = load_f32x16(columns + 64 * i)
        low, high = select(x < low, x, low), select(x > high, x, high)
    low = select(low > np.float32(0), np.float32(0), low)
    is_flat = high == low
    sum_w, sum_x = weights_of(columns, weights)
    inverse = np.float32(n_max) / (high - low)
    scale, kept_inverse, origin = np.float32(1) / inverse, inverse, low
    store_levels(columns, n_max, inverse, low, levels)
    best = weighted_error(columns, weights, levels, scale, low)
    for step in range(n_steps + 1):
        inverse = (np.float32(first_shift) + np.float32(0.1) * np.float32(step) + np.float32(n_max)) / (high - low)
        store_levels(columns, n_max, inverse, low, levels)
        sum_l = sum_l2 = sum_xl = splat_16(np.float32(0))
        for i in range(32):
            x, level = load_f32x16(columns + 64 * i), load_f32x16(levels + 64 * i)
            weighted = load_f32x16(weights + 64 * i) * level
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * level
            sum_xl = sum_xl + weighted * x
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        new_scale = select(new_low > np.float32(0), sum_xl / sum_l2, new_scale)
        new_low = select(new_low > np.float32(0), np.float32(0), new_low)
        error = weighted_error(columns, weights, levels, new_scale, new_low)
        better = (determinant > np.float32(0)) & (error < best)
        best = select(better, error, best)
        scale = select(better, new_scale, scale)
        kept_inverse, origin = select(better, inverse, kept_inverse), select(better, low, origin)
        low = select(better, new_low, low)  # from here on the levels are counted from there
    scale, kept_inverse = select(is_flat, np.float32(0), scale), select(is_flat, np.float32(0), kept_inverse)
    return scale, np.float32(0) - low, kept_inverse, origin


@device
def six_bit_steps(values, first, steps):
    """Eight scales or minima from lane `first` of `values` on, as multiples 0 .. 63 at `steps` of a half, which is
    returned by its bits"""
    top = np.float32(0)
    for j in range(8):
        value = load_f32(values + 4 * (first + j))
        if value > top:
            top = value
    inverse = np.float32(63) / top if top > np.float32(0) else np.float32(0)
    for j in range(8):
        step = nearest_int(inverse * load_f32(values + 4 * (first + j))) & 255  # ggml's is a byte
        store_i8(steps + j, min(step, 63))
    return f16_of_f32(top / np.float32(63))


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
def store_sub_block_levels(x, n_max, step, minimum, inverse, origin, levels):
    """32 levels, a byte each. Where the step is zero, those of the search stay, as in ggml."""
    row = load_f32x32(x)
    if step != np.float32(0):
        store(levels, low_byte(level_of((row + minimum) / step, n_max)))
    else:
        store(levels, low_byte(level_of(inverse * (row - origin), n_max)))


def make_quantize_blocks(n_max: int, block_bytes: int, first_shift: float, n_steps: int, store_packed: Any) -> Any:
    """An encoder of blocks that begin with d, dmin and 6-bit numbers; store_packed(levels, out) does the rest.

    Lanes are the sub-blocks of two blocks; the last of an odd number is done twice.
    """

    def quantize_blocks(src, dst, n_blocks, bad):
        columns, weights, tried, levels = stack(2048), stack(2048), stack(2048), stack(256)
        scales, minima, inverses, origins = stack(64), stack(64), stack(64), stack(64)
        scale_steps, minimum_steps = stack(8), stack(8)
        for pair in range(0, n_blocks, 2):
            second = min(pair + 1, n_blocks - 1)
            transpose(src + 1024 * pair, 8, 32, columns)
            transpose(src + 1024 * second, 8, 32, columns + 32)
            found = affine_search(columns, weights, tried, n_max, first_shift, n_steps)
            store(scales, found[0])
            store(minima, found[1])
            store(inverses, found[2])
            store(origins, found[3])
            for ib in range(pair, second + 1):
                x, out, first = src + 1024 * ib, dst + block_bytes * ib, 8 * (ib - pair)
                d, dmin = six_bit_steps(scales, first, scale_steps), six_bit_steps(minima, first, minimum_steps)
                if not finite_elements(x) or not finite_half(d) or not finite_half(dmin):
                    store_i64(bad, ib)
                    return
                for j in range(8):
                    lane = 4 * (first + j)
                    step = f32_of_f16(d) * np.float32(load_u8(scale_steps + j))
                    minimum = f32_of_f16(dmin) * np.float32(load_u8(minimum_steps + j))
                    store_sub_block_levels(
                        x + 128 * j, n_max, step, minimum, load_f32(inverses + lane), load_f32(origins + lane),
                        levels + 32 * j,
                    )  # fmt: skip
                store_i16(out, d)
                store_i16(out + 2, dmin)
                store_six_bits(scale_steps, minimum_steps, out + 4)
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


quantize_blocks_q4_K = make_quantize_blocks(15, 144, -1.0, 20, store_packed_q4_K)
quantize_blocks_q5_K = make_quantize_blocks(31, 176, -0.5, 15, store_packed_q5_K)
