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
    high_nibbles,
    i8_of_lanes,
    load_bytes,
    load_f32,
    load_i32,
    low_nibbles,
    make_bits_by_piece,
    make_gather_halves,
    make_gather_nibbles,
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
from .sub_blocks import VECTORS, half_of_group, make_row_group

BLOCK, BLOCK_BYTES = 256, 210
N_SCALES = 3  # d, and the scales of each 16
OFFSET = 32
N_SUMS = 2
PREPARED = 212  # bytes a row of a block that prepare_rows has laid out: d is float32
QH, SCALES, D = 128, 192, 208  # offsets in a block; ql is at 0
ask_0, ask_1, ask_2, ask_3 = make_prefetches(max(1, W // 8) * BLOCK_BYTES, 4)
store_quads = make_store_apart(4, bytes_)
row_group = make_row_group(BLOCK_BYTES)


@device
def _bits(ql, qh, quarter):
    """The 6-bit integers of one quarter from its bytes; quarter is 0..3."""
    low = low_nibbles(ql) if quarter < 2 else high_nibbles(ql)
    return low | (((qh >> (2 * quarter)) & splat_u8(3)) << 4)


columns = make_columns(_bits)


def _make_dot(quarters):
    places = [block * BLOCK_BYTES + 64 * half + quarter % 2 * 32 for block, half, quarter in quarters]
    gather = make_gather_nibbles(places, [quarter // 2 for _, _, quarter in quarters])
    gather_high = make_gather_halves([block * BLOCK_BYTES + 32 * half for block, half, _ in quarters])
    high_bits = make_bits_by_piece([2 * quarter for _, _, quarter in quarters], 3, 4)

    @device
    def dot(ql, qh, a):
        """Four partial sums of the first 16 of each of these quarters, and of the others"""
        first, second = gather(ql)
        qh_first, qh_second = gather_high(qh)
        first, second = first | high_bits(qh_first), second | high_bits(qh_second)
        return dot_u7(splat_i32(0), first, load_bytes(a)), dot_u7(splat_i32(0), second, load_bytes(a + 4 * W))

    return dot


dot_0, dot_1, dot_2, dot_3 = (_make_dot(quarters) for quarters in VECTORS)


@device
def dot_group(acc, w, act, n_groups, g, far):
    half, a = half_of_group(g), act + g * (32 * W)
    ql, qh, scales = w + 64 * half, w + QH + 32 * half, w + SCALES + 8 * half
    ask_0(w, far)
    low_0, high_0 = dot_0(ql, qh, a)
    ask_1(w, far)
    low_1, high_1 = dot_1(ql, qh, a + 8 * W)
    ask_2(w, far)
    low_2, high_2 = dot_2(ql, qh, a + 16 * W)
    ask_3(w, far)
    low_3, high_3 = dot_3(ql, qh, a + 24 * W)
    low = sum_pieces_i16(low_0, low_1, low_2, low_3)  # 4 products of at most 63 * 127 each
    high = sum_pieces_i16(high_0, high_1, high_2, high_3)
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
