"""Q4_0: 32 elements of 4 bits and a float16 scale; x = d * (q - 8)."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot_u7
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32
from lfm2cpp.kernels.simd import (
    W,
    fma,
    gather_f16,
    gather_pieces,
    high_nibbles,
    load_bytes,
    load_f32,
    load_i32,
    low_nibbles,
    make_gather_f16,
    splat_i32,
    store_bytes,
    sum_pieces_small,
    to_f32,
    transpose_4,
)
from lfm2cpp.kernels.simd import store_f32 as store_vector
from lfm2cpp.kernels.widths import ACT_D, ACT_Z8

BLOCK, BLOCK_BYTES = 32, 18
PANEL_BLOCK = 64 * W + 8 * W  # 32 columns of 2 W rows, their scales
QS = 2  # offset of the nibbles in a block: low ones are elements 0..15, high ones 16..31
gather_scales = make_gather_f16(BLOCK_BYTES)


@device
def row_group(row, g):
    return row + g * (W * BLOCK_BYTES)


@device
def _dot_pair(q, a):
    """The four partial sums of each piece's block."""
    return dot_u7(dot_u7(splat_i32(0), low_nibbles(q), load_bytes(a)), high_nibbles(q), load_bytes(a + 4 * W))


@device
def dot_group(acc, w, act, n_groups, g):
    a = act + g * (32 * W)
    s0 = _dot_pair(gather_pieces(w + QS, 4 * BLOCK_BYTES), a)
    s1 = _dot_pair(gather_pieces(w + QS + BLOCK_BYTES, 4 * BLOCK_BYTES), a + 8 * W)
    s2 = _dot_pair(gather_pieces(w + QS + 2 * BLOCK_BYTES, 4 * BLOCK_BYTES), a + 16 * W)
    s3 = _dot_pair(gather_pieces(w + QS + 3 * BLOCK_BYTES, 4 * BLOCK_BYTES), a + 24 * W)
    tables = act + g * (4 * W)
    sums = sum_pieces_small(s0, s1, s2, s3) + load_i32(tables + n_groups * ACT_Z8)
    scale = gather_scales(w) * load_f32(tables + n_groups * ACT_D)
    return fma(to_f32(sums), scale, acc)


@device
def unpack_block(w, row_bytes, b, panel):
    for half in range(2):
        rows = w + b * BLOCK_BYTES + half * W * row_bytes
        q = transpose_4(
            gather_pieces(rows + QS, 4 * row_bytes),
            gather_pieces(rows + QS + row_bytes, 4 * row_bytes),
            gather_pieces(rows + QS + 2 * row_bytes, 4 * row_bytes),
            gather_pieces(rows + QS + 3 * row_bytes, 4 * row_bytes),
        )
        out = panel + half * (4 * W)
        for j in range(4):
            store_bytes(out + j * (8 * W), low_nibbles(q[j]))
            store_bytes(out + (4 + j) * (8 * W), high_nibbles(q[j]))
        store_vector(out + 64 * W, gather_f16(rows, row_bytes))


def finish_block(tile):
    start, dot, scale = tile.start, tile.dot_u7, tile.scale

    @device
    def finish(f, panel, a, tables, n_groups, stride):
        acc = dot(start(tables + n_groups * ACT_Z8, stride), panel, a, stride)
        return scale(f, acc, panel + 64 * W, tables + n_groups * ACT_D, stride)

    return finish


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * ((q & 15) - 8))
        store_f32(out + 4 * (i + 16), d * ((q >> 4) - 8))
