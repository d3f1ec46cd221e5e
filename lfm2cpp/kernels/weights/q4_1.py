"""Q4_1: 32 elements of 4 bits, a float16 scale and minimum; x = d * q + m."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32
from lfm2cpp.kernels.simd import W, fma, load_f32, make_gather_f16, to_f32
from lfm2cpp.kernels.widths import ACT_D, ACT_DS

from .columns import copy_f16, widen_f16
from .nibbles import make_sum_nibbles, unpack_nibbles

BLOCK, BLOCK_BYTES = 32, 20
PANEL_BLOCK = 64 * W + 16 * W  # 32 columns of 2 W rows, their scales, their minima
RAW_SCALES = 8 * W  # bytes of them as in the file
M, QS = 2, 4  # offsets in a block: the minimum, the nibbles
SCALES, MINIMA = 64 * W, 72 * W  # offsets in a panel block
gather_scales = make_gather_f16(BLOCK_BYTES)
sum_nibbles = make_sum_nibbles(BLOCK_BYTES)


@device
def row_group(row, g):
    return row + g * (W * BLOCK_BYTES)


@device
def dot_group(acc, w, act, n_groups, g, far):
    tables = act + g * (4 * W)
    scale = gather_scales(w) * load_f32(tables + n_groups * ACT_D)
    acc = fma(to_f32(sum_nibbles(w + QS, act + g * (32 * W), far)), scale, acc)
    return fma(gather_scales(w + M), load_f32(tables + n_groups * ACT_DS), acc)


@device
def copy_scales(w, row_bytes, b, raw):
    copy_f16(w + b * BLOCK_BYTES, row_bytes, raw)
    copy_f16(w + b * BLOCK_BYTES + M, row_bytes, raw + 4 * W)


@device
def unpack_block(w, row_bytes, b, raw, panel):
    rows = w + b * BLOCK_BYTES
    for half in range(2):
        unpack_nibbles(rows + half * W * row_bytes + QS, row_bytes, panel + half * (4 * W))
    widen_f16(raw, panel + SCALES)
    widen_f16(raw + 4 * W, panel + MINIMA)


def finish_block(tile):
    dot, scale_and_add = tile.dot_u4_alone, tile.scale_and_add

    @device
    def finish(f, panel, a, tables, n_groups):
        d, ds = tables + n_groups * ACT_D, tables + n_groups * ACT_DS
        return scale_and_add(f, dot(panel, a), panel + SCALES, d, panel + MINIMA, ds)

    return finish


@device
def dequantize_block(w, out):
    d, m = load_f16(w), load_f16(w + M)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * (q & 15) + m)
        store_f32(out + 4 * (i + 16), d * (q >> 4) + m)
