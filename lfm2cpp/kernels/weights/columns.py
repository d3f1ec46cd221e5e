"""Numbers that lie one a row in the file and side by side in a panel: scales and minima of the rows' blocks.

A vector put together element by element would keep the shuffle unit busy for longer than the integers do. So they are
first copied as they are, all of a panel's, with the moves that scalars take, and widened when the block's turn comes: a
vector load right behind the narrow stores would have to wait for them.
"""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_u8, load_u16, store_i8, store_i16
from lfm2cpp.kernels.simd import W, load_f16, load_i8_as_f32, store_f32


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
