"""out[t] = W x[t] for F32, F16 and BF16 weights by float32 activations.

One token at a time or a panel, as in mul_mat.py and with the same promise; here lane c of a row's sum takes the columns
k with k % W == c, one after the other: a chain.

Where the CPU multiplies BF16 faster, two elements are one column of 4 bytes, and so are the activations, which
round_rows rounds to BF16; the rest is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiler import device, kernel
from .mul_mat import store_rows
from .ops import segment_of, share_of
from .panel import SUMS, store_totals
from .scalar import atomic_add, keep_apart, load_i64, load_u8, store_i8
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .shares import FAR, distance, is_float_streamed, make_prefetches, next_unit, rows_of_unit, take_rows
from .simd import W, load_f32, make_prefetch_lines, splat_f32, store_bf16, store_f32
from .tile import make_tile
from .weights import floats
from .widths import FLOAT_SMALL_TILE_TOKENS, FLOAT_TILE_TOKENS, LINE

# Rows that decode reads side by side: where vectors are short, the multiply-adds of one chain, which wait for each
# other, would be slower than the memory.
ROWS_AT_ONCE = 1 if W == 16 else 2
TAIL_BYTES = 4 * LINE  # of scratch: the last columns of a row, at most a line, and those of the activations
UNROLL = 4  # columns of a chain at a time: loop arithmetic would take a tenth of it
ENTRY = 4  # bytes of an activation
STEP = FLOAT_TILE_TOKENS * ENTRY  # bytes of a tile's activations of one column
COPIED_RUNS = 64  # of a tile's rows that chain_rows reads again and again, 24 KB at the widest


@device
def runs_of(n):
    """Runs of W columns: each advances the chain of every lane by one."""
    return (n + W - 1) // W


@device
def tile_stride(n):
    """Bytes of a tile of chained rows of n elements."""
    return runs_of(n) * (W * STEP)


@device
def chain_stride(runs):
    """Bytes of a chain of a panel. The line between two chains keeps them apart in the first-level cache, where lines
    a multiple of 4096 bytes apart share few places: a run of columns is unpacked to all chains at once."""
    return runs * (8 * W) + LINE


@kernel
def chain_rows(x, n, chained, count, ith, nth):
    """Copy float32 rows for prefill, if they are not streamed, chain by chain, the tokens of a tile side by side:

    chained[t // FLOAT_TILE_TOKENS, lane, m, t % FLOAT_TILE_TOKENS] = x[t, m W + lane], zero from n on
    """
    n_tokens, runs = load_i64(count), runs_of(n)
    if is_float_streamed(n_tokens):
        return
    begin, end = share_of((n_tokens + FLOAT_TILE_TOKENS - 1) // FLOAT_TILE_TOKENS, ith, nth)
    for tile in range(begin, end):
        first = tile * FLOAT_TILE_TOKENS
        rows, n_rows = x + 4 * first * n, min(FLOAT_TILE_TOKENS, n_tokens - first)
        for m in range(0, runs, COPIED_RUNS):
            chain_part(rows, n_rows, n, m, min(m + COPIED_RUNS, runs), chained + tile * tile_stride(n))


@device
def chain_part(rows, n_rows, n, first, last, chained):
    """Runs first .. last - 1 of one tile's rows, chain by chain: written in order, read from the nearest cache."""
    runs = runs_of(n)
    for lane in range(W):
        out = chained + lane * runs * STEP
        for m in range(first, last):
            at = 4 * (m * W + lane)
            if at >= 4 * n:
                for t in range(FLOAT_TILE_TOKENS):
                    store_scalar(out + m * STEP + t * ENTRY, np.float32(0.0))
            elif n_rows == FLOAT_TILE_TOKENS:
                for t in range(FLOAT_TILE_TOKENS):
                    store_scalar(out + m * STEP + t * ENTRY, load_scalar(rows + at + 4 * t * n))
            else:
                for t in range(n_rows):
                    store_scalar(out + m * STEP + t * ENTRY, load_scalar(rows + at + 4 * t * n))


@kernel
def round_rows(x, n, pairs, count, ith, nth):
    """float32 rows x: (n_tokens, n) -> BF16 rows, as mul_mat_bf16_pairs takes them; n is a multiple of SEGMENT"""
    first, last = segment_of(load_i64(count) * n, ith, nth)
    for i in range(first, last, W):
        store_bf16(pairs + 2 * i, load_f32(x + 4 * i))


def make_row_sums(weights: floats.FloatWeights) -> Any:
    load, size, multiply_add = weights.load, weights.size, weights.multiply_add
    columns = LINE // size  # of a cache line
    (ask,) = make_prefetches(LINE, 1)

    @device
    def add_line(row, x, total):
        for i in range(0, columns, W):
            total = multiply_add(load(row + i * size), load_f32(x + i * 4), total)
        return total

    @device
    def add_tail(row, x, n, total, scratch):
        """The columns after the last whole line of a row, and of x, completed with zeros."""
        left, x_tail = n % columns, scratch + LINE
        for i in range(LINE):
            store_i8(scratch + i, load_u8(row + (n - left) * size + i) if i < left * size else 0)
        for i in range(columns * 4):
            store_i8(x_tail + i, load_u8(x + (n - left) * 4 + i) if i < left * 4 else 0)
        return add_line(scratch, x_tail, total)

    @device
    def sum_row(row, far, x, n, scratch):
        total = splat_f32(0.0)
        for k in range(0, n - columns + 1, columns):
            ask(row + k * size, far)
            total = add_line(row + k * size, x + 4 * k, total)
        return add_tail(row, x, n, total, scratch) if n % columns else total

    @device
    def sum_two_rows(row, other, far, x, n, scratch):
        total = other_total = splat_f32(0.0)
        for k in range(0, n - columns + 1, columns):
            ask(row + k * size, far)
            total = add_line(row + k * size, x + 4 * k, total)
            ask(other + k * size, far)
            other_total = add_line(other + k * size, x + 4 * k, other_total)
        if n % columns:
            total = add_tail(row, x, n, total, scratch)
            other_total = add_tail(other, x, n, other_total, scratch)
        return total, other_total

    return sum_row, sum_two_rows


def make_decode(weights: floats.FloatWeights) -> Any:
    """Rows by each of a few tokens in turn; out and add (or 0) take `stride` bytes a token.

    `far` is how many bytes ahead rows are asked for.
    """
    (sum_row, sum_two_rows), size = make_row_sums(weights), weights.size

    @device
    def decode_rows(w, n_rows, n, x, n_tokens, out, add, stride, first, last, far, scratch):
        keep_apart()
        lanes = scratch + TAIL_BYTES
        columns = lanes + 4 * W * W
        for t in range(n_tokens):
            mine, result, base = x + 4 * t * n, out + t * stride, add + t * stride if add else 0
            for row in range(first, last, W):
                for r in range(0, W, ROWS_AT_ONCE):
                    address, sums = w + min(row + r, n_rows - 1) * n * size, lanes + r * 4 * W
                    if ROWS_AT_ONCE == 1:
                        store_f32(sums, sum_row(address, far, mine, n, scratch))
                    else:
                        other = w + min(row + r + 1, n_rows - 1) * n * size
                        total, other_total = sum_two_rows(address, other, far, mine, n, scratch)
                        store_f32(sums, total)
                        store_f32(sums + 4 * W, other_total)
                store_rows(lanes, columns, result, base, row, n_rows)

    return decode_rows


def make_unpack(weights: floats.FloatWeights) -> Any:
    transpose, size = weights.transpose, weights.size
    runs_of_line = LINE // (W * size)  # a line that has left the first-level cache would have to come again
    ask_for_line = make_prefetch_lines(range(0, 2 * W * LINE, LINE), False)

    @device
    def complete(w, n, k, square):
        """Columns k .. k + W - 1 of W rows as in the file, at square, with zeros beyond column n."""
        bytes_left = max(0, n - k) * size
        for r in range(W):
            for i in range(W * size):
                store_i8(square + r * W * size + i, load_u8(w + (r * n + k) * size + i) if i < bytes_left else 0)

    @device
    def unpack_panel(w, n, panel, coming, square):
        """2 W rows at w, interleaved for the tile; those at `coming` will be next."""
        keep_apart()
        runs = runs_of(n)
        chain = chain_stride(runs)
        for begin in range(0, runs, runs_of_line):
            ask_for_line(coming + 2 * W * begin * W * size)
            for half in range(2):
                rows = w + half * W * n * size
                for m in range(begin, min(begin + runs_of_line, runs)):
                    k, out = m * W, panel + (2 * m + half) * 4 * W
                    if k + W <= n:
                        transpose(rows + k * size, n * size, out, chain)
                    else:
                        complete(rows, n, k, square)
                        transpose(square, W * size, out, chain)

    return unpack_panel


def make_run_tile(n_tokens: int, element: str) -> Any:
    tile = make_tile(n_tokens, element)
    zero, step, add, store = tile.zero, tile.fma, tile.add, tile.store

    ask_for_columns = make_prefetch_lines(range(0, UNROLL * STEP, LINE), False)

    @device
    def run_chain(panel, x, runs):
        """Meanwhile it asks for the same columns of the tile that follows, which may no longer be near."""
        f, ahead = zero(0), runs * (W * STEP)
        for m in range(0, runs - UNROLL + 1, UNROLL):
            ask_for_columns(x + m * STEP + ahead)
            for i in range(UNROLL):
                f = step(f, panel + (m + i) * 8 * W, x + (m + i) * STEP, ENTRY)
        for m in range(runs // UNROLL * UNROLL, runs):
            f = step(f, panel + m * 8 * W, x + m * STEP, ENTRY)
        return f

    @device
    def run_tile(panel, x, n, totals):
        keep_apart()
        runs = runs_of(n)
        total = zero(0)
        for _ in range(W):
            total = add(total, run_chain(panel, x, runs))
            panel += chain_stride(runs)
            x += runs * STEP
        store(totals, SUMS, total)

    return run_tile


def make_by_tile(weights: floats.FloatWeights) -> Any:
    wide = make_run_tile(FLOAT_TILE_TOKENS, weights.element)
    small = make_run_tile(FLOAT_SMALL_TILE_TOKENS, weights.element)

    @device
    def by_tile(panel, n, chained, count, totals):
        """totals = the panel by the first `count` tokens of a tile, SUMS bytes a token"""
        if count <= FLOAT_SMALL_TILE_TOKENS:
            small(panel, chained, n, totals)
        else:
            wide(panel, chained, n, totals)

    return by_tile


def make_prefill(weights: floats.FloatWeights) -> Any:
    unpack_panel, by_tile, size = make_unpack(weights), make_by_tile(weights), weights.size

    @device
    def prefill_panel(w, n_rows, n, chained, out, add, row, n_tokens, nth, scratch):
        totals = scratch
        square = totals + FLOAT_TILE_TOKENS * SUMS
        panel = square + 4 * W * W
        unpack_panel(w + row * n * size, n, panel, w + (row + nth * (2 * W)) * n * size, square)
        for t in range(0, n_tokens, FLOAT_TILE_TOKENS):
            count = min(n_tokens - t, FLOAT_TILE_TOKENS)
            by_tile(panel, n, chained, count, totals)
            store_totals(totals, out, add, t, count, row, n_rows)
            chained += tile_stride(n)

    return prefill_panel


def make_mul_mat(weights: floats.FloatWeights) -> Any:
    """The mul_mat kernel of a float type."""
    decode_rows, prefill_panel, size = make_decode(weights), make_prefill(weights), weights.size

    def mul_mat(w, n_rows, n, x, chained, out, add, count, scratch, scratch_bytes, work, ith, nth):
        """out[t] = w x[t] (+ add[t]); w: (n_rows, n) columns, x: (n_tokens, n) of 4 bytes, chained: by chain_rows."""
        n_tokens = load_i64(count)
        mine = scratch + ith * scratch_bytes
        if n_tokens == 0:
            return
        ld = 4 * n_rows
        if is_float_streamed(n_tokens):
            row_bytes = n * size
            unit = rows_of_unit(row_bytes)
            row, last = take_rows(work, n_rows, nth, unit)
            while row < last:
                end, following, following_last = next_unit(work, n_rows, nth, unit, row, last)
                far = distance(row * row_bytes, unit * row_bytes, following * row_bytes)
                decode_rows(w, n_rows, n, x, n_tokens, out, add, ld, row, end, far, mine)
                row, last = following, following_last
            return
        row = atomic_add(work, 1) * (2 * W)
        while row < n_rows:
            if row + 2 * W <= n_rows:
                prefill_panel(w, n_rows, n, chained, out, add, row, n_tokens, nth, mine)
            else:
                decode_rows(w, n_rows, n, x, n_tokens, out, add, ld, row, n_rows, FAR, mine)
            row = atomic_add(work, 1) * (2 * W)

    return kernel(mul_mat)


mul_mat_f32 = make_mul_mat(floats.f32)
mul_mat_f16 = make_mul_mat(floats.f16)
mul_mat_bf16 = make_mul_mat(floats.bf16)
mul_mat_bf16_pairs = make_mul_mat(floats.bf16_pairs)
