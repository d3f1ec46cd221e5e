"""Q6_K: 256 elements of 6 bits; 16 int8 scales and one float16; x = d * scale * (q - 32).

A block holds two halves of 128 elements. In half h, element 32 * quarter + l (l < 32) has its low four bits in nibble
quarter // 2 of ql[64 h + 32 (quarter % 2) + l] and its high two in bits 2 * quarter of qh[32 h + l]. A block of 32
columns is thus one quarter: two runs of 16, each with a scale of its own, and their sum is an exact integer.
"""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot_u7
from lfm2cpp.kernels.dot_tile import HALF
from lfm2cpp.kernels.scalar import load_f16, load_i8, load_u8
from lfm2cpp.kernels.scalar import store_f32 as store_scalar
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import (
    W,
    bytes_,
    fma,
    gather_f16,
    gather_i8_pairs,
    gather_pieces_2,
    high_nibbles,
    i8_of_lanes,
    load_bytes,
    load_f32,
    load_i32,
    low_nibbles,
    make_store_apart,
    repeat_f16,
    splat_i32,
    splat_u8,
    store_f32,
    sum_pieces_i16,
    to_f32,
)
from lfm2cpp.kernels.widths import ACT_D, ACT_GROUP, ACT_Z32_HIGH, ACT_Z32_LOW, PANEL_SUMS

from .columns import interleave_columns, interleave_rows, make_columns
from .sub_blocks import half_of_group, make_row_group

BLOCK, BLOCK_BYTES = 256, 210
N_SCALES = 3  # d, and the scales of each 16
OFFSET = 32
N_SUMS = 2
PREPARED = 212  # bytes a row of a block that prepare_rows has laid out: d is float32
QH, SCALES, D = 128, 192, 208  # offsets in a block; ql is at 0
ask_0, ask_1, ask_2, ask_3 = make_prefetches(max(1, W // 8) * BLOCK_BYTES, 4, fast=True)
store_quads = make_store_apart(4, bytes_)
row_group = make_row_group(BLOCK_BYTES)


@device
def _bits(ql, qh, quarter):
    """The 6-bit integers of one quarter from its bytes; quarter is 0..3."""
    low = low_nibbles(ql) if quarter < 2 else high_nibbles(ql)
    return low | (((qh >> (2 * quarter)) & splat_u8(3)) << 4)


columns = make_columns(_bits)


@device
def dot_group(acc, w, act, n_groups, g, far):
    half = half_of_group(g)
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
def prepare_rows(w, row_bytes, n_blocks, room):
    """The rows' bytes side by side, block after block: up to four blocks of 32 columns use the same ones"""
    for i in range(n_blocks // 8):
        block, out = w + i * BLOCK_BYTES, room + i * (PREPARED * W)
        for piece in range(0, SCALES, 16):
            store_quads(out + piece * W, 4 * W, interleave_rows(block + piece, row_bytes))
        store_quads(out + SCALES * W, 4 * W, interleave_columns(block + SCALES, row_bytes))
        store_f32(out + D * W, gather_f16(block + D, row_bytes))
    return room


@device
def block_columns(rows, _, b):
    block, half, quarter = rows + b // 8 * (PREPARED * W), b // 4 % 2, b % 4
    low, high = block + (64 * half + 32 * (quarter % 2)) * W, block + (QH + 32 * half) * W
    return columns(low, high, quarter)


@device
def block_scales(rows, _, b):
    block, pair = rows + b // 8 * (PREPARED * W), b % 8
    low, high = i8_of_lanes(load_i32(block + (SCALES + pair // 2 * 4) * W), 2 * (pair % 2))
    return load_f32(block + D * W), low, high


def sum_block(tile):
    dot_low, dot_high = tile.dot_u6_low, tile.dot_u6_high

    @device
    def sums(q, a, tables, table_step, room):
        next_tile = table_step * ACT_GROUP
        low = dot_low(tables + table_step * ACT_Z32_LOW, q, a, next_tile, room)
        high = dot_high(tables + table_step * ACT_Z32_HIGH, q, a + HALF, next_tile, room + PANEL_SUMS)
        return low, high

    return sums


def finish_block(tile):
    scale_halves = tile.scale_halves

    @device
    def finish(f, sums, scales, tables, table_step):
        low, high = sums  # exact as float32: below 2**24
        d, next_tile = tables + table_step * ACT_D, table_step * ACT_GROUP
        return scale_halves(f, low, scales[1], high, scales[2], scales[0], d, next_tile)

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
                store_scalar(out + 4 * element, scale * (q - 32))
