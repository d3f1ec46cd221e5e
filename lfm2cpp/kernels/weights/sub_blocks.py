"""Blocks of 256: how groups of W times 32 columns go into them; and what Q4_K and Q5_K share beyond that.

Those have eight sub-blocks of 32, each with a 6-bit scale and minimum: x = (d * scale) * q - dmin * min. A block begins
with d and dmin in float16 and 12 bytes of 6-bit numbers, packed as gguf/dequantize.py says. It ends with the nibbles:
of every 64 elements 32 bytes, low ones for the first sub-block, high ones for the second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.scalar import load_f16, load_u8
from lfm2cpp.kernels.scalar import store_f32 as store_scalar
from lfm2cpp.kernels.simd import (
    PIECES,
    W,
    bytes_,
    fma,
    gather_f16,
    gather_sub_block_scales,
    high_nibbles,
    i8_of_lanes,
    load_f32,
    load_i32,
    low_nibbles,
    make_gather_nibbles,
    make_store_apart,
    negative,
    splat_u8,
    store_f32,
    to_f32,
)
from lfm2cpp.kernels.widths import ACT_D, ACT_DS, block_of

from .columns import interleave_columns, interleave_rows

DMIN, NUMBERS, HEADER = 2, 4, 16  # offsets in a block: dmin, the 6-bit numbers, their end
store_quads = make_store_apart(4, bytes_)


@device
def half_of_group(g):
    """Which half of a block group g is for W = 4; a group of more lanes is whole blocks"""
    return g % 2 if W == 4 else 0


class SubBlock(NamedTuple):
    """One of a group: which block, which half of it (for W = 4 a group is a half, called 0: half_of_group says which of
    its block), which quarter of the half."""

    block: int
    half: int
    quarter: int


def _sub_block(number: int) -> SubBlock:
    return SubBlock(number // 8, number // 4 % 2, number % 4)


# VECTORS[pair][piece]: which one it is that meets this piece of this pair of activation vectors.
VECTORS = [[_sub_block(block_of(pair, piece)) for piece in range(PIECES)] for pair in range(4)]


def make_row_group(block_bytes: int) -> Any:
    @device
    def row_group(row, g):
        """For W = 4 a group is half a block: its address is the block's, and dot_group finds the half from g."""
        return row + (g * W // 8) * block_bytes

    return row_group


def make_gather_quarters(sub_blocks: list[SubBlock], block_bytes: int) -> Any:
    """gather(qs): the nibbles of PIECES sub-blocks, those of their first 16 elements and of the others, a byte each

    qs: where the group's nibbles begin.
    """
    places = [block * block_bytes + 64 * half + quarter // 2 * 32 for block, half, quarter in sub_blocks]
    return make_gather_nibbles(places, [sub_block.quarter % 2 for sub_block in sub_blocks])


def make_add_group(block_bytes: int) -> Any:
    """add_group(acc, sums, w, act, n_groups, g): acc + the group's sums and minima; w: its first block"""

    @device
    def add_group(acc, sums, w, act, n_groups, g):
        scale, minimum = gather_sub_block_scales(w, block_bytes, half_of_group(g))
        tables = act + g * (4 * W)
        acc = fma(to_f32(sums), scale * load_f32(tables + n_groups * ACT_D), acc)
        return fma(negative(minimum), load_f32(tables + n_groups * ACT_DS), acc)

    return add_group


def prepared_bytes(block_bytes: int) -> int:
    """Of a row of a block that prepare_rows has laid out"""
    return block_bytes - HEADER + 16 + 8  # quants, 6-bit numbers as bytes, two float32


def make_prepare(block_bytes: int) -> tuple[Any, Any]:
    """prepare_rows and block_scales.

    Prepared are a block's quants side by side, then scales 0..3 and 4..7 and minima 0..3 and 4..7 as four bytes a row
    each, d and -dmin as float32.
    """
    n_quants, prepared = block_bytes - HEADER, prepared_bytes(block_bytes)
    scales_at, d_at = n_quants * W, (n_quants + 16) * W

    @device
    def prepare_rows(w, row_bytes, n_blocks, room):
        for i in range(n_blocks // 8):
            block, out = w + i * block_bytes, room + i * (prepared * W)
            for piece in range(0, n_quants, 16):
                store_quads(out + piece * W, 4 * W, interleave_rows(block + HEADER + piece, row_bytes))
            _, scales, minima, low = interleave_columns(block, row_bytes)
            more_scales = low_nibbles(low) | ((scales >> 6) << 4)
            more_minima = high_nibbles(low) | ((minima >> 6) << 4)
            numbers = scales & splat_u8(63), more_scales, minima & splat_u8(63), more_minima
            store_quads(out + scales_at, 4 * W, numbers)
            store_f32(out + d_at, gather_f16(block, row_bytes))
            store_f32(out + d_at + 4 * W, negative(gather_f16(block + DMIN, row_bytes)))
        return room

    @device
    def block_scales(rows, _, b):
        block, four, i = rows + b // 8 * (prepared * W), b // 4 % 2, b % 4
        at = block + scales_at + 4 * four * W
        scale, _ = i8_of_lanes(load_i32(at), i)
        minimum, _ = i8_of_lanes(load_i32(at + 8 * W), i)
        return load_f32(block + d_at) * scale, load_f32(block + d_at + 4 * W) * minimum

    return prepare_rows, block_scales


@device
def nibbles_of(qs, j):
    """Sub-block j's levels, but for a fifth bit, from its bytes"""
    return low_nibbles(qs) if j % 2 == 0 else high_nibbles(qs)


@device
def nibble_at(qs, j, i):
    """The same of element i alone"""
    return (load_u8(qs + j // 2 * 32 + i) >> (4 * (j % 2))) & 15


@device
def scale_and_minimum(w, j):
    """Of sub-block j, with the block's units"""
    numbers = w + NUMBERS
    if j < 4:
        scale, minimum = load_u8(numbers + j) & 63, load_u8(numbers + 4 + j) & 63
    else:
        low = load_u8(numbers + 4 + j)
        scale = (low & 15) | ((load_u8(numbers + j - 4) >> 6) << 4)
        minimum = (low >> 4) | ((load_u8(numbers + j) >> 6) << 4)
    return load_f16(w) * scale, load_f16(w + DMIN) * minimum


def make_dequantize_block(level: Any) -> Any:
    """dequantize_block; level(w, j, i): the integer of element i of sub-block j"""

    @device
    def dequantize_block(w, out):
        for j in range(8):
            scale, minimum = scale_and_minimum(w, j)
            for i in range(32):
                store_scalar(out + 4 * (32 * j + i), scale * level(w, j, i) - minimum)

    return dequantize_block
