"""out[t] = W x[t]: a weight matrix from the mapped file by the activations of a batch.

One token streams every row once (decode: the limit is the memory). A few use W rows at a time, put side by side in
registers (few_tokens.py). Many unpack a panel of 2 W rows into per-thread scratch and use it tile by tile (prefill: the
limit is the multiplier; panel.py). All add up in the same order, so a token's result is bit for bit the same whichever
way it was computed and whatever else was in the batch:

    lane c sums the blocks b with b % W == c, in order, by fused multiply-adds; then the lanes are added in order.

Threads take chunks of rows from the op's work counter.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

from .activation import first_tile, n_groups_of, tile_stride
from .compiler import device, kernel
from .dot_matrix import leave_matrices, use_matrices
from .few_tokens import make_few_tokens
from .panel import ask_for_totals, make_panel_product, store_totals
from .scalar import atomic_add, keep_apart, load_i64, load_u8, store_i8
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .shares import distance, is_streamed, next_unit, rows_of_unit, take_rows
from .simd import W, load_f32, splat_f32, store_f32, transpose_square
from .weights import BLOCK_TYPES
from .widths import FEW_TOKENS, SLICED_TOKENS, TILE_TOKENS, TOTALS

TAIL_BYTES = 64 * W  # of scratch: the blocks of an incomplete group, zero beyond them


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


@cache
def make_decode(weights: ModuleType) -> Any:
    """Rows by one token, for a block type; add may be 0.

    `far` is how many bytes ahead rows are asked for. `scratch` is this thread's: an incomplete group, sums, their
    transpose.
    """
    sum_row = make_row_sums(weights)
    assert W // (weights.BLOCK // 32) * weights.BLOCK_BYTES <= TAIL_BYTES

    @device
    def decode_rows(w, row_bytes, n_rows, n, act, out, add, first, last, far, scratch):
        keep_apart()
        lanes = scratch + TAIL_BYTES
        columns = lanes + 4 * W * W
        if n % (32 * W):
            for i in range(0, TAIL_BYTES, 4 * W):
                store_f32(scratch + i, splat_f32(0.0))
        for row in range(first, last, W):
            for r in range(W):
                address = w + min(row + r, n_rows - 1) * row_bytes
                store_f32(lanes + r * 4 * W, sum_row(address, row_bytes, far, act, n, scratch))
            store_rows(lanes, columns, out, add, row, n_rows)

    return decode_rows


def make_stream(weights: ModuleType) -> Any:
    """The rows that a thread takes, by one token."""
    decode_rows = make_decode(weights)

    @device
    def stream(w, row_bytes, n_rows, n, act, out, add, nth, work, scratch):
        unit = rows_of_unit(row_bytes)
        row, last = take_rows(work, n_rows, nth, unit)
        while row < last:
            end, following, following_last = next_unit(work, n_rows, nth, unit, row, last)
            far = distance(row * row_bytes, unit * row_bytes, following * row_bytes)
            decode_rows(w, row_bytes, n_rows, n, act, out, add, row, end, far, scratch)
            row, last = following, following_last

    return stream


def make_use_registers(weights: ModuleType) -> Any:
    """The rows that a thread takes, by up to FEW_TOKENS tokens."""
    by_few = make_few_tokens(weights)

    @device
    def use_registers(w, row_bytes, n_rows, n, act, n_tokens, out, add, nth, work, totals):
        unit = 2 * W
        row, last = take_rows(work, n_rows, nth, unit)
        while row < last:
            _, following, following_last = next_unit(work, n_rows, nth, unit, row, last)
            rows, coming = w + row * row_bytes, w + following * row_bytes
            by_few(rows, row_bytes, n_rows - row, n, coming, act, n_tokens, totals, totals + TOTALS)
            store_totals(totals, out, add, 0, n_tokens, row, n_rows)
            row, last = following, following_last

    return use_registers


def make_use_panels(weights: ModuleType) -> Any:
    """The panels that a thread takes, by many tokens."""
    product = make_panel_product(weights)
    unpack, by_tiles, by_slices = product.unpack, product.by_tiles, product.by_slices

    @device
    def use_panel(w, row_bytes, n_rows, n, panel, act, n_tokens, out, add, row, coming, totals):
        rows = w + row * row_bytes
        if FEW_TOKENS < n_tokens <= SLICED_TOKENS:  # at some levels no number is
            by_slices(rows, row_bytes, n_rows - row, n, panel, coming, act, n_tokens, totals)
            store_totals(totals, out, add, 0, n_tokens, row, n_rows)
            return
        unpack(rows, row_bytes, n_rows - row, n, panel, coming)
        for t in range(0, n_tokens, TILE_TOKENS):
            count = min(n_tokens - t, TILE_TOKENS)
            ask_for_totals(out, add, t, count, row, n_rows)
            by_tiles(panel, n, act, count, totals)
            store_totals(totals, out, add, t, count, row, n_rows)
            act += tile_stride(n_groups_of(n))

    @device
    def use_panels(w, row_bytes, n_rows, n, act, n_tokens, out, add, nth, work, totals):
        panel, unit = totals + TOTALS, 2 * W
        use_matrices()
        row = atomic_add(work, 1) * unit
        while row < n_rows:
            coming = w + (row + nth * unit) * row_bytes
            use_panel(w, row_bytes, n_rows, n, panel, act, n_tokens, out, add, row, coming, totals)
            row = atomic_add(work, 1) * unit
        leave_matrices()

    return use_panels


def make_mul_mat(weights: ModuleType) -> Any:
    """The mul_mat kernel of a block type."""
    stream, use_registers, use_panels = make_stream(weights), make_use_registers(weights), make_use_panels(weights)

    def mul_mat(w, row_bytes, n_rows, n, act, out, add, count, scratch, scratch_bytes, work, ith, nth):
        """out[t] = w act[t] (+ add[t]); w: (n_rows, n), act: quantized rows, out, add: (n_tokens, n_rows) float32.

        `count` is the address of the number of tokens, `scratch` of scratch_bytes a thread.
        """
        n_tokens, mine = load_i64(count), scratch + ith * scratch_bytes
        tiles = first_tile(act, n_groups_of(n))
        if n_tokens == 0:
            return
        if is_streamed(n_tokens):
            stream(w, row_bytes, n_rows, n, act, out, add, nth, work, mine)
        elif n_tokens <= FEW_TOKENS:
            use_registers(w, row_bytes, n_rows, n, tiles, n_tokens, out, add, nth, work, mine)
        else:
            use_panels(w, row_bytes, n_rows, n, tiles, n_tokens, out, add, nth, work, mine)

    return kernel(mul_mat)


globals().update({f"mul_mat_{name}": make_mul_mat(weights) for name, weights in BLOCK_TYPES.items()})
