"""Q4_1: 32 elements of 4 bits, a float16 scale and minimum; x = d * q + m."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32

from .blocks import make_block_scales, make_dot_affine, make_row_group
from .columns import rows_in_file, scale_and_add_block, sum_alone
from .nibbles import interleave_nibbles, make_sum_nibbles

BLOCK, BLOCK_BYTES = 32, 20
N_SCALES = 2  # and minima
OFFSET = 0
N_SUMS = 1
M, QS = 2, 4  # offsets in a block: the minimum, the nibbles
row_group, prepare_rows = make_row_group(BLOCK_BYTES), rows_in_file
dot_group = make_dot_affine(BLOCK_BYTES, M, make_sum_nibbles(BLOCK_BYTES, QS))
block_scales, finish_block = make_block_scales(BLOCK_BYTES, M), scale_and_add_block


@device
def block_columns(w, row_bytes, b):
    return interleave_nibbles(w + b * BLOCK_BYTES + QS, row_bytes)


def sum_block(tile):
    return sum_alone(tile.dot_u4_alone)


@device
def dequantize_block(w, out):
    d, m = load_f16(w), load_f16(w + M)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * (q & 15) + m)
        store_f32(out + 4 * (i + 16), d * (q >> 4) + m)
