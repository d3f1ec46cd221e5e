"""Encoders of the K-quants: super-blocks of 256 elements whose sub-block scales are themselves quantized.

Kernels over addresses, as in legacy.py. A search for the best scale is many dependent sums in a fixed order, so the
lanes of a vector are the sub-blocks, each summing its own elements one after the other as ggml does.
"""

from __future__ import annotations

import numpy as np

from lfm2cpp.kernels.compiler import device, kernel
from lfm2cpp.kernels.scalar import load_f32, store_f32, store_i16, store_i64

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
    load_u8x32,
    low_byte,
    select,
    splat_16,
    stack,
    store,
    truncated,
)

GROUP_MAX_EPS = np.float32(1e-15)  # ggml's: what is below it everywhere counts as zero
ROUNDER = np.float32(12582912)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even


@device
def nearest(v):
    return (v + ROUNDER) - ROUNDER


@device
def transpose_16x16(src, dst):
    for row in range(16):
        for column in range(16):
            store_f32(dst + 4 * (16 * column + row), load_f32(src + 4 * (16 * row + column)))


@device
def all_finite(columns):
    top = bits(load_f32x16(columns)) & MAGNITUDE
    for i in range(1, 16):
        top = greater(top, bits(load_f32x16(columns + 64 * i)) & MAGNITUDE)
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
        transpose_16x16(x, columns)
        scale, inverse = signed_scale_search(columns, 32)
        max_scale = largest_of(scale)
        if abs(max_scale) < GROUP_MAX_EPS:
            iscale, d = np.float32(0), np.int64(0)
            inverse = splat_16(np.float32(0))
        else:
            iscale = np.float32(-128) / max_scale
            d = f16_of_f32(np.float32(1) / iscale)
        if not all_finite(columns) or not finite_half(d):
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
