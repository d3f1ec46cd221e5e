"""Q4_K: 256 elements of 4 bits in eight sub-blocks (sub_blocks.py); x = (d * scale) * q - dmin * min."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot2_u6
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import W, load_bytes, splat_i32, sum_pieces_small

from .columns import make_columns, scale_and_add_block, sum_alone
from .sub_blocks import (
    VECTORS,
    half_of_group,
    make_add_group,
    make_dequantize_block,
    make_gather_quarters,
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


def _make_dot(sub_blocks):
    gather = make_gather_quarters(sub_blocks, BLOCK_BYTES)

    @device
    def dot(qs, a):
        """Four partial sums of each of the sub-blocks; qs: where the group's nibbles begin"""
        first, second = gather(qs)
        return dot2_u6(splat_i32(0), first, load_bytes(a), second, load_bytes(a + 4 * W))

    return dot


dot_0, dot_1, dot_2, dot_3 = (_make_dot(sub_blocks) for sub_blocks in VECTORS)


@device
def dot_group(acc, w, act, n_groups, g, far):
    qs, a = w + QS + 64 * half_of_group(g), act + g * (32 * W)
    ask_0(w, far)
    s0 = dot_0(qs, a)
    ask_1(w, far)
    s1 = dot_1(qs, a + 8 * W)
    ask_2(w, far)
    s2 = dot_2(qs, a + 16 * W)
    ask_3(w, far)
    s3 = dot_3(qs, a + 24 * W)
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
