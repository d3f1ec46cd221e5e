"""out[t] = W x[t] for F32, F16 and BF16 weights by float32 activations.

The same two ways and the same promise as mul_mat.py; here lane c of a row's sum takes the columns k with k % W == c, as
two chains (even and odd runs of W columns) that are added at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiler import device, kernel
from .mul_mat import store_rows
from .ops import share_of
from .scalar import atomic_add, keep_apart, load_i64, load_u8, store_i8
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .shares import FAR, distance, make_prefetches, next_unit, rows_of_unit, take_rows
from .simd import W, fma, load_f32, splat_f32, store_f32, transpose_square
from .tile import make_tile
from .weights import floats
from .widths import SMALL_TILE_TOKENS, TILE_TOKENS

RUN = 2 * W  # columns that advance both chains of every lane by one
UNROLL = 4  # columns of a chain at a time: loop arithmetic would take a tenth of it
ENTRY = 4  # bytes of an activation
STEP = TILE_TOKENS * ENTRY  # bytes of a tile's activations of one column


@device
def runs_of(n):
    return (n + RUN - 1) // RUN


@device
def tile_stride(n):
    """Bytes of a tile of chained rows of n elements."""
    return runs_of(n) * (RUN * STEP)


@kernel
def chain_rows(x, n, chained, count, ith, nth):
    """Copy float32 rows for prefill, chain by chain, the tokens of a tile side by side:

    chained[t // TILE_TOKENS, 2 lane + odd, m, t % TILE_TOKENS] = x[t, m RUN + odd W + lane], zero from n on
    """
    n_tokens, runs = load_i64(count), runs_of(n)
    if n_tokens == 1:
        return
    begin, end = share_of(n_tokens, ith, nth)
    for t in range(begin, end):
        row = x + 4 * t * n
        out = chained + t // TILE_TOKENS * tile_stride(n) + t % TILE_TOKENS * ENTRY
        for m in range(runs):
            for odd in range(2):
                first = m * RUN + odd * W
                for lane in range(W):
                    value = load_scalar(row + 4 * (first + lane)) if first + lane < n else np.float32(0.0)
                    store_scalar(out + ((2 * lane + odd) * runs + m) * STEP, value)


def make_row_sums(weights: floats.FloatWeights) -> Any:
    load, size = weights.load, weights.size
    (ask,) = make_prefetches(RUN * size, 1)

    @device
    def copy_tail(row, x, left, scratch):
        """The last columns of a row and of x, completed with zeros: RUN of each."""
        for i in range(RUN * size):
            store_i8(scratch + i, load_u8(row + i) if i < left * size else 0)
        for i in range(left):
            store_scalar(scratch + RUN * 4 + 4 * i, load_scalar(x + 4 * i))
        for i in range(left, RUN):
            store_scalar(scratch + RUN * 4 + 4 * i, 0.0)

    @device
    def sum_row(row, far, x, n, scratch):
        even = splat_f32(0.0)
        odd = splat_f32(0.0)
        for k in range(0, n - RUN + 1, RUN):
            ask(row + k * size, far)
            even = fma(load(row + k * size), load_f32(x + 4 * k), even)
            odd = fma(load(row + (k + W) * size), load_f32(x + 4 * (k + W)), odd)
        left = n % RUN
        if left:
            copy_tail(row + (n - left) * size, x + 4 * (n - left), left, scratch)
            even = fma(load(scratch), load_f32(scratch + RUN * 4), even)
            odd = fma(load(scratch + W * size), load_f32(scratch + RUN * 4 + 4 * W), odd)
        return even + odd

    return sum_row


def make_decode(weights: floats.FloatWeights) -> Any:
    """Rows by one token; `far` is how many bytes ahead they are asked for."""
    sum_row, size = make_row_sums(weights), weights.size

    @device
    def decode_rows(w, n_rows, n, x, out, add, first, last, far, scratch):
        keep_apart()
        lanes = scratch + RUN * 8
        columns = lanes + 4 * W * W
        for row in range(first, last, W):
            for r in range(W):
                address = w + min(row + r, n_rows - 1) * n * size
                store_f32(lanes + r * 4 * W, sum_row(address, far, x, n, scratch))
            store_rows(lanes, columns, out, add, row, n_rows)

    return decode_rows


def make_unpack(weights: floats.FloatWeights) -> Any:
    load, size = weights.load, weights.size

    @device
    def unpack_square(w, n, k, square):
        """Columns k .. k + W - 1 of W rows as float32, zeros beyond column n."""
        for r in range(W):
            row = w + (r * n + k) * size
            if k + W <= n:
                store_f32(square + r * 4 * W, load(row))
                continue
            bytes_left = max(0, n - k) * size
            for i in range(W * size):
                store_i8(square + W * 4 * W + i, load_u8(row + i) if i < bytes_left else 0)
            store_f32(square + r * 4 * W, load(square + W * 4 * W))

    @device
    def unpack_panel(w, n, panel, square):
        keep_apart()
        runs = runs_of(n)
        columns = square + 4 * W * (W + 1)
        for m in range(runs):
            for odd in range(2):
                for half in range(2):
                    unpack_square(w + half * W * n * size, n, m * RUN + odd * W, square)
                    transpose_square(square, columns, 4 * W)
                    for lane in range(W):
                        where = panel + ((2 * lane + odd) * runs + m) * 8 * W + half * 4 * W
                        store_f32(where, load_f32(columns + lane * 4 * W))

    return unpack_panel


def make_run_tile(n_tokens: int) -> Any:
    tile = make_tile(n_tokens)
    zero, step, add, add_to = tile.zero, tile.fma, tile.add, tile.add_to

    @device
    def run_chain(panel, x, runs):
        f = zero(0)
        for m in range(0, runs - UNROLL + 1, UNROLL):
            for i in range(UNROLL):
                f = step(f, panel + (m + i) * 8 * W, x + (m + i) * STEP, ENTRY)
        for m in range(runs // UNROLL * UNROLL, runs):
            f = step(f, panel + m * 8 * W, x + m * STEP, ENTRY)
        return f

    @device
    def run_tile(panel, x, n, totals):
        keep_apart()
        runs = runs_of(n)
        for i in range(2 * n_tokens):
            store_f32(totals + i * 4 * W, splat_f32(0.0))
        for _ in range(W):
            even = run_chain(panel, x, runs)
            odd = run_chain(panel + runs * 8 * W, x + runs * STEP, runs)
            add_to(totals, add(even, odd))
            panel += 2 * runs * 8 * W
            x += 2 * runs * STEP

    return run_tile


def make_prefill(weights: floats.FloatWeights) -> Any:
    unpack_panel, size = make_unpack(weights), weights.size
    wide, small = make_run_tile(TILE_TOKENS), make_run_tile(SMALL_TILE_TOKENS)

    @device
    def store_tile(totals, out, add, ld, t, count, row):
        for i in range(count):
            for half in range(2):
                where = (t + i) * ld + 4 * row + half * 4 * W
                value = load_f32(totals + (2 * i + half) * 4 * W)
                if add:
                    value = value + load_f32(add + where)
                store_f32(out + where, value)

    @device
    def prefill_panel(w, n, chained, out, add, ld, row, n_tokens, scratch):
        totals = scratch
        square = totals + TILE_TOKENS * 8 * W
        panel = square + 4 * W * (2 * W + 1)
        unpack_panel(w + row * n * size, n, panel, square)
        for t in range(0, n_tokens, TILE_TOKENS):
            count = min(n_tokens - t, TILE_TOKENS)
            if count <= SMALL_TILE_TOKENS:
                small(panel, chained, n, totals)
            else:
                wide(panel, chained, n, totals)
            store_tile(totals, out, add, ld, t, count, row)
            chained += tile_stride(n)

    return prefill_panel


def make_mul_mat(weights: floats.FloatWeights) -> Any:
    """The mul_mat kernel of a float type."""
    decode_rows, prefill_panel, size = make_decode(weights), make_prefill(weights), weights.size

    def mul_mat(w, n_rows, n, x, chained, out, add, count, scratch, scratch_bytes, work, ith, nth):
        """out[t] = w x[t] (+ add[t]); w: (n_rows, n), x: (n_tokens, n) float32, chained: its copy by chain_rows."""
        n_tokens = load_i64(count)
        mine = scratch + ith * scratch_bytes
        if n_tokens == 0:
            return
        if n_tokens == 1:
            row_bytes = n * size
            unit = rows_of_unit(row_bytes)
            row, last = take_rows(work, n_rows, nth, unit)
            while row < last:
                end, following, following_last = next_unit(work, n_rows, nth, unit, row, last)
                far = distance(row * row_bytes, unit * row_bytes, following * row_bytes)
                decode_rows(w, n_rows, n, x, out, add, row, end, far, mine)
                row, last = following, following_last
            return
        ld = 4 * n_rows
        row = atomic_add(work, 1) * (2 * W)
        while row < n_rows:
            if row + 2 * W <= n_rows:
                prefill_panel(w, n, chained, out, add, ld, row, n_tokens, mine)
            else:
                for t in range(n_tokens):
                    below = add + t * ld if add else 0
                    decode_rows(w, n_rows, n, x + 4 * t * n, out + t * ld, below, row, n_rows, FAR, mine)
            row = atomic_add(work, 1) * (2 * W)

    return kernel(mul_mat)


mul_mat_f32 = make_mul_mat(floats.f32)
mul_mat_f16 = make_mul_mat(floats.f16)
mul_mat_bf16 = make_mul_mat(floats.bf16)
