"""What lies row by row in the file and side by side for a tile: the integers of a block of 32 columns of W rows.

They are eight vectors, in columns (dot_tile.py) of 4 columns of every row each, in pairs of 8 columns of 2 rows.
"""

from __future__ import annotations

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.simd import W, gather_pieces, high_halves, load_bytes, low_halves, transpose_4
from lfm2cpp.kernels.widths import ACT_D, ACT_DS, ACT_GROUP, PAIRS


@device
def interleave_rows(pieces, row_bytes):
    """16 bytes of W rows, from `pieces` on, as four vectors

    In columns, vector j holds bytes 4 j .. 4 j + 3 of every row. In pairs, vector 2 j + p holds bytes 8 j .. 8 j + 7 of
    rows 2 p and 2 p + 1.
    """
    a, b, c, d = gather_rows(pieces, row_bytes)
    if PAIRS:
        return low_halves(a, b), low_halves(c, d), high_halves(a, b), high_halves(c, d)
    return transpose_4(a, b, c, d)


@device
def interleave_columns(pieces, row_bytes):
    """16 bytes of W rows as vectors of 4 columns, whatever the tile wants"""
    a, b, c, d = gather_rows(pieces, row_bytes)
    return transpose_4(a, b, c, d)


@device
def gather_rows(pieces, row_bytes):
    """16 bytes of W rows: piece i of vector k is row 4 i + k."""
    step = 4 * row_bytes
    a, b = gather_pieces(pieces, step), gather_pieces(pieces + row_bytes, step)
    return a, b, gather_pieces(pieces + 2 * row_bytes, step), gather_pieces(pieces + 3 * row_bytes, step)


def make_each(word):
    """each(columns): the eight vectors, each through `word`"""

    @device
    def each(columns):
        a, b, c, d, e, f, g, h = columns
        return word(a), word(b), word(c), word(d), word(e), word(f), word(g), word(h)

    return each


def make_columns(levels):
    """columns(low, high, part): the eight vectors of a block whose bytes prepare_rows has put side by side, those with
    the low bits at `low`, those with the high ones at `high`; levels(bytes, high_bytes, part) makes integers of them"""

    @device
    def columns_of_16(low, high, part):
        return (
            levels(load_bytes(low), load_bytes(high), part),
            levels(load_bytes(low + 4 * W), load_bytes(high + 4 * W), part),
            levels(load_bytes(low + 8 * W), load_bytes(high + 8 * W), part),
            levels(load_bytes(low + 12 * W), load_bytes(high + 12 * W), part),
        )

    @device
    def columns(low, high, part):
        return columns_of_16(low, high, part) + columns_of_16(low + 16 * W, high + 16 * W, part)

    return columns


@device
def rows_in_file(w, row_bytes, n_blocks, room):
    """prepare_rows of a type whose blocks are used as they lie in the file"""
    return w


def sum_alone(dot):
    """sum_block's sums for weights without OFFSET; dot: the tile's word for them"""

    @device
    def sums(q, a, tables, table_step, room):
        return (dot(q, a, table_step * ACT_GROUP, room),)

    return sums


def scale_and_add_block(tile):
    """finish_block of a type whose blocks have a scale and a minimum"""
    scale_and_add = tile.scale_and_add

    @device
    def finish(f, sums, scales, tables, table_step):
        d, ds = tables + table_step * ACT_D, tables + table_step * ACT_DS
        return scale_and_add(f, sums[0], scales[0], d, scales[1], ds, table_step * ACT_GROUP)

    return finish


def scale_block(tile):
    """finish_block of a type whose blocks have one scale and nothing else"""
    scale = tile.scale

    @device
    def finish(f, sums, scales, tables, table_step):
        return scale(f, sums[0], scales[0], tables + table_step * ACT_D, table_step * ACT_GROUP)

    return finish
