"""IQ4_NL: 32 elements of 4 bits and a float16 scale; x = d * IQ4_NL_VALUES[q].

The values are signed bytes, which meet the activations as those of Q8_0 do.
"""

from __future__ import annotations

from lfm2cpp.ggml import IQ4_NL_VALUES
from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import I8_BIAS, dot_panel_i8
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32
from lfm2cpp.kernels.simd import (
    W,
    high_nibbles,
    load_bytes,
    low_nibbles,
    make_gathers,
    make_look_up,
    splat_i32,
    sum_pieces,
)
from lfm2cpp.kernels.widths import ACT_Z128

from .blocks import make_block_scales, make_dot_scaled, make_row_group, make_sum_block, make_sum_levels
from .columns import make_each, rows_in_file, scale_block
from .nibbles import interleave_nibbles

BLOCK, BLOCK_BYTES = 32, 18
N_SCALES = 1
OFFSET = I8_BIAS
N_SUMS = 1
QS = 2  # offset of the nibbles in a block
look_up = make_look_up([(value + I8_BIAS) & 255 for value in IQ4_NL_VALUES])  # as through panel_i8
look_up_each = make_each(look_up)


def _make_dot(gather):
    @device
    def dot(w, a):
        q = gather(w)
        low = dot_panel_i8(splat_i32(0), look_up(low_nibbles(q)), load_bytes(a))
        return dot_panel_i8(low, look_up(high_nibbles(q)), load_bytes(a + 4 * W))

    return dot


sum_values = make_sum_levels(BLOCK_BYTES, [_make_dot(gather) for gather in make_gathers(BLOCK_BYTES, QS)], sum_pieces)
row_group, prepare_rows = make_row_group(BLOCK_BYTES), rows_in_file
dot_group = make_dot_scaled(BLOCK_BYTES, sum_values, ACT_Z128)
block_scales, sum_block, finish_block = make_block_scales(BLOCK_BYTES), make_sum_block("dot_i8", ACT_Z128), scale_block


@device
def block_columns(w, row_bytes, b):
    return look_up_each(interleave_nibbles(w + b * BLOCK_BYTES + QS, row_bytes))


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * IQ4_NL_VALUES[q & 15])
        store_f32(out + 4 * (i + 16), d * IQ4_NL_VALUES[q >> 4])
