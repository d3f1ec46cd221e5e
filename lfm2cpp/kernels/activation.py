"""Activations as int8: blocks of 32 with a float32 scale, laid out for the dot products.

A row of n elements is cut into blocks of 32 and groups of W blocks, the last group padded with zeros. Block b of a group
is piece b // 4 of vector pair b % 4: its first 16 elements in the pair's low vector, the others in the high one. After
`sum_pieces` of the four pairs, lane b then holds block b's sum, in order.

    qs      groups x 4 x (low 4 W bytes, high 4 W bytes)
    d       float32 a block: the scale, max|x| / 127
    ds      float32 a block: d * sum of its integers, for types with a minimum
    z8      int32 a block: -8 * sum, what Q4_0's unsigned nibbles are too large by
    z128    int32 a block: -I8_BIAS * sum
    z32     int32, two tables: -32 * sum of the first 16 elements; of the others (Q6_K)

Source of the scheme: ggml's Q8_0, with the scale kept in float32.
"""

from __future__ import annotations

from .compiler import device
from .dot import I8_BIAS
from .scalar import store_f32, store_i32
from .simd import (
    W,
    absolute,
    load_f32,
    max_lanes,
    maximum,
    round_to_i32,
    splat_f32,
    splat_i32,
    store_i8,
    sum_lanes_i32,
)
from .widths import ACT_D, ACT_DS, ACT_GROUP, ACT_Z8, ACT_Z32_HIGH, ACT_Z32_LOW, ACT_Z128

QK = 32


@device
def block_offset(b):
    """Byte offset of block b's first 16 quantized elements; the other 16 lie 4 W further."""
    in_group = b % W
    return (b // W) * (32 * W) + (in_group % 4) * (8 * W) + (in_group // 4) * 16


@device
def quantize_block(x, row, n_groups, b):
    """Quantize the 32 float32 at x into block b of the activation row at `row`."""
    peak = absolute(load_f32(x))
    for i in range(W, QK, W):
        peak = maximum(absolute(load_f32(x + 4 * i)), peak)
    amax = max_lanes(peak)
    d = amax * (1.0 / 127.0)
    inverse = splat_f32(127.0 / amax if amax > 0.0 else 0.0)
    low_sum = splat_i32(0)
    high_sum = splat_i32(0)
    qs = row + block_offset(b)
    for i in range(0, 16, W):
        q = round_to_i32(load_f32(x + 4 * i) * inverse)
        low_sum = low_sum + q
        store_i8(qs + i, q)
    for i in range(0, 16, W):
        q = round_to_i32(load_f32(x + 64 + 4 * i) * inverse)
        high_sum = high_sum + q
        store_i8(qs + 4 * W + i, q)
    low = sum_lanes_i32(low_sum)
    high = sum_lanes_i32(high_sum)
    write_tables(row, n_groups, b, d, low, high)


@device
def write_tables(row, n_groups, b, d, low, high):
    """The scale of block b and what follows from the sums of its halves."""
    where = row + 4 * b
    total = low + high
    store_f32(where + n_groups * ACT_D, d)
    store_f32(where + n_groups * ACT_DS, d * total)
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
