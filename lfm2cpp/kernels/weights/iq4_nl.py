"""IQ4_NL: 32 elements of 4 bits and a float16 scale; x = d * IQ4_NL_VALUES[q].

The values are signed bytes, which meet the activations as those of Q8_0 do.
"""

from __future__ import annotations

from lfm2cpp.ggml import IQ4_NL_VALUES
from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import I8_BIAS, PANEL_I8_FLIP, dot_panel_i8
from lfm2cpp.kernels.scalar import load_f16, load_u8, store_f32
from lfm2cpp.kernels.shares import make_prefetches
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

from .blocks import make_block_scales, make_dot_scaled, make_row_group, make_sum_block
from .columns import interleave_rows, rows_in_file, scale_block

BLOCK, BLOCK_BYTES = 32, 18
N_SCALES = 1
OFFSET = I8_BIAS
N_SUMS = 1
QS = 2  # offset of the nibbles in a block
# Straight to what panel_i8 would make of them.
look_up = make_look_up([value & 0xFF ^ PANEL_I8_FLIP for value in IQ4_NL_VALUES])
gather_0, gather_1, gather_2, gather_3 = make_gathers(BLOCK_BYTES, QS)
ask_0, ask_1, ask_2, ask_3 = make_prefetches(W * BLOCK_BYTES, 4)


@device
def _dot_pair(q, a):
    """The four partial sums of each piece's block"""
    low = dot_panel_i8(splat_i32(0), look_up(low_nibbles(q)), load_bytes(a))
    return dot_panel_i8(low, look_up(high_nibbles(q)), load_bytes(a + 4 * W))


@device
def sum_values(w, a, far):
    """Lane b is the sum of value * activation over block b, and I8_BIAS times that of the activations."""
    ask_0(w, far)
    s0 = _dot_pair(gather_0(w), a)
    ask_1(w, far)
    s1 = _dot_pair(gather_1(w), a + 8 * W)
    ask_2(w, far)
    s2 = _dot_pair(gather_2(w), a + 16 * W)
    ask_3(w, far)
    s3 = _dot_pair(gather_3(w), a + 24 * W)
    return sum_pieces(s0, s1, s2, s3)


row_group, prepare_rows = make_row_group(BLOCK_BYTES), rows_in_file
dot_group = make_dot_scaled(BLOCK_BYTES, sum_values, ACT_Z128)
block_scales, sum_block, finish_block = make_block_scales(BLOCK_BYTES), make_sum_block("dot_i8", ACT_Z128), scale_block


@device
def block_columns(w, row_bytes, b):
    a, b, c, d = interleave_rows(w + b * BLOCK_BYTES + QS, row_bytes)
    first = look_up(low_nibbles(a)), look_up(low_nibbles(b)), look_up(low_nibbles(c)), look_up(low_nibbles(d))
    return first + (
        look_up(high_nibbles(a)), look_up(high_nibbles(b)), look_up(high_nibbles(c)), look_up(high_nibbles(d)),
    )  # fmt: skip


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(16):
        q = load_u8(w + QS + i)
        store_f32(out + 4 * i, d * IQ4_NL_VALUES[q & 15])
        store_f32(out + 4 * (i + 16), d * IQ4_NL_VALUES[q >> 4])
