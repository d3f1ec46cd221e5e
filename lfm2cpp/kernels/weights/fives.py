"""What Q5_0 and Q5_1 share: 4 bytes of fifth bits, bit i for element i, then 16 bytes of nibbles, as in nibbles.py."""

from __future__ import annotations

from typing import Any

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.dot import dot2_u6
from lfm2cpp.kernels.scalar import load_u8
from lfm2cpp.kernels.simd import (
    W,
    fives,
    load_bytes,
    make_gathers,
    make_spread_bits,
    splat_i32,
    sum_pieces_i16,
)
from lfm2cpp.kernels.widths import PAIRS

from .blocks import make_sum_levels
from .columns import interleave_columns
from .nibbles import interleave_nibbles

QS = 4  # offset of the nibbles behind that of the fifth bits


def _bits_of_vector(i: int) -> list[int]:
    """Which bits of four rows' 32 those of vector i of 8 are, a bit a byte (columns.py)."""
    if PAIRS:  # 8 columns of 2 rows
        return [32 * (2 * (i % 2) + row) + 8 * (i // 2) + column for row in range(2) for column in range(8)]
    return [32 * row + 4 * i + column for row in range(4) for column in range(4)]


spread_0, spread_1, spread_2, spread_3, spread_4, spread_5, spread_6, spread_7 = (
    make_spread_bits(_bits_of_vector(i), 16) for i in range(8)
)


def _make_dot(gather: Any, gather_fifth: Any) -> Any:
    @device
    def dot(w, a):
        low, high = fives(gather(w), gather_fifth(w))
        return dot2_u6(splat_i32(0), low, load_bytes(a), high, load_bytes(a + 4 * W))

    return dot


def make_sum_fives(block_bytes: int, offset: int) -> Any:
    """sum_levels (blocks.py) of levels 0..31; offset: of the fifth bits in a block."""
    gathers = zip(make_gathers(block_bytes, offset + QS), make_gathers(block_bytes, offset), strict=True)
    dots = [_make_dot(gather, gather_fifth) for gather, gather_fifth in gathers]
    return make_sum_levels(block_bytes, dots, sum_pieces_i16)  # 8 products of at most 31 * 127 each


@device
def interleave_fives(qh, row_bytes):
    """One block of W rows, a byte a level 0..31, as eight vectors (columns.py); qh: the first row's fifth bits."""
    fifth, _, _, _ = interleave_columns(qh, row_bytes)
    a, b, c, d, e, f, g, h = interleave_nibbles(qh + QS, row_bytes)
    low = a | spread_0(fifth), b | spread_1(fifth), c | spread_2(fifth), d | spread_3(fifth)
    return low + (e | spread_4(fifth), f | spread_5(fifth), g | spread_6(fifth), h | spread_7(fifth))


@device
def level_at(qh, i):
    """Level 0..31 of element i alone"""
    nibble = (load_u8(qh + QS + i % 16) >> (4 * (i // 16))) & 15
    return nibble | (((load_u8(qh + i // 8) >> (i % 8)) & 1) << 4)
