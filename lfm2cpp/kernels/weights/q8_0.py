"""Q8_0: 32 elements of 8 bits and a float16 scale; x = d * q."""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import I8_BIAS, dot_i8, panel_i8
from lfm2cpp.kernels.scalar import load_f16, load_i8, store_f32
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import W, load_bytes, make_gathers, splat_i32, sum_pieces
from lfm2cpp.kernels.widths import ACT_Z128

from .blocks import make_block_scales, make_dot_scaled, make_row_group, make_sum_block
from .columns import interleave_rows, rows_in_file, scale_block

BLOCK, BLOCK_BYTES = 32, 34
N_SCALES = 1
OFFSET = I8_BIAS
N_SUMS = 1
QS = 2  # offset of the integers in a block
low_0, low_1, low_2, low_3 = make_gathers(BLOCK_BYTES, QS)
high_0, high_1, high_2, high_3 = make_gathers(BLOCK_BYTES, QS + 16)
ask_0, ask_1, ask_2, ask_3 = make_prefetches(W * BLOCK_BYTES, 4)


@device
def _dot_pair(low, high, a):
    """The four partial sums of each piece's block"""
    return dot_i8(dot_i8(splat_i32(0), low, load_bytes(a)), high, load_bytes(a + 4 * W))


@device
def sum_integers(w, a, far):
    """Lane b is the sum of integer * activation over block b, and I8_BIAS times that of the activations."""
    ask_0(w, far)
    s0 = _dot_pair(low_0(w), high_0(w), a)
    ask_1(w, far)
    s1 = _dot_pair(low_1(w), high_1(w), a + 8 * W)
    ask_2(w, far)
    s2 = _dot_pair(low_2(w), high_2(w), a + 16 * W)
    ask_3(w, far)
    s3 = _dot_pair(low_3(w), high_3(w), a + 24 * W)
    return sum_pieces(s0, s1, s2, s3)


row_group, prepare_rows = make_row_group(BLOCK_BYTES), rows_in_file
dot_group = make_dot_scaled(BLOCK_BYTES, sum_integers, ACT_Z128)
block_scales, sum_block, finish_block = make_block_scales(BLOCK_BYTES), make_sum_block("dot_i8", ACT_Z128), scale_block


@device
def block_columns(w, row_bytes, b):
    qs = w + b * BLOCK_BYTES + QS
    a, b, c, d = interleave_rows(qs, row_bytes)
    first = panel_i8(a), panel_i8(b), panel_i8(c), panel_i8(d)
    a, b, c, d = interleave_rows(qs + 16, row_bytes)
    return first + (panel_i8(a), panel_i8(b), panel_i8(c), panel_i8(d))


@device
def dequantize_block(w, out):
    d = load_f16(w)
    for i in range(32):
        store_f32(out + 4 * i, d * load_i8(w + QS + i))
