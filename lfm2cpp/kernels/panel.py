"""A panel of 2 W rows of weights, unpacked into per-thread scratch and used by tile after tile of many tokens.

It lies in the second-level cache. Chain by chain (the blocks b with the same b % W, in order), each block of 32 columns
as the 8 vectors of every W rows (weights/columns.py; for matrices, less their type's OFFSET), then its scales as
float32, one a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from .activation import n_groups_of, tile_stride
from .compiler import device
from .dot_matrix import make_panel_columns
from .dot_tile import PANEL, make_dot_tile
from .scalar import hold, keep_apart, load_u8, store_i8
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .simd import (
    W,
    bytes_,
    f32,
    load_f32,
    make_prefetch_lines,
    make_store_apart,
    prefetch_near,
    prefetch_write,
    splat_f32,
    store_f32,
)
from .tile import BLOCK, ENTRY, VECTOR
from .widths import (
    LINE,
    MATRICES,
    MATRIX_BLOCKS,
    MEDIUM_TILE_TOKENS,
    PANEL_SUMS,
    SLICED_TOKENS,
    SMALL_TILE_TOKENS,
    TILE_TOKENS,
)

SUMS = 2 * VECTOR  # bytes of one token's sums of the rows of a panel
SCALES = 16 * VECTOR  # offset in a block of a panel


@dataclass(frozen=True)
class PanelProduct:
    """For a block type. totals: TOTALS bytes, of which the first tokens' sums, SUMS bytes each, are the result."""

    block_nbytes: int  # of a panel's 32 columns
    unpack: Any  # (w, row_bytes, n_rows, n, panel, coming): a panel of n_rows rows at w; those at `coming` will be next
    by_tiles: Any  # (panel, n, act, n_tokens, totals): totals = the panel by n_tokens, SLICED_TOKENS or less, of tiles
    by_slices: Any  # (w, row_bytes, n_rows, n, panel, coming, act, n_tokens, totals): both, for SLICED_TOKENS or less


def file_nbytes(weights: ModuleType) -> int:
    """Bytes in the file of 32 columns of W rows."""
    return W * weights.BLOCK_BYTES // (weights.BLOCK // 32)


@cache
def make_panel_product(weights: ModuleType) -> PanelProduct:
    prepare_rows, block_columns, block_scales = weights.prepare_rows, weights.block_columns, weights.block_scales
    n_scales = weights.N_SCALES
    assert n_scales <= 3 and weights.N_SUMS <= 2, "run_tiles and run_matrices hand on so many addresses"
    store_columns, store_scales = make_store_apart(8, bytes_), make_store_apart(n_scales, f32)
    panel_columns = make_panel_columns(weights.OFFSET)
    block_nbytes, asked = SCALES + n_scales * SUMS, 2 * file_nbytes(weights)
    ask_for_block = make_prefetch_lines(range(0, asked, LINE), False)
    widths = TILE_TOKENS, MEDIUM_TILE_TOKENS, SMALL_TILE_TOKENS  # of which the last two may be one
    make_run_tiles = _make_run_matrices if MATRICES else _make_run_tiles
    run_tiles = {n_tokens: make_run_tiles(weights, n_tokens, block_nbytes) for n_tokens in widths}
    wide, medium, small = (run_tiles[n_tokens] for n_tokens in widths)

    @device
    def prepare(w, row_bytes, n_rows, n_blocks, room):
        """W rows and W more, completed if they are the last ones, as unpack_chains takes them"""
        w = whole_rows(w, row_bytes, n_rows, room)
        room += 2 * W * row_bytes
        low = prepare_rows(w, row_bytes, n_blocks, room)
        return low, prepare_rows(w + W * row_bytes, row_bytes, n_blocks, room + n_blocks * block_nbytes)

    @device
    def unpack_chains(low, high, row_bytes, first, last, n_blocks, panel, coming):
        keep_apart()
        for c in range(first, last):
            for b in range(c, n_blocks, W):
                ask_for_block(coming + b * asked)
                store_columns(panel, SUMS, panel_columns(block_columns(low, row_bytes, b)))
                store_scales(panel + SCALES, SUMS, block_scales(low, row_bytes, b))
                store_columns(panel + VECTOR, SUMS, panel_columns(block_columns(high, row_bytes, b)))
                store_scales(panel + VECTOR + SCALES, SUMS, block_scales(high, row_bytes, b))
                panel += block_nbytes

    @device
    def unpack(w, row_bytes, n_rows, n, panel, coming):
        n_blocks = n // 32
        low, high = prepare(w, row_bytes, n_rows, n_blocks, panel + n_blocks * block_nbytes)
        unpack_chains(low, high, row_bytes, np.int64(0), min(W, n_blocks), n_blocks, panel, coming)

    @device
    def by_tiles(panel, n, act, n_tokens, totals):
        clear_tiles(totals, n_tokens)
        room = totals + (SLICED_TOKENS + TILE_TOKENS) * SUMS
        chains_by_tiles(panel, np.int64(0), min(W, n // 32), n, act, n_tokens, totals, room)

    @device
    def chains_by_tiles(panel, first, last, n, act, n_tokens, totals, room):
        n_blocks, n_groups = n // 32, n_groups_of(n)
        n_tiles, left = divmod(n_tokens, TILE_TOKENS)
        if left > MEDIUM_TILE_TOKENS:
            n_tiles, left = n_tiles + 1, 0
        if n_tiles:
            wide(panel, first, last, n_blocks, n_groups, act, n_tiles, totals, room)
        act, totals = act + n_tiles * tile_stride(n_groups), totals + n_tiles * (TILE_TOKENS * SUMS)
        if left > SMALL_TILE_TOKENS:
            medium(panel, first, last, n_blocks, n_groups, act, np.int64(1), totals, room)
        elif left:
            small(panel, first, last, n_blocks, n_groups, act, np.int64(1), totals, room)

    @device
    def by_slices(w, row_bytes, n_rows, n, panel, coming, act, n_tokens, totals):
        n_blocks, room = n // 32, totals + (SLICED_TOKENS + TILE_TOKENS) * SUMS
        low, high = prepare(w, row_bytes, n_rows, n_blocks, panel + n_groups_of(n) * block_nbytes)
        clear_tiles(totals, n_tokens)
        for c in range(min(W, n_blocks)):
            unpack_chains(low, high, row_bytes, c, c + 1, n_blocks, panel, coming)
            chains_by_tiles(panel, c, c + 1, n, act, n_tokens, totals, room)

    return PanelProduct(block_nbytes, unpack, by_tiles, by_slices)


def _make_run_tiles(weights: ModuleType, n_tokens: int, block_nbytes: int) -> Any:
    """Chains of a panel by the first n_tokens tokens of each of some tiles."""
    tile = make_dot_tile(n_tokens, PANEL)
    zero, add_to = tile.zero, tile.add_to
    sum_block, finish = weights.sum_block(tile), weights.finish_block(tile)
    ask_for_block = make_prefetch_lines(range(0, TILE_TOKENS * BLOCK, LINE), False)

    @device
    def run_tiles(panel, first, last, n_blocks, n_groups, act, n_tiles, totals, room):
        """totals += the products of chains first .. last - 1, which are at `panel`, with n_tiles tiles of tokens.

        Meanwhile it asks for the same blocks of the tile that follows, which may no longer be near. The sums of a chain
        may lie at `room`, TILE_TOKENS * SUMS bytes.
        """
        keep_apart()
        ahead = tile_stride(n_groups)
        for _ in range(n_tiles):
            block = panel
            for c in range(first, last):
                f = zero(room)
                a = hold(act + c * n_groups * (TILE_TOKENS * BLOCK))
                tables = hold(act + c * n_groups * (TILE_TOKENS * ENTRY))
                for _ in range(c, n_blocks, W):
                    ask_for_block(a + ahead)
                    scales = block + SCALES
                    scales = scales, scales + SUMS, scales + 2 * SUMS  # as many of them as there are
                    sums = sum_block(block, a, tables, TILE_TOKENS * n_groups, 0)
                    f = finish(f, sums, scales, tables, TILE_TOKENS * n_groups)
                    block += block_nbytes
                    a += TILE_TOKENS * BLOCK
                    tables += TILE_TOKENS * ENTRY
                add_to(totals, f)
            totals += TILE_TOKENS * SUMS
            act += tile_stride(n_groups)

    return run_tiles


def _make_run_matrices(weights: ModuleType, n_tokens: int, block_nbytes: int) -> Any:
    """The same with products of matrices, whose sums lie in memory.

    All products of some blocks come first, then all that is done with their sums: hardly anything of the one runs
    beside the other, and a sum that was just stored is slow to read. The second part takes half of the rows at a time,
    and asks for the blocks that follow, of weights and of activations. At `room` lie the float sums of a part of a
    chain, then the integer sums of MATRIX_BLOCKS blocks.
    """
    tile = make_dot_tile(n_tokens, PANEL)
    zero, add_to, load, store = tile.zero, tile.add_to, tile.load, tile.store
    sum_block, finish = weights.sum_block(tile), weights.finish_block(tile)
    sums_nbytes = weights.N_SUMS * PANEL_SUMS + LINE  # the line keeps them apart in the first-level cache
    ask_for_block = make_prefetch_lines(range(0, TILE_TOKENS * BLOCK, LINE), False)
    ask_for_weights = make_prefetch_lines(range(0, block_nbytes // 2, LINE), True)
    ask_for_tokens = make_prefetch_lines(range(0, TILE_TOKENS * BLOCK // 2, LINE), True)

    @device
    def multiply(block, count, a, ahead, sums):
        for _ in range(count):
            ask_for_block(ahead)
            sum_block(block, a, 0, 0, sums)  # no tables: weights are signed
            block += block_nbytes
            a += TILE_TOKENS * BLOCK
            ahead += TILE_TOKENS * BLOCK
            sums += sums_nbytes

    @device
    def finish_blocks(f, block, count, tables, table_step, sums, coming, a):
        for _ in range(count):
            ask_for_weights(coming)
            ask_for_tokens(a)
            scales = block + SCALES
            scales = scales, scales + SUMS, scales + 2 * SUMS  # as many of them as there are
            f = finish(f, (sums, sums + PANEL_SUMS), scales, tables, table_step)  # as many sums as there are
            block += block_nbytes
            tables += TILE_TOKENS * ENTRY
            sums += sums_nbytes
            coming += block_nbytes
            a += TILE_TOKENS * BLOCK
        return f

    @device
    def run_matrices(panel, first, last, n_blocks, n_groups, act, n_tiles, totals, room):
        keep_apart()
        sums, step = room + TILE_TOKENS * SUMS, TILE_TOKENS * n_groups
        for _ in range(n_tiles):
            block = panel
            for c in range(first, last):
                a = hold(act + c * n_groups * (TILE_TOKENS * BLOCK))
                ahead = hold(a + tile_stride(n_groups))
                tables = hold(act + c * n_groups * (TILE_TOKENS * ENTRY))
                left, continued = (n_blocks - c + W - 1) // W, False
                while left:
                    count = left // ((left + MATRIX_BLOCKS - 1) // MATRIX_BLOCKS)  # about as many every time
                    left -= count
                    multiply(block, count, a, ahead, sums)
                    coming, a_coming = block + count * block_nbytes, a + count * (TILE_TOKENS * BLOCK)
                    for half in range(2):
                        held = room + half * (TILE_TOKENS * VECTOR)
                        f = load(held) if continued else zero(held)
                        f = finish_blocks(
                            f, block + half * VECTOR, count, tables, step, sums + half * (PANEL_SUMS // 2),
                            coming + half * (block_nbytes // 2), a_coming + half * (TILE_TOKENS * BLOCK // 2),
                        )  # fmt: skip
                        if left:
                            store(held, f)
                        else:
                            add_to(totals + half * VECTOR, f)
                    block, a, continued = coming, a_coming, True
                    ahead += count * (TILE_TOKENS * BLOCK)
                    tables += count * (TILE_TOKENS * ENTRY)
            totals += TILE_TOKENS * SUMS
            act += tile_stride(n_groups)

    return run_matrices


@device
def clear_totals(totals, n_tokens):
    for i in range(0, n_tokens * SUMS, VECTOR):
        store_f32(totals + i, splat_f32(0.0))


@device
def clear_tiles(totals, n_tokens):
    """The totals of all tiles that n_tokens take, which is what chains_by_tiles writes."""
    clear_totals(totals, (n_tokens + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS)


@device
def whole_rows(w, row_bytes, n_rows, scratch):
    """Address of 2 W rows: w, or a copy completed with zeros where fewer are left."""
    if n_rows >= 2 * W:
        return w
    for i in range(n_rows * row_bytes):
        store_i8(scratch + i, load_u8(w + i))
    for i in range(n_rows * row_bytes, 2 * W * row_bytes):
        store_i8(scratch + i, 0)
    return scratch


@device
def ask_for_totals(out, add, t, count, row, n_rows):
    """Ask for what store_totals will read and write: elsewhere it would wait for line after line."""
    for i in range(count):
        where = 4 * ((t + i) * n_rows + row)
        for line in range(0, SUMS, LINE):
            if add:
                prefetch_near(add + where + line)
            prefetch_write(out + where + line)


@device
def store_totals(totals, out, add, t, count, row, n_rows):
    """Sums of tokens t .. t + count - 1, rows row .. row + 2 W - 1 as far as there are, to out: (n_tokens, n_rows)"""
    for i in range(count):
        sums, where = totals + i * SUMS, 4 * ((t + i) * n_rows + row)
        if row + 2 * W <= n_rows:
            for half in range(0, SUMS, 4 * W):
                value = load_f32(sums + half)
                if add:
                    value = value + load_f32(add + where + half)
                store_f32(out + where + half, value)
        else:
            for r in range(0, 4 * (n_rows - row), 4):
                below = load_scalar(add + where + r) if add else np.float32(0.0)
                store_scalar(out + where + r, load_scalar(sums + r) + below)
