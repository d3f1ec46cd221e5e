"""Q5_K: 256 elements of 5 bits in eight sub-blocks (sub_blocks.py); x = (d * scale) * q - dmin * min.

Bit j of byte i of qh is the fifth bit of element i of sub-block j.
"""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot2_u6
from lfm2cpp.kernels.scalar import load_u8
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import (
    W,
    load_bytes,
    make_bits_by_piece,
    make_gather_halves,
    splat_i32,
    splat_u8,
    sum_pieces_i16,
)

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

BLOCK, BLOCK_BYTES = 256, 176
N_SCALES = 2  # and minima
OFFSET = 0
N_SUMS = 1
QH, QS = 16, 48  # offsets in a block: the fifth bits, the nibbles
PREPARED, PREPARED_QS = prepared_bytes(BLOCK_BYTES), QS - QH
ask_0, ask_1, ask_2, ask_3 = make_prefetches(max(1, W // 8) * BLOCK_BYTES, 4)
row_group, add_group = make_row_group(BLOCK_BYTES), make_add_group(BLOCK_BYTES)
prepare_rows, block_scales = make_prepare(BLOCK_BYTES)
finish_block = scale_and_add_block


@device
def _levels(qs, qh, j):
    """Sub-block j's levels from its bytes and those of which bit j is the fifth one"""
    return nibbles_of(qs, j) | (((qh >> j) & splat_u8(1)) << 4)


columns = make_columns(_levels)


def _make_dot(sub_blocks):
    gather = make_gather_quarters(sub_blocks, BLOCK_BYTES)
    gather_fifth = make_gather_halves([block * BLOCK_BYTES for block, _, _ in sub_blocks])
    fifth = make_bits_by_piece([4 * half + quarter for _, half, quarter in sub_blocks], 1, 4)

    @device
    def dot(w, half, a):
        """Four partial sums of each of the sub-blocks; half: half_of_group"""
        first, second = gather(w + QS + 64 * half)
        qh_first, qh_second = gather_fifth(w + QH)
        if W == 4:
            qh_first, qh_second = qh_first >> (4 * half), qh_second >> (4 * half)
        first, second = first | fifth(qh_first), second | fifth(qh_second)
        return dot2_u6(splat_i32(0), first, load_bytes(a), second, load_bytes(a + 4 * W))

    return dot


dot_0, dot_1, dot_2, dot_3 = (_make_dot(sub_blocks) for sub_blocks in VECTORS)


@device
def dot_group(acc, w, act, n_groups, g, far):
    half, a = half_of_group(g), act + g * (32 * W)
    ask_0(w, far)
    s0 = dot_0(w, half, a)
    ask_1(w, far)
    s1 = dot_1(w, half, a + 8 * W)
    ask_2(w, far)
    s2 = dot_2(w, half, a + 16 * W)
    ask_3(w, far)
    s3 = dot_3(w, half, a + 24 * W)
    sums = sum_pieces_i16(s0, s1, s2, s3)  # 8 products of at most 31 * 127 each
    return add_group(acc, sums, w, act, n_groups, g)


@device
def block_columns(rows, _, b):
    block, j = rows + b // 8 * (PREPARED * W), b % 8
    qs = block + (PREPARED_QS + j // 2 * 32) * W
    return columns(qs, block, j)


def sum_block(tile):
    return sum_alone(tile.dot_u5_alone)


@device
def _level(w, j, i):
    return nibble_at(w + QS, j, i) | (((load_u8(w + QH + i) >> j) & 1) << 4)


dequantize_block = make_dequantize_block(_level)
