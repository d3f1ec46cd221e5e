"""What Q4_0 and Q4_1 share: 16 bytes of nibbles a block, low ones for elements 0..15, high ones for 16..31."""

from __future__ import annotations

from typing import Any

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot2_u6
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import (
    W,
    high_nibbles,
    load_bytes,
    low_nibbles,
    make_gathers,
    splat_i32,
    sum_pieces_small,
)

from .columns import interleave_rows


@device
def _dot_pair(q, a):
    """The four partial sums of each piece's block."""
    return dot2_u6(splat_i32(0), low_nibbles(q), load_bytes(a), high_nibbles(q), load_bytes(a + 4 * W))


def make_sum_nibbles(block_bytes: int, offset: int) -> Any:
    """sum_nibbles(w, a, far): lane b is the sum of nibble * activation over block b of the group at w.

    offset: of the nibbles in a block.
    """
    gather_0, gather_1, gather_2, gather_3 = make_gathers(block_bytes, offset)
    ask_0, ask_1, ask_2, ask_3 = make_prefetches(W * block_bytes, 4)

    @device
    def sum_nibbles(w, a, far):
        ask_0(w, far)
        s0 = _dot_pair(gather_0(w), a)
        ask_1(w, far)
        s1 = _dot_pair(gather_1(w), a + 8 * W)
        ask_2(w, far)
        s2 = _dot_pair(gather_2(w), a + 16 * W)
        ask_3(w, far)
        s3 = _dot_pair(gather_3(w), a + 24 * W)
        return sum_pieces_small(s0, s1, s2, s3)  # of two lanes: 2 * 8 * 15 * 127 fits 16 bits

    return sum_nibbles


@device
def interleave_nibbles(qs, row_bytes):
    """One block of W rows, a byte a nibble, as eight vectors (columns.py); qs: the first row's nibbles."""
    a, b, c, d = interleave_rows(qs, row_bytes)
    low = low_nibbles(a), low_nibbles(b), low_nibbles(c), low_nibbles(d)
    return low + (high_nibbles(a), high_nibbles(b), high_nibbles(c), high_nibbles(d))
