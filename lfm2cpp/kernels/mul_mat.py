"""out[t] = W x[t]: a weight matrix from the mapped file by the activations of a batch.

One token streams every row once (decode: the limit is the memory). More tokens unpack a panel of 2 W rows into
per-thread scratch and use it for every token (prefill: the limit is the multiplier). Both add up in the same order, so
a token's result is bit for bit the same whichever way it was computed and whatever else was in the batch:

    lane c sums the blocks b with b % W == c, in order, by fused multiply-adds; then the lanes are added in order.

Threads take chunks of rows from the op's work counter.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from .activation import n_groups_of, tile_stride
from .compiler import device, kernel
from .scalar import atomic_add, keep_apart, load_i64, load_u8, store_i8
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .simd import W, load_f32, prefetch, splat_f32, store_f32, transpose_square
from .tile import BLOCK, ENTRY, make_tile
from .weights import q4_0, q4_1, q6_K, q8_0
from .widths import TILE_TOKENS

CHUNKS_A_THREAD = 8
# Bytes that decode asks for ahead of what it uses. The hardware's prefetchers stop at every page of 4 KiB: on a Xeon of
# 2023 with two loaded cores, Q4_0 went from 7.0 to 9.1 GB/s and Q8_0 from 12.6 to 14.3 (2026-11-21).
PREFETCH = 2048
SMALL_TILE = 2


@device
def rows_of_chunk(n_rows, nth, unit):
    """Rows a thread takes at a time: whole units, about CHUNKS_A_THREAD times a thread."""
    rows = n_rows // (nth * CHUNKS_A_THREAD)
    return max(unit, rows // unit * unit)


@device
def store_rows(lanes, columns, out, add, row, n_rows):
    """Add the W lanes of each of W sums in order and store them as rows row .. row + W - 1."""
    transpose_square(lanes, columns, 4 * W)
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
    """sum_row(row, row_bytes, act, n, scratch) -> W partial sums of one row for a block type."""
    row_group, dot_group = weights.row_group, weights.dot_group
    group_bytes = W // (weights.BLOCK // 32) * weights.BLOCK_BYTES or weights.BLOCK_BYTES

    @device
    def sum_row(row, row_bytes, act, n, scratch):
        n_groups = n_groups_of(n)
        n_full = n // (32 * W)
        acc = splat_f32(0.0)
        for g in range(n_full):
            group = row_group(row, g)
            for i in range(PREFETCH, PREFETCH + group_bytes, 64):
                prefetch(group + i)
            acc = dot_group(acc, group, act, n_groups, g)
        if n_full < n_groups:
            # The last group is not whole: complete it with zero blocks.
            tail = row_group(row, n_full)
            n_tail = row + row_bytes - tail
            for i in range(n_tail):
                store_i8(scratch + i, load_u8(tail + i))
            acc = dot_group(acc, scratch, act, n_groups, n_full)
        return acc

    return sum_row


def make_decode(weights: ModuleType) -> Any:
    """Rows by one token, for a block type. `scratch` is this thread's: an incomplete group, sums, their transpose."""
    sum_row = make_row_sums(weights)

    @device
    def decode_rows(w, row_bytes, n_rows, n, act, out, add, first, last, scratch):
        keep_apart()
        lanes = scratch + TAIL_BYTES
        columns = lanes + 4 * W * W
        if n % (32 * W):
            for i in range(0, TAIL_BYTES, 4 * W):
                store_f32(scratch + i, splat_f32(0.0))
        for row in range(first, last, W):
            for r in range(W):
                address = w + min(row + r, n_rows - 1) * row_bytes
                store_f32(lanes + r * 4 * W, sum_row(address, row_bytes, act, n, scratch))
            store_rows(lanes, columns, out, add, row, n_rows)

    return decode_rows


TAIL_BYTES = 64 * W  # of scratch: the blocks of an incomplete group, zero beyond them
assert max(W // (t.BLOCK // 32) * t.BLOCK_BYTES for t in (q4_0, q4_1, q6_K, q8_0)) <= TAIL_BYTES


def make_unpack(weights: ModuleType) -> Any:
    unpack_block, panel_block = weights.unpack_block, weights.PANEL_BLOCK

    @device
    def unpack_panel(w, row_bytes, n, panel):
        keep_apart()
        n_blocks = n // 32
        for c in range(min(W, n_blocks)):
            for b in range(c, n_blocks, W):
                unpack_block(w, row_bytes, b, panel)
                panel += panel_block

    return unpack_panel


def make_run_tile(weights: ModuleType, n_tokens: int) -> Any:
    """A panel by the first n_tokens tokens of a tile, for a block type."""
    tile, panel_block = make_tile(n_tokens), weights.PANEL_BLOCK
    zero, add_to, finish = tile.zero, tile.add_to, weights.finish_block(tile)

    @device
    def run_tile(panel, act, n, totals):
        keep_apart()
        n_groups, n_blocks = n_groups_of(n), n // 32
        for i in range(2 * n_tokens):
            store_f32(totals + i * 4 * W, splat_f32(0.0))
        for c in range(min(W, n_blocks)):
            f = zero(0)
            a = act + c * n_groups * (TILE_TOKENS * BLOCK)
            tables = act + c * n_groups * (TILE_TOKENS * ENTRY)
            for _ in range(c, n_blocks, W):
                f = finish(f, panel, a, tables, TILE_TOKENS * n_groups)
                panel += panel_block
                a += TILE_TOKENS * BLOCK
                tables += TILE_TOKENS * ENTRY
            add_to(totals, f)

    return run_tile


@device
def store_tile(totals, out, add, ld, t, count, row, n_rows):
    """Sums of `count` tokens from t on, rows row .. row + 2 W - 1 as far as there are; ld: bytes between two tokens"""
    for i in range(count):
        sums, where = totals + i * 8 * W, (t + i) * ld + 4 * row
        if row + 2 * W <= n_rows:
            for half in range(0, 8 * W, 4 * W):
                value = load_f32(sums + half)
                if add:
                    value = value + load_f32(add + where + half)
                store_f32(out + where + half, value)
        else:
            for r in range(0, 4 * (n_rows - row), 4):
                below = load_scalar(add + where + r) if add else np.float32(0.0)
                store_scalar(out + where + r, load_scalar(sums + r) + below)


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


def make_prefill(weights: ModuleType) -> Any:
    """A panel of 2 W rows by every token, for a block type."""
    unpack_panel, panel_block = make_unpack(weights), weights.PANEL_BLOCK
    wide, small = make_run_tile(weights, TILE_TOKENS), make_run_tile(weights, SMALL_TILE)

    @device
    def prefill_panel(w, row_bytes, n_rows, n, act, out, add, row, n_tokens, scratch):
        totals, ld = scratch, 4 * n_rows
        panel = totals + TILE_TOKENS * 8 * W
        rows = whole_rows(w + row * row_bytes, row_bytes, n_rows - row, panel + n // 32 * panel_block)
        unpack_panel(rows, row_bytes, n, panel)
        for t in range(0, n_tokens, TILE_TOKENS):
            count = min(n_tokens - t, TILE_TOKENS)
            if count <= SMALL_TILE:
                small(panel, act, n, totals)
            else:
                wide(panel, act, n, totals)
            store_tile(totals, out, add, ld, t, count, row, n_rows)
            act += tile_stride(n)

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
        if n_tokens == 1:
            step = rows_of_chunk(n_rows, nth, W)
            first = atomic_add(work, 1) * step
            while first < n_rows:
                last = min(first + step, n_rows)
                decode_rows(w, row_bytes, n_rows, n, act, out, add, first, last, mine)
                first = atomic_add(work, 1) * step
            return
        row = atomic_add(work, 1) * (2 * W)
        while row < n_rows:
            prefill_panel(w, row_bytes, n_rows, n, act, out, add, row, n_tokens, mine)
            row = atomic_add(work, 1) * (2 * W)

    return kernel(mul_mat)


mul_mat_q4_0 = make_mul_mat(q4_0)
mul_mat_q4_1 = make_mul_mat(q4_1)
mul_mat_q6_K = make_mul_mat(q6_K)
mul_mat_q8_0 = make_mul_mat(q8_0)
