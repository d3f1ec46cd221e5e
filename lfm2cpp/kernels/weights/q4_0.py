"""Q4_0: 32 elements of 4 bits and a float16 scale; x = d * (q - 8)."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32
from lfm2cpp.kernels.simd import W, fma, gather_f16, load_f32, load_i32, make_gather_f16, to_f32
from lfm2cpp.kernels.widths import ACT_D, ACT_GROUP, ACT_Z8

from .columns import rows_in_file, scale_block
from .nibbles import interleave_nibbles, make_sum_nibbles

BLOCK, BLOCK_BYTES = 32, 18
N_SCALES = 1
OFFSET = 8
N_SUMS = 1
QS = 2  # offset of the nibbles in a block
gather_scales = make_gather_f16(BLOCK_BYTES, 0)
sum_nibbles = make_sum_nibbles(BLOCK_BYTES, QS)
prepare_rows, finish_block = rows_in_file, scale_block


@device
def row_group(row, g):
    return row + g * (W * BLOCK_BYTES)


@device
def dot_group(acc, w, act, n_groups, g, far):
    tables = act + g * (4 * W)
    sums = sum_nibbles(w, act + g * (32 * W), far) + load_i32(tables + n_groups * ACT_Z8)
    scale = gather_scales(w) * load_f32(tables + n_groups * ACT_D)
    return fma(to_f32(sums), scale, acc)


@device
def block_columns(w, row_bytes, b):
    return interleave_nibbles(w + b * BLOCK_BYTES + QS, row_bytes)


@device
def block_scales(w, row_bytes, b):
    return (gather_f16(w + b * BLOCK_BYTES, row_bytes),)


def sum_block(tile):
    dot = tile.dot_u4

    @device
    def sums(q, a, tables, table_step, room):
        return (dot(tables + table_step * ACT_Z8, q, a, table_step * ACT_GROUP, room),)

    return sums


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * ((q & 15) - 8))
        store_f32(out + 4 * (i + 16), d * ((q >> 4) - 8))
