"""Q4_1: 32 elements of 4 bits, a float16 scale and minimum; x = d * q + m."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32
from lfm2cpp.kernels.simd import W, fma, gather_f16, load_f32, make_gather_f16, to_f32
from lfm2cpp.kernels.widths import ACT_D, ACT_DS

from .columns import rows_in_file, scale_and_add_block, sum_alone
from .nibbles import interleave_nibbles, make_sum_nibbles

BLOCK, BLOCK_BYTES = 32, 20
N_SCALES = 2  # and minima
OFFSET = 0
N_SUMS = 1
M, QS = 2, 4  # offsets in a block: the minimum, the nibbles
gather_scales, gather_minima = make_gather_f16(BLOCK_BYTES, 0), make_gather_f16(BLOCK_BYTES, M)
sum_nibbles = make_sum_nibbles(BLOCK_BYTES, QS)
prepare_rows, finish_block = rows_in_file, scale_and_add_block


@device
def row_group(row, g):
    return row + g * (W * BLOCK_BYTES)


@device
def dot_group(acc, w, act, n_groups, g, far):
    tables = act + g * (4 * W)
    scale = gather_scales(w) * load_f32(tables + n_groups * ACT_D)
    acc = fma(to_f32(sum_nibbles(w, act + g * (32 * W), far)), scale, acc)
    return fma(gather_minima(w), load_f32(tables + n_groups * ACT_DS), acc)


@device
def block_columns(w, row_bytes, b):
    return interleave_nibbles(w + b * BLOCK_BYTES + QS, row_bytes)


@device
def block_scales(w, row_bytes, b):
    block = w + b * BLOCK_BYTES
    return gather_f16(block, row_bytes), gather_f16(block + M, row_bytes)


def sum_block(tile):
    return sum_alone(tile.dot_u4_alone)


@device
def dequantize_block(w, out):
    d, m = load_f16(w), load_f16(w + M)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * (q & 15) + m)
        store_f32(out + 4 * (i + 16), d * (q >> 4) + m)
