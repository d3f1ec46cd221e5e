"""Q5_1: 32 elements of 5 bits, a float16 scale and minimum; x = d * q + m."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f16, store_f32

from .blocks import make_block_scales, make_dot_affine, make_row_group
from .columns import rows_in_file, scale_and_add_block, sum_alone
from .fives import interleave_fives, level_at, make_sum_fives

BLOCK, BLOCK_BYTES = 32, 24
N_SCALES = 2  # and minima
OFFSET = 0
N_SUMS = 1
M, QH = 2, 4  # offsets in a block: the minimum, the fifth bits
row_group, prepare_rows = make_row_group(BLOCK_BYTES), rows_in_file
dot_group = make_dot_affine(BLOCK_BYTES, M, make_sum_fives(BLOCK_BYTES, QH))
block_scales, finish_block = make_block_scales(BLOCK_BYTES, M), scale_and_add_block


@device
def block_columns(w, row_bytes, b):
    return interleave_fives(w + b * BLOCK_BYTES + QH, row_bytes)


def sum_block(tile):
    return sum_alone(tile.dot_u5_alone)


@device
def dequantize_block(w, out):
    d, m = load_f16(w), load_f16(w + M)
    for i in range(32):
        store_f32(out + 4 * i, d * level_at(w + QH, i) + m)
