"""What lies row by row in the file and side by side in a panel: integers, and the scales and minima of their blocks.

A vector of scales put together one by one would keep the shuffle unit busy for longer than the integers do. So they are
first copied as they are, all of a panel's, with the moves that scalars take, and widened when the block's turn comes: a
vector load right behind the narrow stores would have to wait for them.
"""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_u8, load_u16, store_i8, store_i16
from lfm2cpp.kernels.simd import W, gather_pieces, load_f16, load_i8_as_f32, store_f32, transpose_4


@device
def interleave_rows(pieces, row_bytes):
    """16 bytes of W rows, from `pieces` on, as the tile takes them: vector j of four holds each row's bytes 4 j on"""
    return transpose_4(
        gather_pieces(pieces, 4 * row_bytes),
        gather_pieces(pieces + row_bytes, 4 * row_bytes),
        gather_pieces(pieces + 2 * row_bytes, 4 * row_bytes),
        gather_pieces(pieces + 3 * row_bytes, 4 * row_bytes),
    )


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
