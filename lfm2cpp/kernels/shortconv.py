"""The double-gated causal short convolution: out = C * conv(B * X), depthwise, with the state of each sequence.

u[t] = B[t] * X[t];  v[t] = sum over k < l_cache of w[k] * u[t - d_conv + k],  u before the batch taken from the state.
A sequence keeps the last KEPT_COLUMNS columns of u, more than the next token needs, each where its position says: so it
can be taken back some tokens at no cost. At the end of every KV page the last d_conv of them are copied into the page,
so that it can be taken back to any page end.
"""

from __future__ import annotations

from .activation import n_groups_of
from .batch import N_RUNS, N_TOKENS, RUN_CONV, RUN_FIELDS, RUN_FIRST, RUN_PAGES, RUN_PAST, RUN_TOKENS, RUNS
from .compiler import device, kernel
from .ops import quantize_part, segment_of
from .scalar import load_f32 as load_scalar
from .scalar import load_i64
from .scalar import store_f32 as store_scalar
from .shares import is_streamed
from .simd import W, load_f32, store_f32
from .widths import KEPT_COLUMNS, PAGE_TOKENS


@device
def kept_column(state, n, position):
    """Address of the column of u that is kept of this position; before the first token they are zeros"""
    return state + 4 * n * (position & (KEPT_COLUMNS - 1))


@device
def column(bcx, n, state, past, t, i):
    """u[t] of channel i; t counts from the run's first token, at position `past`; t < 0 reaches into the state"""
    if t < 0:
        return load_scalar(kept_column(state, n, past + t) + 4 * i)
    row = bcx + 12 * t * n
    return load_scalar(row + 4 * i) * load_scalar(row + 4 * (2 * n + i))


@device
def columns(bcx, n, state, past, t, i):
    """u[t] of W channels from i on"""
    if t < 0:
        return load_f32(kept_column(state, n, past + t) + 4 * i)
    row = bcx + 12 * t * n
    return load_f32(row + 4 * i) * load_f32(row + 4 * (2 * n + i))


@device
def conv_channel(bcx, n, weight, d_conv, state, past, t, i, bx, conv, out):
    """One channel of one token: what conv_channels does W at a time."""
    total = load_scalar(weight + 4 * i) * column(bcx, n, state, past, t - d_conv, i)
    for k in range(1, d_conv + 1):
        total += load_scalar(weight + 4 * (k * n + i)) * column(bcx, n, state, past, t - d_conv + k, i)
    if bx:
        store_scalar(bx + 4 * i, column(bcx, n, state, past, t, i))
        store_scalar(conv + 4 * i, total)
    store_scalar(out + 4 * i, load_scalar(bcx + 4 * ((3 * t + 1) * n + i)) * total)


@device
def conv_channels(bcx, n, weight, d_conv, state, past, t, first, last, bx, conv, out):
    """Channels first .. last - 1 of token t; bx, conv, out: their rows of this token"""
    whole = first + (last - first) // W * W
    for i in range(first, whole, W):
        total = load_f32(weight + 4 * i) * columns(bcx, n, state, past, t - d_conv, i)
        for k in range(1, d_conv + 1):
            total = total + load_f32(weight + 4 * (k * n + i)) * columns(bcx, n, state, past, t - d_conv + k, i)
        if bx:
            store_f32(bx + 4 * i, columns(bcx, n, state, past, t, i))
            store_f32(conv + 4 * i, total)
        store_f32(out + 4 * i, load_f32(bcx + 4 * ((3 * t + 1) * n + i)) * total)
    for i in range(whole, last):
        conv_channel(bcx, n, weight, d_conv, state, past, t, i, bx, conv, out)


@device
def save_column(bcx, n, state, past, t, first, last, row):
    """Channels first .. last - 1 of u[t] into a row"""
    whole = first + (last - first) // W * W
    for i in range(first, whole, W):
        store_f32(row + 4 * i, columns(bcx, n, state, past, t, i))
    for i in range(whole, last):
        store_scalar(row + 4 * i, column(bcx, n, state, past, t, i))


@kernel
def shortconv(bcx, n, weight, l_cache, state_offset, snapshot_offset, bx, conv, out, act, batch, scratch,
              scratch_bytes, ith, nth):  # fmt: skip
    """bcx: (n_tokens, 3 n) float32, B, C, X side by side; weight: (l_cache, n); out: (n_tokens, n)

    bx and conv (0 for none) keep B * X and its convolution. Offsets say where this layer's columns lie in a sequence's
    state and in a page. Threads share out the channels, so that a sequence's tokens follow each other in one thread.
    """
    d_conv, n_groups = l_cache - 1, n_groups_of(n)
    first, last = segment_of(n, ith, nth)
    room = scratch + ith * scratch_bytes
    streamed = is_streamed(load_i64(batch + 8 * N_TOKENS))
    for r in range(load_i64(batch + 8 * N_RUNS)):
        run = load_i64(batch + 8 * RUNS) + 8 * RUN_FIELDS * r
        begin, n_tokens = load_i64(run + 8 * RUN_FIRST), load_i64(run + 8 * RUN_TOKENS)
        past, pages = load_i64(run + 8 * RUN_PAST), load_i64(run + 8 * RUN_PAGES)
        state = load_i64(run + 8 * RUN_CONV) + state_offset
        rows = bcx + 12 * begin * n
        for t in range(n_tokens):
            row = 4 * (begin + t) * n
            conv_channels(
                rows, n, weight, d_conv, state, past, t, first, last,
                bx + row if bx else 0, conv + row, out + row,
            )  # fmt: skip
            if act:
                quantize_part(out + row, act, n_groups, begin + t, first, last, streamed, room)
            if (past + t + 1) % PAGE_TOKENS == 0:
                snapshot = load_i64(pages + 8 * ((past + t) // PAGE_TOKENS)) + snapshot_offset
                for k in range(d_conv):
                    row = snapshot + 4 * k * n
                    save_column(rows, n, state, past, t - d_conv + 1 + k, first, last, row)
        for t in range(max(0, n_tokens - KEPT_COLUMNS), n_tokens):
            row = kept_column(state, n, past + t)
            save_column(rows, n, state, past, t, first, last, row)
