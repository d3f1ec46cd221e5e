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
    gather_pieces_2,
    load_bytes,
    nibbles_by_piece,
    splat_i32,
    splat_u8,
    sum_pieces_i16,
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


@device
def _dot(q0, q1, h0, h1, j, a):
    """Sub-block j of every piece's half block: 8 products a lane"""
    low, high = _levels(q0, h0, j), _levels(q1, h1, j)
    return dot2_u6(splat_i32(0), low, load_bytes(a), high, load_bytes(a + 4 * W))


@device
def dot_group(acc, w, act, n_groups, g, far):
    half = half_of_group(g)
    qh, qs, a = w + QH, w + QS + 64 * half, act + g * (32 * W)
    # The fifth bits of a half's four sub-blocks, in the low four bits of every byte.
    h0 = nibbles_by_piece(gather_pieces_2(qh, 0, BLOCK_BYTES) >> (4 * half))
    h1 = nibbles_by_piece(gather_pieces_2(qh + 16, 0, BLOCK_BYTES) >> (4 * half))
    q0, q1 = gather_pieces_2(qs, 64, BLOCK_BYTES), gather_pieces_2(qs + 16, 64, BLOCK_BYTES)
    ask_0(w, far)
    s0 = _dot(q0, q1, h0, h1, 0, a)
    ask_1(w, far)
    s1 = _dot(q0, q1, h0, h1, 1, a + 8 * W)
    q2, q3 = gather_pieces_2(qs + 32, 64, BLOCK_BYTES), gather_pieces_2(qs + 48, 64, BLOCK_BYTES)
    ask_2(w, far)
    s2 = _dot(q2, q3, h0, h1, 2, a + 16 * W)
    ask_3(w, far)
    s3 = _dot(q2, q3, h0, h1, 3, a + 24 * W)
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
