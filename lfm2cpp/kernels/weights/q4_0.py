"""Q4_0: 32 elements of 4 bits and a float16 scale; x = d * (q - 8)."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32
from lfm2cpp.kernels.simd import W, fma, load_f32, load_i32, make_gather_f16, to_f32
from lfm2cpp.kernels.widths import ACT_D, ACT_Z8

from .columns import copy_f16, widen_f16
from .nibbles import make_sum_nibbles, unpack_nibbles

BLOCK, BLOCK_BYTES = 32, 18
PANEL_BLOCK = 64 * W + 8 * W  # 32 columns of 2 W rows, their scales
RAW_SCALES = 4 * W  # bytes of them as in the file
QS = 2  # offset of the nibbles in a block
SCALES = 64 * W  # offset in a panel block
gather_scales = make_gather_f16(BLOCK_BYTES)
sum_nibbles = make_sum_nibbles(BLOCK_BYTES)


@device
def row_group(row, g):
    return row + g * (W * BLOCK_BYTES)


@device
def dot_group(acc, w, act, n_groups, g, far):
    tables = act + g * (4 * W)
    sums = sum_nibbles(w + QS, act + g * (32 * W), far) + load_i32(tables + n_groups * ACT_Z8)
    scale = gather_scales(w) * load_f32(tables + n_groups * ACT_D)
    return fma(to_f32(sums), scale, acc)


@device
def copy_scales(w, row_bytes, b, raw):
    copy_f16(w + b * BLOCK_BYTES, row_bytes, raw)


@device
def unpack_block(w, row_bytes, b, raw, panel):
    rows = w + b * BLOCK_BYTES
    for half in range(2):
        unpack_nibbles(rows + half * W * row_bytes + QS, row_bytes, panel + half * (4 * W))
    widen_f16(raw, panel + SCALES)


def finish_block(tile):
    dot, scale = tile.dot_u4, tile.scale

    @device
    def finish(f, panel, a, tables, n_groups):
        sums = dot(tables + n_groups * ACT_Z8, panel, a)
        return scale(f, sums, panel + SCALES, tables + n_groups * ACT_D)

    return finish


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * ((q & 15) - 8))
        store_f32(out + 4 * (i + 16), d * ((q >> 4) - 8))
