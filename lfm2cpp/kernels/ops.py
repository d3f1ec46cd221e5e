"""Row ops between the matrix products: norms, SwiGLU, sums. Rows are float32; n is their width.

Where a product with block weights follows, an op also leaves the quantized row (`act` not 0), a norm perhaps nothing
else (`out` 0), so that no op of its own is needed. One token's row is shared out among the threads; of several tokens
each thread takes a run, so that no two threads write into the same cache lines of a tile of quantized rows.
"""

from __future__ import annotations

import numpy as np

from .activation import QK, n_groups_of, quantize_blocks
from .compiler import F32, device, kernel
from .math import silu
from .scalar import load_f32 as load_scalar
from .scalar import load_i32, load_i64
from .scalar import store_f32 as store_scalar
from .shares import is_streamed
from .simd import W, fma, load_f32, max_lanes, splat_f32, store_f32, sum_lanes
from .widths import QUANTIZE_NBYTES

SEGMENT = 32  # elements: a block


@device
def segment_of(n, ith, nth):
    """This thread's part of one row, in whole segments but for the row's end: (first, last)."""
    segments = (n + SEGMENT - 1) // SEGMENT
    first = segments * ith // nth * SEGMENT
    return first, min(n, segments * (ith + 1) // nth * SEGMENT)


@device
def share_of(n, ith, nth):
    """This thread's run of n tokens: (first, last)."""
    return n * ith // nth, n * (ith + 1) // nth


@device
def quantize_part(x, act, n_groups, t, first, last, streamed, room):
    """Elements first .. last - 1 of token t, whose row is at x; room: QUANTIZE_NBYTES of scratch."""
    quantize_blocks(x + 4 * first, first // QK, (last + QK - 1) // QK, act, n_groups, t, streamed, room)


@kernel
def quantize_rows(x, n, act, count, scratch, scratch_bytes, ith, nth):
    """float32 rows x: (n_tokens, n) -> quantized activation rows"""
    n_tokens, n_groups, room = load_i64(count), n_groups_of(n), scratch + ith * scratch_bytes
    if n_tokens == 1:
        first, last = segment_of(n, ith, nth)
        quantize_part(x, act, n_groups, 0, first, last, True, room)
        return
    begin, end = share_of(n_tokens, ith, nth)
    for t in range(begin, end):
        quantize_part(x + 4 * t * n, act, n_groups, t, 0, n, False, room)


@device
def inverse_rms(x, n, eps):
    """1 / sqrt(mean(x^2) + eps) of one row"""
    even = splat_f32(0.0)
    odd = splat_f32(0.0)
    whole = n // (2 * W) * (2 * W)
    for i in range(0, whole, 2 * W):
        a, b = load_f32(x + 4 * i), load_f32(x + 4 * (i + W))
        even = fma(a, a, even)
        odd = fma(b, b, odd)
    total = sum_lanes(even + odd)
    for i in range(whole, n):
        value = load_scalar(x + 4 * i)
        total += value * value
    return np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)


@device
def scale_part(x, weight, scale, out, first, last):
    """out = weight * (x * scale) for elements first .. last - 1"""
    whole = first + (last - first) // W * W
    factor = splat_f32(scale)
    for i in range(first, whole, W):
        store_f32(out + 4 * i, load_f32(weight + 4 * i) * (load_f32(x + 4 * i) * factor))
    for i in range(whole, last):
        store_scalar(out + 4 * i, load_scalar(weight + 4 * i) * (load_scalar(x + 4 * i) * scale))


@kernel
def rms_norm(x, weight, eps: F32, n, out, act, rows, count, scratch, scratch_bytes, ith, nth):
    """out[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps); with `rows`, of the tokens whose indices (int32) are there.

    The result goes to `out` and, quantized, to `act`, whichever is not 0; scratch: QUANTIZE_NBYTES and a row.
    """
    n_tokens, n_groups, room = load_i64(count), n_groups_of(n), scratch + ith * scratch_bytes
    first, last = (0, n) if n_tokens > 1 else segment_of(n, ith, nth)
    begin, end = share_of(n_tokens, ith, nth) if n_tokens > 1 else (0, n_tokens)
    for t in range(begin, end):
        row = x + 4 * n * (load_i32(rows + 4 * t) if rows else t)
        below = out + 4 * n * t if out else room + QUANTIZE_NBYTES
        scale_part(row, weight, inverse_rms(row, n, eps), below, first, last)
        if act:
            quantize_part(below, act, n_groups, t, first, last, is_streamed(n_tokens), room)


@device
def swiglu_part(gate, up, out, first, last):
    whole = first + (last - first) // W * W
    for i in range(first, whole, W):
        store_f32(out + 4 * i, silu(load_f32(gate + 4 * i)) * load_f32(up + 4 * i))
    for i in range(whole, last):
        gated = max_lanes(silu(splat_f32(load_scalar(gate + 4 * i))))
        store_scalar(out + 4 * i, gated * load_scalar(up + 4 * i))


@kernel
def swiglu(gate, up, n, out, act, count, scratch, scratch_bytes, ith, nth):
    """out[t] = silu(gate[t]) * up[t]"""
    n_tokens, n_groups, room = load_i64(count), n_groups_of(n), scratch + ith * scratch_bytes
    first, last = (0, n) if n_tokens > 1 else segment_of(n, ith, nth)
    begin, end = share_of(n_tokens, ith, nth) if n_tokens > 1 else (0, n_tokens)
    for t in range(begin, end):
        row = 4 * n * t
        swiglu_part(gate + row, up + row, out + row, first, last)
        if act:
            quantize_part(out + row, act, n_groups, t, first, last, is_streamed(n_tokens), room)


@kernel
def add(a, b, n, out, count, ith, nth):
    """out = a + b, rows of n"""
    begin, end = share_of(load_i64(count), ith, nth)
    for i in range(begin * n, end * n):
        store_scalar(out + 4 * i, load_scalar(a + 4 * i) + load_scalar(b + 4 * i))


@kernel
def add_squares(x, n, sums, count, ith, nth):
    """sums[i] += x[t, i]^2 for all tokens t; x: (n_tokens, n), sums: n float32"""
    first, last = segment_of(n, ith, nth)
    whole = first + (last - first) // W * W
    for t in range(load_i64(count)):
        row = x + 4 * t * n
        for i in range(first, whole, W):
            value = load_f32(row + 4 * i)
            store_f32(sums + 4 * i, fma(value, value, load_f32(sums + 4 * i)))
        for i in range(whole, last):
            value = load_scalar(row + 4 * i)
            store_scalar(sums + 4 * i, load_scalar(sums + 4 * i) + value * value)
