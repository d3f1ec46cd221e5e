"""Q6_K: 256 elements of 6 bits; 16 int8 scales and one float16; x = d * scale * (q - 32).

A block holds two halves of 128 elements. In half h, element 32 * quarter + l (l < 32) has its low four bits in nibble
quarter // 2 of ql[64 h + 32 (quarter % 2) + l] and its high two in bits 2 * quarter of qh[32 h + l]. A block of 32
columns is thus one quarter: two runs of 16, each with a scale of its own, and their sum is an exact integer.
"""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot_u7
from lfm2cpp.kernels.dot_tile import HALF
from lfm2cpp.kernels.scalar import load_f16, load_i8, load_u8, store_f32
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import (
    W,
    fma,
    gather_i8_pairs,
    gather_pieces_2,
    high_nibbles,
    load_bytes,
    load_f32,
    load_i32,
    low_nibbles,
    repeat_f16,
    splat_i32,
    splat_u8,
    store_bytes,
    sum_pieces_i16,
    to_f32,
)
from lfm2cpp.kernels.widths import ACT_D, ACT_Z32_HIGH, ACT_Z32_LOW

from .columns import copy_f16, copy_i8, interleave_rows, widen_f16, widen_i8

BLOCK, BLOCK_BYTES = 256, 210
PANEL_BLOCK = 64 * W + 24 * W  # 32 columns of 2 W rows, scales of each 16, d
RAW_SCALES = 8 * W  # bytes of them as in the file
QH, SCALES, D = 128, 192, 208  # offsets in a block; ql is at 0
LOW_SCALES, HIGH_SCALES, PANEL_D = 64 * W, 72 * W, 80 * W  # offsets in a panel block
ask_0, ask_1, ask_2, ask_3 = make_prefetches(max(1, W // 8) * BLOCK_BYTES, 4, fast=True)


@device
def row_group(row, g):
    """For W = 4 a group is half a block; its address is the block's, offset as ql's half is."""
    return row + (g * W // 8) * BLOCK_BYTES


@device
def _bits(ql, qh, quarter):
    """The 6-bit integers of one quarter from its bytes; quarter is 0..3."""
    low = low_nibbles(ql) if quarter < 2 else high_nibbles(ql)
    return low | (((qh >> (2 * quarter)) & splat_u8(3)) << 4)


@device
def dot_group(acc, w, act, n_groups, g, far):
    half = (g * W // 4) % 2  # 1 only for W = 4, the second half of a block
    ql, qh, scales = w + 64 * half, w + QH + 32 * half, w + SCALES + 8 * half
    a = act + g * (32 * W)
    h0 = gather_pieces_2(qh, 32, BLOCK_BYTES)
    h1 = gather_pieces_2(qh + 16, 32, BLOCK_BYTES)
    l0 = gather_pieces_2(ql, 64, BLOCK_BYTES)
    l1 = gather_pieces_2(ql + 16, 64, BLOCK_BYTES)
    l2 = gather_pieces_2(ql + 32, 64, BLOCK_BYTES)
    l3 = gather_pieces_2(ql + 48, 64, BLOCK_BYTES)
    zero = splat_i32(0)
    ask_0(w, far)
    low0 = dot_u7(zero, _bits(l0, h0, 0), load_bytes(a))
    low1 = dot_u7(zero, _bits(l2, h0, 1), load_bytes(a + 8 * W))
    ask_1(w, far)
    low2 = dot_u7(zero, _bits(l0, h0, 2), load_bytes(a + 16 * W))
    low3 = dot_u7(zero, _bits(l2, h0, 3), load_bytes(a + 24 * W))
    ask_2(w, far)
    low = sum_pieces_i16(low0, low1, low2, low3)  # 4 products of at most 63 * 127 each
    high0 = dot_u7(zero, _bits(l1, h1, 0), load_bytes(a + 4 * W))
    high1 = dot_u7(zero, _bits(l3, h1, 1), load_bytes(a + 12 * W))
    ask_3(w, far)
    high2 = dot_u7(zero, _bits(l1, h1, 2), load_bytes(a + 20 * W))
    high3 = dot_u7(zero, _bits(l3, h1, 3), load_bytes(a + 28 * W))
    high = sum_pieces_i16(high0, high1, high2, high3)
    tables = act + g * (4 * W)
    low = low + load_i32(tables + n_groups * ACT_Z32_LOW)
    high = high + load_i32(tables + n_groups * ACT_Z32_HIGH)
    low_scales, high_scales = gather_i8_pairs(scales, BLOCK_BYTES)
    sums = low * low_scales + high * high_scales
    scale = repeat_f16(w + D, BLOCK_BYTES) * load_f32(tables + n_groups * ACT_D)
    return fma(to_f32(sums), scale, acc)


@device
def _unpack_16(rows, row_bytes, ql, qh, quarter, out):
    """16 columns of W rows: ql and qh are offsets of their bytes in the block."""
    lows = interleave_rows(rows + ql, row_bytes)
    highs = interleave_rows(rows + qh, row_bytes)
    for j in range(4):
        store_bytes(out + j * (8 * W), _bits(lows[j], highs[j], quarter))


@device
def copy_scales(w, row_bytes, b, raw):
    block = w + (b // 8) * BLOCK_BYTES
    scales = block + SCALES + 2 * (b % 8)
    copy_f16(block + D, row_bytes, raw)
    copy_i8(scales, row_bytes, raw + 4 * W)
    copy_i8(scales + 1, row_bytes, raw + 6 * W)


@device
def unpack_block(w, row_bytes, b, raw, panel):
    block = w + (b // 8) * BLOCK_BYTES
    half, quarter = (b // 4) % 2, b % 4
    ql, qh = 64 * half + 32 * (quarter % 2), QH + 32 * half
    for side in range(2):
        rows = block + side * W * row_bytes
        out = panel + side * (4 * W)
        _unpack_16(rows, row_bytes, ql, qh, quarter, out)
        _unpack_16(rows, row_bytes, ql + 16, qh + 16, quarter, out + 32 * W)
    widen_f16(raw, panel + PANEL_D)
    widen_i8(raw + 4 * W, panel + LOW_SCALES)
    widen_i8(raw + 6 * W, panel + HIGH_SCALES)


def finish_block(tile):
    dot, scale_halves = tile.dot_u6_half, tile.scale_halves

    @device
    def finish(f, panel, a, tables, n_groups):
        low = dot(tables + n_groups * ACT_Z32_LOW, panel, a)
        high = dot(tables + n_groups * ACT_Z32_HIGH, panel + 32 * W, a + HALF)
        factors, scales = panel + LOW_SCALES, panel + PANEL_D  # sums are exact: below 2**24
        return scale_halves(f, low, factors, high, panel + HIGH_SCALES, scales, tables + n_groups * ACT_D)

    return finish


@device
def dequantize_block(w, out):
    d = load_f16(w + D)
    for half in range(2):
        for quarter in range(4):
            for i in range(32):
                bits = load_u8(w + 64 * half + 32 * (quarter % 2) + i) >> (4 * (quarter // 2))
                high = load_u8(w + QH + 32 * half + i) >> (2 * quarter)
                q = (bits & 15) | ((high & 3) << 4)
                element = 128 * half + 32 * quarter + i
                scale = d * load_i8(w + SCALES + element // 16)
                store_f32(out + 4 * element, scale * (q - 32))
