"""Q8_0: 32 elements of 8 bits and a float16 scale; x = d * q."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import I8_BIAS, dot_i8, panel_i8
from lfm2cpp.kernels.scalar import load_f16, load_i8, store_f32
from lfm2cpp.kernels.simd import W, load_bytes, make_gathers, splat_i32, sum_pieces
from lfm2cpp.kernels.widths import ACT_Z128

from .blocks import make_block_scales, make_dot_scaled, make_row_group, make_sum_block, make_sum_levels
from .columns import interleave_rows, make_each, rows_in_file, scale_block

BLOCK, BLOCK_BYTES = 32, 34
N_SCALES = 1
OFFSET = I8_BIAS
N_SUMS = 1
QS = 2  # offset of the integers in a block
each_in_panel = make_each(panel_i8)


def _make_dot(low, high):
    @device
    def dot(w, a):
        return dot_i8(dot_i8(splat_i32(0), low(w), load_bytes(a)), high(w), load_bytes(a + 4 * W))

    return dot


gathers = zip(make_gathers(BLOCK_BYTES, QS), make_gathers(BLOCK_BYTES, QS + 16), strict=True)
sum_integers = make_sum_levels(BLOCK_BYTES, [_make_dot(low, high) for low, high in gathers], sum_pieces)
row_group, prepare_rows = make_row_group(BLOCK_BYTES), rows_in_file
dot_group = make_dot_scaled(BLOCK_BYTES, sum_integers, ACT_Z128)
block_scales, sum_block, finish_block = make_block_scales(BLOCK_BYTES), make_sum_block("dot_i8", ACT_Z128), scale_block


@device
def block_columns(w, row_bytes, b):
    qs = w + b * BLOCK_BYTES + QS
    return each_in_panel(interleave_rows(qs, row_bytes) + interleave_rows(qs + 16, row_bytes))


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(32):
        store_f32(out + 4 * i, d * load_i8(w + QS + i))
