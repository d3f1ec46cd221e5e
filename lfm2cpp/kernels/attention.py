"""Causal grouped-query attention over paged K and V.

The context is cut into chunks of CHUNK_TOKENS at absolute positions. Within a chunk: all scores, one softmax, one
weighted sum; chunks are merged in order. Few tokens (decode) are split over their chunks, many (prefill) are grouped,
and both do the same arithmetic in the same order, so results depend neither on the batch nor on the threads.

K lies transposed in its pages, so that keys are lanes: a score is a chain of multiply-adds over the head's dimensions
and needs no sum across lanes. The same holds for V's columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import kv
from .activation import n_groups_of, quantize_block
from .batch import N_RUNS, N_TOKENS, POSITIONS, RUN_FIELDS, RUN_FIRST, RUN_OF, RUN_PAGES, RUN_TOKENS, RUNS, SPLIT_CHUNKS
from .compiler import F32, device, kernel
from .kv import AHEAD, KVType
from .math import exp
from .ops import share_of
from .scalar import atomic_add, load_i32, load_i64
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .simd import W, keep_first, load_f32, max_lanes, maximum, splat_f32, store_f32, sum_lanes
from .widths import CHUNK_PAGES, CHUNK_TOKENS, PAGE_TOKENS, QUERY_GROUP, QUERY_TILE

SMALL_TILE, MEDIUM_TILE = 2, 4  # query heads of one token that share K and V
LOWEST = -3.0e38
RESULT_HEAD = 2 * W  # floats before the weighted sum in a result: its maximum, its sum of weights; keeps rows aligned


@device
def softmax_row(scores, n_valid, n_keys, scale, result):
    """scores -> exp(scale * score - maximum), zero from n_valid on; the maximum and the sum go to result"""
    factor = splat_f32(scale)
    peak = splat_f32(LOWEST)
    whole = n_valid // W * W
    for key in range(0, whole, W):
        s = load_f32(scores + 4 * key) * factor
        store_f32(scores + 4 * key, s)
        peak = maximum(s, peak)
    for key in range(whole, n_keys, W):
        s = keep_first(load_f32(scores + 4 * key) * factor, n_valid - key, LOWEST)
        store_f32(scores + 4 * key, s)
        peak = maximum(s, peak)
    top = max_lanes(peak)
    shift = splat_f32(top)
    total = splat_f32(0.0)
    for key in range(0, whole, W):
        p = exp(load_f32(scores + 4 * key) - shift)
        store_f32(scores + 4 * key, p)
        total = total + p
    for key in range(whole, n_keys, W):
        p = keep_first(exp(load_f32(scores + 4 * key) - shift), n_valid - key, 0.0)
        store_f32(scores + 4 * key, p)
        total = total + p
    store_scalar(result, top)
    store_scalar(result + 4, sum_lanes(total))


@device
def exp_scalar(x):
    return max_lanes(exp(splat_f32(x)))


@device
def merge(state, part, n_padded, is_first):
    """state <- state and part together; both hold a maximum, a sum of weights and a weighted sum"""
    if is_first:
        for i in range(0, RESULT_HEAD + n_padded, W):
            store_f32(state + 4 * i, load_f32(part + 4 * i))
        return
    old, new = load_scalar(state), load_scalar(part)
    top = max(old, new)
    a, b = exp_scalar(old - top), exp_scalar(new - top)
    store_scalar(state, top)
    store_scalar(state + 4, load_scalar(state + 4) * a + load_scalar(part + 4) * b)
    wa, wb = splat_f32(a), splat_f32(b)
    for i in range(RESULT_HEAD, RESULT_HEAD + n_padded, W):
        where = 4 * i
        store_f32(state + where, load_f32(state + where) * wa + load_f32(part + where) * wb)


@device
def finish_head(state, n_embd_head, out):
    """out = weighted sum / sum of weights"""
    inverse = np.float32(1.0) / load_scalar(state + 4)
    for i in range(n_embd_head):
        store_scalar(out + 4 * i, load_scalar(state + 4 * (RESULT_HEAD + i)) * inverse)


@device
def quantize_head(out, act, n_groups, t, head, n_embd_head, one_token):
    """The blocks of one head; heads are whole blocks where `act` is given."""
    for i in range(0, n_embd_head, 32):
        quantize_block(out + 4 * i, act, n_groups, t, (head * n_embd_head + i) // 32, one_token)


def make_attend(n_queries: int, kv: KVType) -> Any:
    """attend: one chunk of context for a tile of queries."""
    scores, weighted_sum = kv.make_scores(n_queries), kv.make_weighted_sum(n_queries)

    @device
    def attend(q, q_stride, n_embd_head, n_padded, pages, coming, k_offset, v_offset, valid, valid_step, count, scale,
               s, out):  # fmt: skip
        """Query i sees the first valid + i * valid_step keys of the chunk at `pages`; the one at `coming` (0: none)
        will be next. s: scratch, n_queries rows; out: results."""
        n_keys = min(CHUNK_TOKENS, valid + valid_step * (count - 1))
        row = 4 * (RESULT_HEAD + n_padded)
        scores(q, q_stride, n_embd_head, pages, k_offset, v_offset, n_keys, s)
        rounded = (n_keys + W - 1) // W * W
        for i in range(count):
            n_valid = min(CHUNK_TOKENS, max(0, valid + i * valid_step))
            softmax_row(s + i * 4 * CHUNK_TOKENS, n_valid, rounded, scale, out + i * row)
        weighted_sum(s, pages, k_offset, v_offset, n_padded, n_keys, coming, out + 4 * RESULT_HEAD, row)

    return attend


def make_attention(kv: KVType) -> Any:
    wide, column_bytes = make_attend(QUERY_TILE, kv), kv.column_bytes
    small, medium = make_attend(SMALL_TILE, kv), make_attend(MEDIUM_TILE, kv)

    @device
    def one_token(unit, q, n_head, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, scale, parts, batch, nth, s):
        """Unit (token, kv head, chunk): its query heads as a tile; the results go to their place in parts."""
        n_chunks = load_i64(batch + 8 * SPLIT_CHUNKS)
        n_gqa = n_head // n_head_kv
        token_head, chunk = divmod(unit, n_chunks)
        t, head_kv = divmod(token_head, n_head_kv)
        run = load_i64(batch + 8 * RUNS) + 8 * RUN_FIELDS * load_i32(load_i64(batch + 8 * RUN_OF) + 4 * t)
        n_keys = load_i32(load_i64(batch + 8 * POSITIONS) + 4 * t) + 1 - chunk * CHUNK_TOKENS
        if n_keys <= 0:
            return
        pages = load_i64(run + 8 * RUN_PAGES) + 8 * chunk * CHUNK_PAGES
        k, v = (k_offset + head_kv * column_bytes * n_embd_head, v_offset + head_kv * column_bytes * n_padded)
        coming = pages + 8 * nth * CHUNK_PAGES if n_keys > nth * CHUNK_TOKENS + AHEAD * PAGE_TOKENS else 0
        row = 4 * (RESULT_HEAD + n_padded)
        n_valid, results = min(n_keys, CHUNK_TOKENS), s + 4 * MEDIUM_TILE * CHUNK_TOKENS
        for j in range(0, n_gqa, MEDIUM_TILE):
            head = head_kv * n_gqa + j
            at = q + 4 * (t * n_head + head) * n_embd_head
            count = min(MEDIUM_TILE, n_gqa - j)
            if count <= SMALL_TILE:
                small(at, 4 * n_embd_head, n_embd_head, n_padded, pages, coming, k, v, n_valid, 0, count, scale, s,
                       results)
            else:
                medium(at, 4 * n_embd_head, n_embd_head, n_padded, pages, coming, k, v, n_valid, 0, count, scale, s,
                       results)
            for i in range(count):
                place = ((t * n_head + head + i) * n_chunks + chunk) * row
                merge(parts + place, results + i * row, n_padded, True)

    @device
    def token_group(run, begin, count, head, q, n_head, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, scale,
                    positions, out, act, s):  # fmt: skip
        """Tokens begin .. begin + count - 1 of a run, one query head: all their chunks, then the finished rows."""
        head_kv = head // (n_head // n_head_kv)
        k, v = (k_offset + head_kv * column_bytes * n_embd_head, v_offset + head_kv * column_bytes * n_padded)
        row, stride = 4 * (RESULT_HEAD + n_padded), 4 * n_head * n_embd_head
        parts = s + 4 * QUERY_TILE * CHUNK_TOKENS
        states = parts + QUERY_TILE * row
        past = load_i32(positions + 4 * begin)
        n_chunks = (past + count + CHUNK_TOKENS - 1) // CHUNK_TOKENS
        for chunk in range(n_chunks):
            pages = load_i64(run + 8 * RUN_PAGES) + 8 * chunk * CHUNK_PAGES
            n_keys = past + count - chunk * CHUNK_TOKENS
            coming = pages + 8 * CHUNK_PAGES if n_keys > CHUNK_TOKENS + AHEAD * PAGE_TOKENS else 0
            for i in range(0, count, QUERY_TILE):
                n = min(QUERY_TILE, count - i)
                valid = past + i + 1 - chunk * CHUNK_TOKENS
                if valid + n - 1 <= 0:
                    continue
                at = q + (begin + i) * stride + 4 * head * n_embd_head
                wide(at, stride, n_embd_head, n_padded, pages, coming, k, v, valid, 1, n, scale, s, parts)
                for j in range(n):
                    if valid + j > 0:
                        merge(states + (i + j) * row, parts + j * row, n_padded, chunk == 0)
        n_groups = n_groups_of(n_head * n_embd_head)
        for i in range(count):
            at = out + (begin + i) * stride + 4 * head * n_embd_head
            finish_head(states + i * row, n_embd_head, at)
            if act:
                quantize_head(at, act, n_groups, begin + i, head, n_embd_head, False)

    def attention(q, n_head, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, scale: F32, parts, out, act, batch,
                  scratch, scratch_bytes, work, ith, nth):  # fmt: skip
        """out[t] = softmax(scale * q k^T) v per head; q, out: (n_tokens, n_head * n_embd_head) float32.

        With SPLIT_CHUNKS set, only leaves results in `parts`, [token][head][chunk], for merge_parts.
        """
        s = scratch + ith * scratch_bytes
        n_split = load_i64(batch + 8 * SPLIT_CHUNKS)
        if n_split:
            n_units = load_i64(batch + 8 * N_TOKENS) * n_head_kv * n_split
            unit = atomic_add(work, 1)
            while unit < n_units:
                one_token(
                    unit, q, n_head, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, scale, parts, batch, nth, s
                )
                unit = atomic_add(work, 1)
            return
        positions = load_i64(batch + 8 * POSITIONS)
        unit = atomic_add(work, 1)
        passed = 0
        for r in range(load_i64(batch + 8 * N_RUNS)):
            run = load_i64(batch + 8 * RUNS) + 8 * RUN_FIELDS * r
            begin, n_tokens = load_i64(run + 8 * RUN_FIRST), load_i64(run + 8 * RUN_TOKENS)
            n_units = (n_tokens + QUERY_GROUP - 1) // QUERY_GROUP * n_head
            while unit < passed + n_units:
                group, head = divmod(unit - passed, n_head)
                first = group * QUERY_GROUP
                token_group(
                    run, begin + first, min(QUERY_GROUP, n_tokens - first), head, q, n_head, n_head_kv, n_embd_head,
                    n_padded, k_offset, v_offset, scale, positions, out, act, s,
                )
                unit = atomic_add(work, 1)
            passed += n_units

    return kernel(attention)


@kernel
def merge_parts(parts, n_head, n_embd_head, n_padded, out, act, batch, scratch, scratch_bytes, ith, nth):
    """The chunks that attention left in parts, in order -> finished rows of out."""
    n_chunks = load_i64(batch + 8 * SPLIT_CHUNKS)
    if n_chunks == 0:
        return
    state = scratch + ith * scratch_bytes
    row = 4 * (RESULT_HEAD + n_padded)
    n_groups = n_groups_of(n_head * n_embd_head)
    positions, n_tokens = load_i64(batch + 8 * POSITIONS), load_i64(batch + 8 * N_TOKENS)
    begin, end = share_of(n_tokens * n_head, ith, nth)
    for unit in range(begin, end):
        t, head = divmod(unit, n_head)
        mine = (load_i32(positions + 4 * t) + CHUNK_TOKENS) // CHUNK_TOKENS
        for chunk in range(mine):
            merge(state, parts + (unit * n_chunks + chunk) * row, n_padded, chunk == 0)
        at = out + 4 * unit * n_embd_head
        finish_head(state, n_embd_head, at)
        if act:
            quantize_head(at, act, n_groups, t, head, n_embd_head, n_tokens == 1)


attention_f16 = make_attention(kv.F16)
attention_f32 = make_attention(kv.F32)
attention_q8_0 = make_attention(kv.Q8_0)
