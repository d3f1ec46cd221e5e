"""Q5_0: 32 elements of 5 bits and a float16 scale; x = d * (q - 16).

Few rows stream by as levels 0..31, side by side they are signed, as those of Q8_0.
"""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import I8_BIAS, panel_i8
from lfm2cpp.kernels.scalar import load_f16, store_f32
from lfm2cpp.kernels.simd import splat_u8
from lfm2cpp.kernels.widths import ACT_Z8, ACT_Z128

from .blocks import make_block_scales, make_dot_scaled, make_row_group, make_sum_block
from .columns import make_each, rows_in_file, scale_block
from .fives import interleave_fives, level_at, make_sum_fives

BLOCK, BLOCK_BYTES = 32, 22
N_SCALES = 1
OFFSET = I8_BIAS
N_SUMS = 1
QH = 2  # offset of the fifth bits in a block
row_group, prepare_rows = make_row_group(BLOCK_BYTES), rows_in_file
dot_group = make_dot_scaled(BLOCK_BYTES, make_sum_fives(BLOCK_BYTES, QH), ACT_Z8, times=2)
block_scales, sum_block, finish_block = make_block_scales(BLOCK_BYTES), make_sum_block("dot_i8", ACT_Z128), scale_block


@device
def _signed(levels):
    return panel_i8(levels - splat_u8(16))


each_signed = make_each(_signed)


@device
def block_columns(w, row_bytes, b):
    return each_signed(interleave_fives(w + b * BLOCK_BYTES + QH, row_bytes))


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(32):
        store_f32(out + 4 * i, d * (level_at(w + QH, i) - 16))
