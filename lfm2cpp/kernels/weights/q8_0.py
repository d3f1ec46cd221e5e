"""Q8_0: 32 elements of 8 bits and a float16 scale; x = d * q."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot_i8, panel_i8
from lfm2cpp.kernels.scalar import load_f16, load_i8, store_f32
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import (
    W,
    fma,
    gather_f16,
    gather_pieces,
    load_bytes,
    load_f32,
    load_i32,
    splat_i32,
    store_bytes,
    sum_pieces,
    to_f32,
)
from lfm2cpp.kernels.widths import ACT_D, ACT_Z128

from .columns import copy_f16, interleave_rows, widen_f16

BLOCK, BLOCK_BYTES = 32, 34
PANEL_BLOCK = 64 * W + 8 * W  # 32 columns of 2 W rows, their scales
RAW_SCALES = 4 * W  # bytes of them as in the file
QS = 2  # offset of the integers in a block
SCALES = 64 * W  # offset in a panel block
ask_0, ask_1, ask_2, ask_3 = make_prefetches(W * BLOCK_BYTES, 4, fast=True)


@device
def row_group(row, g):
    return row + g * (W * BLOCK_BYTES)


@device
def _dot_pair(w, a):
    """The four partial sums of each piece's block; w is where the first piece's integers start."""
    acc = dot_i8(splat_i32(0), gather_pieces(w, 4 * BLOCK_BYTES), load_bytes(a))
    return dot_i8(acc, gather_pieces(w + 16, 4 * BLOCK_BYTES), load_bytes(a + 4 * W))


@device
def dot_group(acc, w, act, n_groups, g, far):
    a = act + g * (32 * W)
    ask_0(w, far)
    s0 = _dot_pair(w + QS, a)
    ask_1(w, far)
    s1 = _dot_pair(w + QS + BLOCK_BYTES, a + 8 * W)
    ask_2(w, far)
    s2 = _dot_pair(w + QS + 2 * BLOCK_BYTES, a + 16 * W)
    ask_3(w, far)
    s3 = _dot_pair(w + QS + 3 * BLOCK_BYTES, a + 24 * W)
    tables = act + g * (4 * W)
    sums = sum_pieces(s0, s1, s2, s3) + load_i32(tables + n_groups * ACT_Z128)
    scale = gather_f16(w, BLOCK_BYTES) * load_f32(tables + n_groups * ACT_D)
    return fma(to_f32(sums), scale, acc)


@device
def copy_scales(w, row_bytes, b, raw):
    copy_f16(w + b * BLOCK_BYTES, row_bytes, raw)


@device
def unpack_block(w, row_bytes, b, raw, panel):
    rows = w + b * BLOCK_BYTES
    for half in range(2):
        out = panel + half * (4 * W)
        for part in range(2):
            pieces = rows + half * W * row_bytes + QS + 16 * part
            q = interleave_rows(pieces, row_bytes)
            for j in range(4):
                store_bytes(out + (4 * part + j) * (8 * W), panel_i8(q[j]))
    widen_f16(raw, panel + SCALES)


def finish_block(tile):
    dot, scale = tile.dot_i8, tile.scale

    @device
    def finish(f, panel, a, tables, n_groups):
        sums = dot(tables + n_groups * ACT_Z128, panel, a)
        return scale(f, sums, panel + SCALES, tables + n_groups * ACT_D)

    return finish


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(32):
        store_f32(out + 4 * i, d * load_i8(w + QS + i))
