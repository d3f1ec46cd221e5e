"""Activations as int8: blocks of 32 with a float32 scale, laid out for the product that reads them.

A row of n elements is cut into blocks of 32 and groups of W blocks, the last group padded with zeros. Two layouts, both
of ACT_GROUP bytes a group:

    one token (decode): block b of a group is piece b // 4 of vector pair b % 4, its first 16 elements in the pair's low
    vector, the others in the high one. After `sum_pieces` of the four pairs, lane b holds block b's sum, in order.

    more tokens (prefill): blocks in the order in which a tile adds them up, chain by chain: the blocks b with the same
    b % W follow each other, 32 bytes each.

Either way the tables follow, one entry a block, in group order or in chain order:

    d       float32: the scale, max|x| / levels
    ds      float32: d * sum of its integers, for types with a minimum
    z8      int32: -8 * sum, what Q4_0's unsigned nibbles are too large by
    z128    int32: -I8_BIAS * sum
    z32     int32, two tables: -32 * sum of the first 16 elements; of the others (Q6_K)

Source of the scheme: ggml's Q8_0, with the scale chosen by best_levels and kept in float32.
"""

from __future__ import annotations

import numpy as np

from .compiler import device
from .dot import I8_BIAS
from .scalar import store_f32, store_i32
from .simd import (
    W,
    absolute,
    fma,
    load_f32,
    max_lanes,
    maximum,
    round_to_i32,
    splat_f32,
    splat_i32,
    store_i8,
    sum_lanes,
    sum_lanes_i32,
    to_f32,
)
from .widths import ACT_D, ACT_DS, ACT_GROUP, ACT_Z8, ACT_Z32_HIGH, ACT_Z32_LOW, ACT_Z128

QK = 32
LEVELS = 127
CANDIDATES = 4  # numbers of levels that are tried, from LEVELS down


@device
def decode_offset(b):
    """Decode layout: offset of block b's first 16 integers; the other 16 lie 4 W bytes further."""
    in_group = b % W
    return (b // W) * (32 * W) + (in_group % 4) * (8 * W) + (in_group // 4) * 16


@device
def chain_index(b, n_groups):
    """Prefill layout: the place of block b among the blocks; its integers are 32 bytes, its table entries 4."""
    return (b % W) * n_groups + b // W


@device
def best_levels(x, amax):
    """Which of a few numbers of levels represents the 32 float32 at x with the least squared error.

    Rounding errors differ from one scale to the next as if drawn anew; the best of four scales has 7 % less of them
    than the widest one alone, which is what ggml takes.
    """
    best, least = np.float32(LEVELS), np.float32(np.inf)
    if amax > 0.0:
        for fewer in range(CANDIDATES):
            levels = np.float32(LEVELS - fewer)
            scale, inverse = splat_f32(amax / levels), splat_f32(levels / amax)
            error = splat_f32(0.0)
            for i in range(0, QK, W):
                value = load_f32(x + 4 * i)
                off = value - to_f32(round_to_i32(value * inverse)) * scale
                error = fma(off, off, error)
            total = sum_lanes(error)
            if total < least:
                best, least = levels, total
    return best


@device
def quantize_block(x, row, n_groups, b, one_token):
    """Quantize the 32 float32 at x into block b of the activation row at `row`, in the layout for one token or more."""
    peak = absolute(load_f32(x))
    for i in range(W, QK, W):
        peak = maximum(absolute(load_f32(x + 4 * i)), peak)
    amax = max_lanes(peak)
    levels = best_levels(x, amax)
    d = amax / levels
    inverse = splat_f32(levels / amax if amax > 0.0 else np.float32(0.0))
    place = b if one_token else chain_index(b, n_groups)
    low_qs = row + (decode_offset(b) if one_token else 32 * place)
    high_qs = low_qs + (4 * W if one_token else 16)
    low_sum = splat_i32(0)
    high_sum = splat_i32(0)
    for i in range(0, 16, W):
        q = round_to_i32(load_f32(x + 4 * i) * inverse)
        low_sum = low_sum + q
        store_i8(low_qs + i, q)
    for i in range(0, 16, W):
        q = round_to_i32(load_f32(x + 64 + 4 * i) * inverse)
        high_sum = high_sum + q
        store_i8(high_qs + i, q)
    write_tables(row, n_groups, place, d, sum_lanes_i32(low_sum), sum_lanes_i32(high_sum))


@device
def write_tables(row, n_groups, place, d, low, high):
    """The scale of a block and what follows from the sums of its halves."""
    where = row + 4 * place
    total = low + high
    store_f32(where + n_groups * ACT_D, d)
    store_f32(where + n_groups * ACT_DS, d * np.float32(total))
    store_i32(where + n_groups * ACT_Z8, -8 * total)
    store_i32(where + n_groups * ACT_Z128, -I8_BIAS * total)
    store_i32(where + n_groups * ACT_Z32_LOW, -32 * low)
    store_i32(where + n_groups * ACT_Z32_HIGH, -32 * high)


@device
def n_groups_of(n):
    """Groups of W blocks in a row of n elements."""
    return (n // QK + W - 1) // W


@device
def activation_stride(n):
    """Bytes of one activation row of n elements."""
    return n_groups_of(n) * ACT_GROUP
