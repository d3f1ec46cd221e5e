"""Searches for the scales of small groups of weights, as make_qx_quants, make_qkx2/3_quants and make_qp_quants of ggml
(ggml-quants.c of llama.cpp 0c1e570), operation for operation.

A search is many dependent sums in a fixed order, so the lanes of a vector are groups, each summing its own elements one
after the other as ggml does. `columns` is the address of such groups: vector i holds element i of 16 of them. So are
`weights`, by which an element's error counts.
"""

from __future__ import annotations

import numpy as np

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f32, load_u8, store_f32, store_i8

from .vectors import (
    MAGNITUDE,
    as_float,
    bits,
    f16_of_f32,
    greater,
    lesser,
    load_f32x16,
    select,
    splat_16,
    square_root,
    store,
    to_f32,
)

GROUP_MAX_EPS = np.float32(1e-15)  # ggml's: what is below it everywhere counts as zero
ROUNDER = np.float32(12582912)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even
MAX_STEP = 63  # of the scales and minima of Q4_K and Q5_K
WEIGHTED_SHIFT, WEIGHTED_STEP, WEIGHTED_STEPS = -0.9, 0.05, 36  # of affine_search, with importances


@device
def nearest(v):
    return (v + ROUNDER) - ROUNDER


@device
def nearest_int(v):
    """As int32, by ggml's bits, whose results for what is too large, infinite or NaN belong to the format, too"""
    return (bits(v + ROUNDER) & 0x007FFFFF) - 0x00400000


@device
def level_of(v, n_max):
    return greater(lesser(nearest_int(v), np.int32(n_max)), np.int32(0))


@device
def transpose(src, n_rows, n_columns, columns):
    """n_rows of n_columns floats -> n_columns of 16 floats, of which the first n_rows are filled"""
    for row in range(n_rows):
        for column in range(n_columns):
            store_f32(columns + 4 * (16 * column + row), load_f32(src + 4 * (n_columns * row + column)))


# How much an element's error counts


@device
def weigh_by_square(columns, n, weights):
    """x^2"""
    for i in range(n):
        x = load_f32x16(columns + 64 * i)
        store(weights + 64 * i, x * x)


@device
def sums_of_squares(columns, n):
    """Of 16 groups of n, lane by lane"""
    total = splat_16(np.float32(0))
    for i in range(n):
        x = load_f32x16(columns + 64 * i)
        total = total + x * x
    return total


@device
def weigh_by_magnitude(columns, n, weights):
    """The root mean square of the group plus |x|"""
    spread = square_root(sums_of_squares(columns, n) / np.float32(n))
    for i in range(n):
        x = load_f32x16(columns + 64 * i)
        store(weights + 64 * i, spread + as_float(bits(x) & MAGNITUDE))


@device
def weigh_by_importance(columns, n, weights, sigma2):
    """importance * sqrt(sigma2 + x^2), where `weights` holds the importances; sigma2: one a group"""
    for i in range(n):
        x = load_f32x16(columns + 64 * i)
        store(weights + 64 * i, load_f32x16(weights + 64 * i) * square_root(sigma2 + x * x))


@device
def sum_of_squares(x, n):
    """Of n floats at x, one after the other"""
    total = np.float32(0)
    for i in range(n):
        v = load_f32(x + 4 * i)
        total += v * v
    return total


# x = scale * level, levels -n_max .. n_max - 1


@device
def extremes(columns, n):
    """(whether the group counts as zero, its element of largest magnitude), lane by lane"""
    extreme, magnitude = splat_16(np.float32(0)), splat_16(np.float32(0))
    for i in range(n):
        x = load_f32x16(columns + 64 * i)
        ax = as_float(bits(x) & MAGNITUDE)
        extreme = select(ax > magnitude, x, extreme)
        magnitude = select(ax > magnitude, ax, magnitude)
    is_zero = magnitude < GROUP_MAX_EPS
    return is_zero, select(is_zero, np.float32(1), extreme)


@device
def signed_search(columns, weights, n, n_max):
    """(scales, inverses) of 16 groups of n, lane by lane; both 0 where a group is zero.

    Tries 19 inverse scales around the one that maps the largest element to -n_max and keeps the one whose levels,
    with the scale that suits them best, have the smallest weighted error: ggml's make_qx_quants.
    """
    is_zero, extreme = extremes(columns, n)
    scale = inverse = best = splat_16(np.float32(0))
    for step in range(19):
        shift = 0 if step == 0 else step - 10 if step < 10 else step - 9  # 0, -9 .. -1, 1 .. 9
        candidate = -(np.float32(n_max) + np.float32(0.1) * np.float32(shift)) / extreme
        sum_lx = sum_l2 = splat_16(np.float32(0))
        for i in range(n):
            x, weight = load_f32x16(columns + 64 * i), load_f32x16(weights + 64 * i)
            level = greater(lesser(nearest(candidate * x), np.float32(n_max - 1)), np.float32(-n_max))
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


# x = scale * level + low, levels 0 .. n_max; low is 0 at most


@device
def store_levels(columns, n, n_max, inverse, origin, levels):
    """Those of inverse * (x - origin), as float32"""
    for i in range(n):
        store(levels + 64 * i, to_f32(level_of(inverse * (load_f32x16(columns + 64 * i) - origin), n_max)))


@device
def weighted_error(columns, weights, levels, n, scale, low):
    """Of the elements as scale * level + low"""
    error = splat_16(np.float32(0))
    for i in range(n):
        x = load_f32x16(columns + 64 * i)
        difference = scale * load_f32x16(levels + 64 * i) + low - x
        error = error + load_f32x16(weights + 64 * i) * (difference * difference)
    return error


@device
def affine_search(columns, weights, levels, n, n_max, first_shift, shift_step, n_steps):
    """(scales, lows, inverses, origins, sums of the weights) of 16 groups of n, lane by lane.

    Beside the scale that maps the smallest element (or 0) to 0 and the largest to n_max, tries inverse scales in steps
    of shift_step from first_shift on, each with the scale and low that suit its levels best, and keeps what has the
    smallest weighted error: ggml's make_qkx2_quants and make_qkx3_quants. The levels of what is kept are those of
    inverse * (x - origin). levels: room for n vectors.
    """
    low = high = load_f32x16(columns)
    sum_w = load_f32x16(weights)
    sum_x = sum_w * low  # not from zero: all may be -0
    for i in range(1, n):
        x, weight = load_f32x16(columns + 64 * i), load_f32x16(weights + 64 * i)
        low, high = select(x < low, x, low), select(x > high, x, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * x
    low = select(low > np.float32(0), np.float32(0), low)
    is_flat = high == low
    inverse = np.float32(n_max) / (high - low)
    scale, kept_inverse, origin = np.float32(1) / inverse, inverse, low
    store_levels(columns, n, n_max, inverse, low, levels)
    best = weighted_error(columns, weights, levels, n, scale, low)
    for step in range(n_steps + 1):
        shift = np.float32(first_shift) + np.float32(shift_step) * np.float32(step)
        inverse = (shift + np.float32(n_max)) / (high - low)
        store_levels(columns, n, n_max, inverse, low, levels)
        sum_l = sum_l2 = sum_xl = splat_16(np.float32(0))
        for i in range(n):
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
        error = weighted_error(columns, weights, levels, n, new_scale, new_low)
        better = (determinant > np.float32(0)) & (error < best)
        best = select(better, error, best)
        scale = select(better, new_scale, scale)
        kept_inverse, origin = select(better, inverse, kept_inverse), select(better, low, origin)
        low = select(better, new_low, low)  # from here on the levels are counted from there
    scale, kept_inverse = select(is_flat, np.float32(0), scale), select(is_flat, np.float32(0), kept_inverse)
    return scale, low, kept_inverse, origin, sum_w


# Eight scales or minima, one after the other, as multiples 0 .. MAX_STEP, bytes at `steps`, of a half, whose bits are
# returned. A scale may be negative where one element has all the weight; then its byte wraps, as in ggml.


@device
def largest_step(values):
    """The largest of eight, 0 at least"""
    top = np.float32(0)
    for j in range(8):
        value = load_f32(values + 4 * j)
        if value > top:
            top = value
    return top


@device
def plain_steps(values, steps):
    """The largest becomes MAX_STEP."""
    top = largest_step(values)
    inverse = np.float32(MAX_STEP) / top if top > np.float32(0) else np.float32(0)
    for j in range(8):
        store_i8(steps + j, min(nearest_int(inverse * load_f32(values + 4 * j)) & 255, MAX_STEP))
    return f16_of_f32(top / np.float32(MAX_STEP))


@device
def squared_error(values, weights, inverse, as_bytes):
    """Weighted, of the eight as nearest multiples of 1 / inverse: as bytes, which wrap, or MAX_STEP at most"""
    scale, error = np.float32(1) / inverse, np.float32(0)
    for j in range(8):
        value = load_f32(values + 4 * j)
        step = nearest_int(inverse * value)
        step = step & 255 if as_bytes else min(step, MAX_STEP)
        difference = value - scale * np.float32(step)
        error += load_f32(weights + 4 * j) * difference * difference
    return error


@device
def weighted_steps(values, weights, steps):
    """The best of nine scales, then each step in turn moved to where the weighted error is least, five times at most:
    ggml's make_qp_quants."""
    top = largest_step(values)
    if top < GROUP_MAX_EPS:
        for j in range(8):
            store_i8(steps + j, 0)
        return np.int64(0)
    inverse = np.float32(MAX_STEP) / top
    best = squared_error(values, weights, inverse, True)
    for shift in range(-4, 5):
        candidate = (np.float32(0.1) * np.float32(shift) + np.float32(MAX_STEP)) / top
        error = squared_error(values, weights, candidate, False)
        if shift != 0 and error < best:
            best, inverse = error, candidate
    sum_lx = sum_l2 = np.float32(0)
    for j in range(8):
        value, weight = load_f32(values + 4 * j), load_f32(weights + 4 * j)
        step = min(nearest_int(inverse * value), MAX_STEP)
        sum_lx += weight * value * np.float32(step)
        sum_l2 += weight * np.float32(step) * np.float32(step)
        store_i8(steps + j, step)
    changed, n_tries = True, 0
    while changed and n_tries < 5:
        changed, n_tries = False, n_tries + 1
        for j in range(8):
            value, weight, level = load_f32(values + 4 * j), load_f32(weights + 4 * j), np.float32(load_u8(steps + j))
            others_lx = sum_lx - weight * value * level
            others_l2 = sum_l2 - weight * level * level
            if others_lx > np.float32(0) and others_l2 > np.float32(0):
                step = min(nearest_int(value * others_l2 / others_lx), MAX_STEP)
                if np.float32(step) != level:
                    others_lx += weight * value * np.float32(step)
                    others_l2 += weight * np.float32(step) * np.float32(step)
                    if others_lx * others_lx * sum_l2 > sum_lx * sum_lx * others_l2:
                        store_i8(steps + j, step)
                        sum_lx, sum_l2, changed = others_lx, others_l2, True
    return f16_of_f32(sum_lx / sum_l2 if sum_l2 > np.float32(0) else np.float32(0))
