"""What Q4_0 and Q4_1 share: 16 bytes of nibbles a block, low ones for elements 0..15, high ones for 16..31."""

from __future__ import annotations

from typing import Any

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot2_u6
from lfm2cpp.kernels.simd import (
    W,
    high_nibbles,
    load_bytes,
    low_nibbles,
    make_gathers,
    splat_i32,
    sum_pieces_small,
)

from .blocks import make_sum_levels
from .columns import interleave_rows


def _make_dot(gather: Any) -> Any:
    @device
    def dot(w, a):
        q = gather(w)
        return dot2_u6(splat_i32(0), low_nibbles(q), load_bytes(a), high_nibbles(q), load_bytes(a + 4 * W))

    return dot


def make_sum_nibbles(block_bytes: int, offset: int) -> Any:
    """sum_levels (blocks.py) of nibbles 0..15; offset: of the nibbles in a block."""
    dots = [_make_dot(gather) for gather in make_gathers(block_bytes, offset)]
    return make_sum_levels(block_bytes, dots, sum_pieces_small)  # of two lanes: 2 * 8 * 15 * 127 fits 16 bits


@device
def interleave_nibbles(qs, row_bytes):
    """One block of W rows, a byte a nibble, as eight vectors (columns.py); qs: the first row's nibbles."""
    a, b, c, d = interleave_rows(qs, row_bytes)
    low = low_nibbles(a), low_nibbles(b), low_nibbles(c), low_nibbles(d)
    return low + (high_nibbles(a), high_nibbles(b), high_nibbles(c), high_nibbles(d))
