"""What lies row by row in the file and side by side in a panel: integers, and the scales and minima of their blocks.

A vector of scales put together one by one would keep the shuffle unit busy for longer than the integers do. So they are
first copied as they are, all of a panel's, with the moves that scalars take, and widened when the block's turn comes: a
vector load right behind the narrow stores would have to wait for them.
"""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_u8, load_u16, store_i8, store_i16
from lfm2cpp.kernels.simd import (
    W,
    gather_pieces,
    high_halves,
    load_f16,
    load_i8_as_f32,
    low_halves,
    store_f32,
    transpose_4,
)
from lfm2cpp.kernels.widths import PAIRS


@device
def interleave_rows(pieces, row_bytes):
    """16 bytes of W rows, from `pieces` on, as four vectors for the tile (dot_tile.py)

    In columns, vector j holds bytes 4 j .. 4 j + 3 of every row. In pairs, vector 2 j + p holds bytes 8 j .. 8 j + 7 of
    rows 2 p and 2 p + 1.
    """
    a = gather_pieces(pieces, 4 * row_bytes)
    b = gather_pieces(pieces + row_bytes, 4 * row_bytes)
    c = gather_pieces(pieces + 2 * row_bytes, 4 * row_bytes)
    d = gather_pieces(pieces + 3 * row_bytes, 4 * row_bytes)
    if PAIRS:
        return low_halves(a, b), low_halves(c, d), high_halves(a, b), high_halves(c, d)
    return transpose_4(a, b, c, d)


@device
def copy_f16(rows, row_bytes, out):
    """2 W float16, one a row"""
    for r in range(2 * W):
        store_i16(out + 2 * r, load_u16(rows))
        rows += row_bytes


@device
def widen_f16(raw, out):
    """What copy_f16 left, as 2 W float32"""
    store_f32(out, load_f16(raw))
    store_f32(out + 4 * W, load_f16(raw + 2 * W))


@device
def copy_i8(rows, row_bytes, out):
    """2 W int8, one a row"""
    for r in range(2 * W):
        store_i8(out + r, load_u8(rows))
        rows += row_bytes


@device
def widen_i8(raw, out):
    """What copy_i8 left, as 2 W float32"""
    store_f32(out, load_i8_as_f32(raw))
    store_f32(out + 4 * W, load_i8_as_f32(raw + W))
