"""Q4_K: 256 elements of 4 bits in eight sub-blocks (sub_blocks.py); x = (d * scale) * q - dmin * min."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot2_u6
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import (
    W,
    gather_pieces_2,
    high_nibbles,
    load_bytes,
    low_nibbles,
    splat_i32,
    sum_pieces_small,
)

from .columns import make_columns, scale_and_add_block, sum_alone
from .sub_blocks import (
    half_of_group,
    make_add_group,
    make_dequantize_block,
    make_prepare,
    make_row_group,
    nibble_at,
    nibbles_of,
    prepared_bytes,
)

BLOCK, BLOCK_BYTES = 256, 144
N_SCALES = 2  # and minima
OFFSET = 0
N_SUMS = 1
QS = 16  # offset of the nibbles in a block
PREPARED = prepared_bytes(BLOCK_BYTES)
ask_0, ask_1, ask_2, ask_3 = make_prefetches(max(1, W // 8) * BLOCK_BYTES, 4)
row_group, add_group = make_row_group(BLOCK_BYTES), make_add_group(BLOCK_BYTES)
prepare_rows, block_scales = make_prepare(BLOCK_BYTES)
finish_block = scale_and_add_block


@device
def dot_group(acc, w, act, n_groups, g, far):
    qs, a, zero = w + QS + 64 * half_of_group(g), act + g * (32 * W), splat_i32(0)
    q0, q1 = gather_pieces_2(qs, 64, BLOCK_BYTES), gather_pieces_2(qs + 16, 64, BLOCK_BYTES)
    ask_0(w, far)
    s0 = dot2_u6(zero, low_nibbles(q0), load_bytes(a), low_nibbles(q1), load_bytes(a + 4 * W))
    ask_1(w, far)
    s1 = dot2_u6(zero, high_nibbles(q0), load_bytes(a + 8 * W), high_nibbles(q1), load_bytes(a + 12 * W))
    q2, q3 = gather_pieces_2(qs + 32, 64, BLOCK_BYTES), gather_pieces_2(qs + 48, 64, BLOCK_BYTES)
    ask_2(w, far)
    s2 = dot2_u6(zero, low_nibbles(q2), load_bytes(a + 16 * W), low_nibbles(q3), load_bytes(a + 20 * W))
    ask_3(w, far)
    s3 = dot2_u6(zero, high_nibbles(q2), load_bytes(a + 24 * W), high_nibbles(q3), load_bytes(a + 28 * W))
    sums = sum_pieces_small(s0, s1, s2, s3)  # of two lanes: 2 * 8 * 15 * 127 fits 16 bits
    return add_group(acc, sums, w, act, n_groups, g)


@device
def _levels(qs, _, j):
    """There are no high bits: both are the nibbles"""
    return nibbles_of(qs, j)


columns = make_columns(_levels)


@device
def block_columns(rows, _, b):
    qs = rows + b // 8 * (PREPARED * W) + b // 2 % 4 * (32 * W)
    return columns(qs, qs, b)


def sum_block(tile):
    return sum_alone(tile.dot_u4_alone)


@device
def _level(w, j, i):
    return nibble_at(w + QS, j, i)


dequantize_block = make_dequantize_block(_level)
