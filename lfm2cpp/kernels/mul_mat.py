"""out[t] = W x[t]: a weight matrix from the mapped file by the activations of a batch.

One token streams every row once (decode: the limit is the memory), and so do a few: each goes over the rows in hand
while those are in the first-level cache. More tokens unpack a panel of 2 W rows into per-thread scratch and use it for
every token (prefill: the limit is the multiplier). Both add up in the same order, so a token's result is bit for bit
the same whichever way it was computed and whatever else was in the batch:

    lane c sums the blocks b with b % W == c, in order, by fused multiply-adds; then the lanes are added in order.

Threads take chunks of rows from the op's work counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .activation import first_tile, n_groups_of, streamed_row, tile_stride
from .compiler import device, kernel
from .dot_tile import BLOCK, ENTRY, make_dot_tile
from .scalar import atomic_add, keep_apart, load_i64, load_u8, store_i8
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .shares import distance, is_streamed, next_unit, rows_of_unit, take_rows
from .simd import (
    W,
    load_f32,
    make_prefetch_lines,
    prefetch_near,
    prefetch_write,
    splat_f32,
    store_f32,
    transpose_square,
)
from .weights import q4_0, q4_1, q6_K, q8_0
from .widths import LINE, MEDIUM_TILE_TOKENS, SMALL_TILE_TOKENS, TILE_TOKENS

FEW_TOKENS = 4 * TILE_TOKENS  # up to which a panel is used chain by chain
SUMS = 8 * W  # bytes of one token's sums of the rows of a panel


@device
def store_rows(lanes, columns, out, add, row, n_rows):
    """Add the W lanes of each of W sums in order and store them as rows row .. row + W - 1."""
    transpose_square(lanes, 4 * W, columns, 4 * W)
    total = splat_f32(0.0)
    for c in range(W):
        total = total + load_f32(columns + c * 4 * W)
    if row + W <= n_rows:
        if add:
            total = total + load_f32(add + 4 * row)
        store_f32(out + 4 * row, total)
        return
    store_f32(columns, total)
    for r in range(n_rows - row):
        value = load_scalar(columns + 4 * r)
        if add:
            value += load_scalar(add + 4 * (row + r))
        store_scalar(out + 4 * (row + r), value)


def make_row_sums(weights: ModuleType) -> Any:
    """sum_row(row, row_bytes, far, act, n, scratch) -> W partial sums of one row for a block type."""
    row_group, dot_group = weights.row_group, weights.dot_group

    @device
    def sum_row(row, row_bytes, far, act, n, scratch):
        n_groups = n_groups_of(n)
        n_full = n // (32 * W)
        acc = splat_f32(0.0)
        for g in range(n_full):
            acc = dot_group(acc, row_group(row, g), act, n_groups, g, far)
        if n_full < n_groups:
            # The last group is not whole: complete it with zero blocks.
            tail = row_group(row, n_full)
            n_tail = row + row_bytes - tail
            for i in range(n_tail):
                store_i8(scratch + i, load_u8(tail + i))
            acc = dot_group(acc, scratch, act, n_groups, n_full, far)
        return acc

    return sum_row


def make_decode(weights: ModuleType) -> Any:
    """Rows by each of a few tokens in turn, for a block type; out and add (or 0) take `stride` bytes a token.

    `far` is how many bytes ahead rows are asked for. `scratch` is this thread's: an incomplete group, sums, their
    transpose.
    """
    sum_row = make_row_sums(weights)

    @device
    def decode_rows(w, row_bytes, n_rows, n, act, n_tokens, out, add, stride, first, last, far, scratch):
        keep_apart()
        lanes = scratch + TAIL_BYTES
        columns = lanes + 4 * W * W
        if n % (32 * W):
            for i in range(0, TAIL_BYTES, 4 * W):
                store_f32(scratch + i, splat_f32(0.0))
        for t in range(n_tokens):
            x, result, base = streamed_row(act, n_groups_of(n), t), out + t * stride, add + t * stride if add else 0
            for row in range(first, last, W):
                for r in range(W):
                    address = w + min(row + r, n_rows - 1) * row_bytes
                    store_f32(lanes + r * 4 * W, sum_row(address, row_bytes, far, x, n, scratch))
                store_rows(lanes, columns, result, base, row, n_rows)

    return decode_rows


TAIL_BYTES = 64 * W  # of scratch: the blocks of an incomplete group, zero beyond them
assert max(W // (t.BLOCK // 32) * t.BLOCK_BYTES for t in (q4_0, q4_1, q6_K, q8_0)) <= TAIL_BYTES


def make_run_chains(weights: ModuleType, n_tokens: int) -> Any:
    """Some chains of a panel by the first n_tokens tokens of each tile, for a block type."""
    tile, panel_block = make_dot_tile(n_tokens), weights.PANEL_BLOCK
    zero, add_to, finish = tile.zero, tile.add_to, weights.finish_block(tile)
    ask_for_block = make_prefetch_lines(range(0, TILE_TOKENS * BLOCK, LINE), False)

    @device
    def run_chains(panel, first, last, n_blocks, n_groups, act, n_tiles, totals, room):
        """totals += the products of chains first .. last - 1, unpacked at panel, with n_tiles tiles of tokens

        Meanwhile it asks for the same blocks of the tile that follows, which may no longer be near. The sums of a chain
        may lie at `room`, TILE_TOKENS * SUMS bytes.
        """
        keep_apart()
        ahead = tile_stride(n_groups)
        for _ in range(n_tiles):
            block = panel
            for c in range(first, last):
                f = zero(room)
                a = act + c * n_groups * (TILE_TOKENS * BLOCK)
                tables = act + c * n_groups * (TILE_TOKENS * ENTRY)
                for _ in range(c, n_blocks, W):
                    ask_for_block(a + ahead)
                    f = finish(f, block, a, tables, TILE_TOKENS * n_groups)
                    block += panel_block
                    a += TILE_TOKENS * BLOCK
                    tables += TILE_TOKENS * ENTRY
                add_to(totals, f)
            totals += TILE_TOKENS * SUMS
            act += tile_stride(n_groups)

    return run_chains


def run_chains_of_widths(weights: ModuleType) -> list[Any]:
    """run_chains for wide, medium and small tiles; the last two may be one."""
    widths = TILE_TOKENS, MEDIUM_TILE_TOKENS, SMALL_TILE_TOKENS
    made = {n_tokens: make_run_chains(weights, n_tokens) for n_tokens in widths}
    return [made[n_tokens] for n_tokens in widths]


@dataclass(frozen=True)
class PanelProduct:
    """A panel of 2 W rows by tokens, for a block type; totals are the sums, SUMS bytes a token.

    Many tokens go tile by tile through the whole panel, which lies in the second-level cache then; a few go through
    each chain as soon as it is unpacked, while it is in the first-level cache.
    """

    unpack: Any  # (w, row_bytes, n_rows, n, panel, coming): a panel of n_rows rows at w; those at `coming` will be next
    by_tile: Any  # (panel, n, act, count, totals): totals = the panel by the first `count` tokens of a tile
    by_few: Any  # (w, row_bytes, n_rows, n, panel, coming, act, n_tokens, totals): totals = w by up to FEW_TOKENS
    # totals: totals_nbytes of as many tokens


def make_panel_product(weights: ModuleType) -> PanelProduct:
    copy_scales, unpack_block = weights.copy_scales, weights.unpack_block
    raw_bytes, panel_block = weights.RAW_SCALES, weights.PANEL_BLOCK
    file_bytes = 2 * W * weights.BLOCK_BYTES // (weights.BLOCK // 32)  # of 32 columns of a panel
    ask_for_block = make_prefetch_lines(range(0, file_bytes, LINE), False)
    wide, medium, small = run_chains_of_widths(weights)

    @device
    def prepare(w, row_bytes, n_rows, n_blocks, raw):
        """The rows, completed if they are the last ones, and their scales at `raw`."""
        w = whole_rows(w, row_bytes, n_rows, raw + n_blocks * raw_bytes)
        for b in range(n_blocks):
            copy_scales(w, row_bytes, b, raw + b * raw_bytes)
        return w

    @device
    def unpack_chains(w, row_bytes, first, last, n_blocks, raw, panel, coming):
        keep_apart()
        for c in range(first, last):
            for b in range(c, n_blocks, W):
                ask_for_block(coming + b * file_bytes)
                unpack_block(w, row_bytes, b, raw + b * raw_bytes, panel)
                panel += panel_block

    @device
    def unpack(w, row_bytes, n_rows, n, panel, coming):
        n_blocks = n // 32
        raw = panel + n_blocks * panel_block
        w = prepare(w, row_bytes, n_rows, n_blocks, raw)
        unpack_chains(w, row_bytes, np.int64(0), min(W, n_blocks), n_blocks, raw, panel, coming)

    @device
    def by_tile(panel, n, act, count, totals):
        for i in range(0, TILE_TOKENS * SUMS, 4 * W):
            store_f32(totals + i, splat_f32(0.0))
        n_blocks, n_groups = n // 32, n_groups_of(n)
        zero, one = np.int64(0), np.int64(1)  # for a literal Numba would compile the callee once more
        room = totals + TILE_TOKENS * SUMS
        if count > MEDIUM_TILE_TOKENS:
            wide(panel, zero, min(W, n_blocks), n_blocks, n_groups, act, one, totals, room)
        elif count > SMALL_TILE_TOKENS:
            medium(panel, zero, min(W, n_blocks), n_blocks, n_groups, act, one, totals, room)
        else:
            small(panel, zero, min(W, n_blocks), n_blocks, n_groups, act, one, totals, room)

    @device
    def by_few(w, row_bytes, n_rows, n, panel, coming, act, n_tokens, totals):
        n_blocks, n_groups = n // 32, n_groups_of(n)
        raw = panel + n_groups * panel_block
        w = prepare(w, row_bytes, n_rows, n_blocks, raw)
        n_tiles, left = divmod(n_tokens, TILE_TOKENS)
        if left > MEDIUM_TILE_TOKENS:
            n_tiles, left = n_tiles + 1, 0
        last_tile, last_totals = act + n_tiles * tile_stride(n_groups), totals + n_tiles * TILE_TOKENS * SUMS
        room = last_totals + TILE_TOKENS * SUMS
        for i in range(0, room - totals, 4 * W):
            store_f32(totals + i, splat_f32(0.0))
        for c in range(min(W, n_blocks)):
            unpack_chains(w, row_bytes, c, c + 1, n_blocks, raw, panel, coming)
            wide(panel, c, c + 1, n_blocks, n_groups, act, n_tiles, totals, room)
            if left > SMALL_TILE_TOKENS:
                medium(panel, c, c + 1, n_blocks, n_groups, last_tile, np.int64(1), last_totals, room)
            elif left:
                small(panel, c, c + 1, n_blocks, n_groups, last_tile, np.int64(1), last_totals, room)

    return PanelProduct(unpack, by_tile, by_few)


@device
def totals_nbytes(n_tokens):
    """Bytes of the sums of a panel: a tile may be written that is not full, and behind it the sums of a chain."""
    return (n_tokens + 2 * TILE_TOKENS) * SUMS


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


def make_prefill(weights: ModuleType) -> Any:
    """Rows by every token, for a block type."""
    product = make_panel_product(weights)
    unpack, by_tile, by_few = product.unpack, product.by_tile, product.by_few

    @device
    def prefill_panel(w, row_bytes, n_rows, n, act, out, add, row, n_tokens, nth, totals):
        """Rows row .. row + 2 W - 1; `totals` is this thread's scratch."""
        rows, coming = w + row * row_bytes, w + (row + nth * (2 * W)) * row_bytes
        panel = totals + totals_nbytes(FEW_TOKENS)
        if n_tokens <= FEW_TOKENS:
            by_few(rows, row_bytes, n_rows - row, n, panel, coming, act, n_tokens, totals)
            store_totals(totals, out, add, 0, n_tokens, row, n_rows)
            return
        unpack(rows, row_bytes, n_rows - row, n, panel, coming)
        for t in range(0, n_tokens, TILE_TOKENS):
            count = min(n_tokens - t, TILE_TOKENS)
            ask_for_totals(out, add, t, count, row, n_rows)
            by_tile(panel, n, act, count, totals)
            store_totals(totals, out, add, t, count, row, n_rows)
            act += tile_stride(n_groups_of(n))

    return prefill_panel


def make_mul_mat(weights: ModuleType) -> Any:
    """The mul_mat kernel of a block type."""
    decode_rows, prefill_panel = make_decode(weights), make_prefill(weights)

    def mul_mat(w, row_bytes, n_rows, n, act, out, add, count, scratch, scratch_bytes, work, ith, nth):
        """out[t] = w act[t] (+ add[t]); w: (n_rows, n), act: quantized rows, out, add: (n_tokens, n_rows) float32.

        `count` is the address of the number of tokens, `scratch` of scratch_bytes a thread.
        """
        n_tokens = load_i64(count)
        mine = scratch + ith * scratch_bytes
        if n_tokens == 0:
            return
        if is_streamed(n_tokens):
            unit = rows_of_unit(row_bytes)
            row, last = take_rows(work, n_rows, nth, unit)
            while row < last:
                end, following, following_last = next_unit(work, n_rows, nth, unit, row, last)
                far = distance(row * row_bytes, unit * row_bytes, following * row_bytes)
                decode_rows(w, row_bytes, n_rows, n, act, n_tokens, out, add, 4 * n_rows, row, end, far, mine)
                row, last = following, following_last
            return
        act = first_tile(act, n_groups_of(n))
        row = atomic_add(work, 1) * (2 * W)
        while row < n_rows:
            prefill_panel(w, row_bytes, n_rows, n, act, out, add, row, n_tokens, nth, mine)
            row = atomic_add(work, 1) * (2 * W)

    return kernel(mul_mat)


mul_mat_q4_0 = make_mul_mat(q4_0)
mul_mat_q4_1 = make_mul_mat(q4_1)
mul_mat_q6_K = make_mul_mat(q6_K)
mul_mat_q8_0 = make_mul_mat(q8_0)
