"""Q4_0: 32 elements of 4 bits and a float16 scale; x = d * (q - 8)."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32
from lfm2cpp.kernels.widths import ACT_Z8

from .blocks import make_block_scales, make_dot_scaled, make_row_group, make_sum_block
from .columns import rows_in_file, scale_block
from .nibbles import interleave_nibbles, make_sum_nibbles

BLOCK, BLOCK_BYTES = 32, 18
N_SCALES = 1
OFFSET = 8
N_SUMS = 1
QS = 2  # offset of the nibbles in a block
row_group, prepare_rows = make_row_group(BLOCK_BYTES), rows_in_file
dot_group = make_dot_scaled(BLOCK_BYTES, make_sum_nibbles(BLOCK_BYTES, QS), ACT_Z8)
block_scales, sum_block, finish_block = make_block_scales(BLOCK_BYTES), make_sum_block("dot_u4", ACT_Z8), scale_block


@device
def block_columns(w, row_bytes, b):
    return interleave_nibbles(w + b * BLOCK_BYTES + QS, row_bytes)


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * ((q & 15) - 8))
        store_f32(out + 4 * (i + 16), d * ((q >> 4) - 8))
