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

from . import kv, widths
from .activation import QK, ROW_BYTES, n_groups_of, quantize_blocks, quantize_tokens
from .batch import N_RUNS, N_TOKENS, POSITIONS, RUN_FIELDS, RUN_FIRST, RUN_OF, RUN_PAGES, RUN_TOKENS, RUNS, SPLIT_CHUNKS
from .compiler import F32, device, kernel
from .kv import AHEAD, KVType, pages_of
from .math import exp
from .ops import share_of
from .scalar import atomic_add, load_i32, load_i64, store_i64
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .shares import is_streamed
from .simd import (
    W,
    keep_first,
    load_f32,
    max_lanes,
    maximum,
    prefetch_early,
    prefetch_near,
    splat_f32,
    store_f32,
    sum_lanes,
)
from .widths import (
    BLOCK_TABLE,
    CHUNK_PAGES,
    CHUNK_TOKENS,
    LINE,
    MEDIUM_TILE,
    PAGE_TOKENS,
    QUERY_GROUP,
    QUERY_TILE,
    SMALL_TILE,
    SPLIT_ROWS,
)

UNITS_A_THREAD = 16  # at least, where few tokens are split into units
PARTS_AHEAD = 6  # chunks whose results are on their way while they are merged
LOWEST = -3.0e38
rows_of_group = device(widths.rows_of_group)
RESULT_HEAD = 2 * W  # floats before the weighted sum in a result: its maximum and its sum of weights, W times each


@device
def softmax_row(scores, n_valid, n_keys, scale, result, coming):
    """scores -> exp(scale * score - maximum), zero from n_valid on; the maximum and the sum go to result.

    Asks for 4 bytes a key from `coming` on: without that memory would have nothing to do meanwhile.
    """
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
    shift = splat_f32(max_lanes(peak))
    total = splat_f32(0.0)
    for key in range(0, whole, W):
        prefetch_early(coming + 4 * key)
        p = exp(load_f32(scores + 4 * key) - shift)
        store_f32(scores + 4 * key, p)
        total = total + p
    for key in range(whole, n_keys, W):
        p = keep_first(exp(load_f32(scores + 4 * key) - shift), n_valid - key, 0.0)
        store_f32(scores + 4 * key, p)
        total = total + p
    store_f32(result, shift)
    store_f32(result + 4 * W, splat_f32(sum_lanes(total)))


@device
def merge(state, part, n_padded, is_first):
    """state <- state and part together; both hold a maximum, a sum of weights and a weighted sum"""
    if is_first:
        for i in range(0, RESULT_HEAD + n_padded, W):
            store_f32(state + 4 * i, load_f32(part + 4 * i))
        return
    old, new = load_f32(state), load_f32(part)
    top = maximum(old, new)
    a, b = exp(old - top), exp(new - top)
    store_f32(state, top)
    for i in range(W, RESULT_HEAD + n_padded, W):
        where = 4 * i
        store_f32(state + where, load_f32(state + where) * a + load_f32(part + where) * b)


@device
def finish_head(state, n_embd_head, out):
    """out = weighted sum / sum of weights"""
    inverse = np.float32(1.0) / load_scalar(state + 4 * W)
    for i in range(n_embd_head):
        store_scalar(out + 4 * i, load_scalar(state + 4 * (RESULT_HEAD + i)) * inverse)


@device
def list_blocks(table, pages, n_pages, offset, head_bytes, n_heads):
    """Addresses of n_heads blocks in each of n_pages pages, page by page, at `table`; where that ends"""
    for page in range(n_pages):
        block = load_i64(pages + 8 * page) + offset
        for _ in range(n_heads):
            store_i64(table, block)
            block += head_bytes
            table += 8
    return table


@device
def list_chunk(table, pages, n_pages, n_heads, k, k_bytes, v, v_bytes, coming):
    """The blocks of a chunk in the order of their use: K, V, and what comes then, K at the pages `coming` (0: nothing).

    k, v: offsets of the first head's blocks in a page, k_bytes and v_bytes from one head's to the next one's.
    """
    table = list_blocks(table, pages, n_pages, k, k_bytes, n_heads)
    table = list_blocks(table, pages, n_pages, v, v_bytes, n_heads)
    for i in range(AHEAD):
        page, head = divmod(i, n_heads)
        store_i64(table, load_i64(coming + 8 * page) + k + head * k_bytes if coming else load_i64(table - 8))
        table += 8


def make_attend(n_queries: int, kv: KVType) -> Any:
    """attend: one chunk of context for a tile of queries."""
    scores, weighted_sum = kv.make_scores(n_queries), kv.make_weighted_sum(n_queries)

    @device
    def attend(q, q_stride, n_embd_head, n_padded, blocks, n_pages, valid, count, scale, s, out):
        """Query i sees the first valid + i keys of the chunk whose n_pages pages list_chunk has listed at `blocks`.

        s: scratch, n_queries rows; out: results.
        """
        n_keys = min(CHUNK_TOKENS, valid + count - 1)
        row = 4 * (RESULT_HEAD + n_padded)
        scores(q, q_stride, n_embd_head, blocks, n_keys, s)
        rounded = (n_keys + W - 1) // W * W
        for i in range(count):
            n_valid = min(CHUNK_TOKENS, max(0, valid + i))
            at = s + i * 4 * CHUNK_TOKENS
            softmax_row(at, n_valid, rounded, scale, out + i * row, at)  # V comes soon enough: there is much to compute
        weighted_sum(s, blocks + 8 * n_pages, n_padded, n_keys, True, out + 4 * RESULT_HEAD, row)

    return attend


@device
def heads_of_unit(n_head_kv, n_gqa, n_parts, nth):
    """KV heads that a unit takes when few tokens are split into n_parts: their blocks lie side by side in a page, and
    the more of them, the longer the runs of memory that are read; but there must be units for all threads."""
    n = max(1, min(n_head_kv, SPLIT_ROWS // rows_of_group(n_gqa)))
    while n > 1 and (n_head_kv + n - 1) // n * n_parts < UNITS_A_THREAD * nth:
        n = (n + 1) // 2
    return n


def make_attend_split(kv: KVType) -> Any:
    """attend_split: one chunk of context for the query heads of one token and some KV heads."""
    small_scores, small_sum = kv.make_scores(SMALL_TILE), kv.make_weighted_sum(SMALL_TILE)
    medium_scores, medium_sum = kv.make_scores(MEDIUM_TILE), kv.make_weighted_sum(MEDIUM_TILE)
    column_bytes, ahead = kv.column_bytes, kv.ahead

    @device
    def attend_split(q, n_gqa, n_embd_head, n_padded, blocks, n_heads, n_valid, scale, s, results, stride_of_head):
        """n_heads * n_gqa queries at q, the first n_valid keys of the chunk listed at `blocks`.

        s, results: rows_of_group(n_gqa) rows a KV head; those of results begin stride_of_head bytes apart.
        """
        n_pages, rows = pages_of(n_valid), rows_of_group(n_gqa)
        row, stride = 4 * (RESULT_HEAD + n_padded), 4 * n_embd_head
        at = blocks
        for first in range(0, n_valid, PAGE_TOKENS):
            n_keys = min(n_valid - first, PAGE_TOKENS)
            for head in range(n_heads):
                for j in range(0, n_gqa, MEDIUM_TILE):
                    queries, out = q + (head * n_gqa + j) * stride, s + 4 * ((head * rows + j) * CHUNK_TOKENS + first)
                    if n_gqa - j <= SMALL_TILE:
                        small_scores(queries, stride, n_embd_head, at, n_keys, out)
                    else:
                        medium_scores(queries, stride, n_embd_head, at, n_keys, out)
                at += 8
        rounded = (n_valid + W - 1) // W * W
        at, n_blocks = blocks + 8 * n_pages * n_heads, n_pages * n_heads
        for query in range(n_heads * n_gqa):
            head, j = divmod(query, n_gqa)
            i = head * rows + j
            block, offset = divmod(4 * CHUNK_TOKENS * query, column_bytes * n_padded)
            coming = load_i64(at + 8 * min(ahead + block, n_blocks)) + offset
            result = results + head * stride_of_head + j * row
            softmax_row(s + 4 * CHUNK_TOKENS * i, n_valid, rounded, scale, result, coming)
        for first in range(0, n_valid, PAGE_TOKENS):
            n_keys = min(n_valid - first, PAGE_TOKENS)
            for head in range(n_heads):
                for j in range(0, n_gqa, MEDIUM_TILE):
                    p = s + 4 * ((head * rows + j) * CHUNK_TOKENS + first)
                    out = results + head * stride_of_head + j * row + 4 * RESULT_HEAD
                    if n_gqa - j <= SMALL_TILE:
                        small_sum(p, at, n_padded, n_keys, first == 0, out, row)
                    else:
                        medium_sum(p, at, n_padded, n_keys, first == 0, out, row)
                at += 8

    return attend_split


def make_attention(kv: KVType) -> Any:
    wide, split, column_bytes = make_attend(QUERY_TILE, kv), make_attend_split(kv), kv.column_bytes

    @device
    def one_token(unit, n_heads, q, n_head, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, scale, parts, batch,
                  nth, s):  # fmt: skip
        """Unit (token, group of n_heads KV heads, chunk); the results go to their place in parts."""
        n_chunks, n_gqa = load_i64(batch + 8 * SPLIT_CHUNKS), n_head // n_head_kv
        token_group, chunk = divmod(unit, n_chunks)
        t, group = divmod(token_group, (n_head_kv + n_heads - 1) // n_heads)
        first = group * n_heads
        n_heads = min(n_heads, n_head_kv - first)
        run = load_i64(batch + 8 * RUNS) + 8 * RUN_FIELDS * load_i32(load_i64(batch + 8 * RUN_OF) + 4 * t)
        n_keys = load_i32(load_i64(batch + 8 * POSITIONS) + 4 * t) + 1 - chunk * CHUNK_TOKENS
        if n_keys <= 0:
            return
        n_valid = min(n_keys, CHUNK_TOKENS)
        pages = load_i64(run + 8 * RUN_PAGES) + 8 * chunk * CHUNK_PAGES
        coming = pages + 8 * nth * CHUNK_PAGES if n_keys > nth * CHUNK_TOKENS + AHEAD * PAGE_TOKENS else 0
        k_bytes, v_bytes = column_bytes * n_embd_head, column_bytes * n_padded
        k, v = k_offset + first * k_bytes, v_offset + first * v_bytes
        list_chunk(s, pages, pages_of(n_valid), n_heads, k, k_bytes, v, v_bytes, coming)
        part = rows_of_group(n_gqa) * 4 * (RESULT_HEAD + n_padded)
        results = parts + ((t * n_head_kv + first) * n_chunks + chunk) * part
        at = q + 4 * (t * n_head + first * n_gqa) * n_embd_head
        split(at, n_gqa, n_embd_head, n_padded, s, n_heads, n_valid, scale, s + BLOCK_TABLE, results, n_chunks * part)

    @device
    def token_group(run, begin, count, head, q, n_head, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, scale,
                    positions, out, act, streamed, s):  # fmt: skip
        """Tokens begin .. begin + count - 1 of a run, one query head: all their chunks, then the finished rows."""
        head_kv = head // (n_head // n_head_kv)
        k_bytes, v_bytes = column_bytes * n_embd_head, column_bytes * n_padded
        k, v = k_offset + head_kv * k_bytes, v_offset + head_kv * v_bytes
        row, stride = 4 * (RESULT_HEAD + n_padded), 4 * n_head * n_embd_head
        scores = s + BLOCK_TABLE
        parts = scores + 4 * QUERY_TILE * CHUNK_TOKENS
        states = parts + QUERY_TILE * row
        past = load_i32(positions + 4 * begin)
        n_chunks = (past + count + CHUNK_TOKENS - 1) // CHUNK_TOKENS
        for chunk in range(n_chunks):
            pages = load_i64(run + 8 * RUN_PAGES) + 8 * chunk * CHUNK_PAGES
            n_keys = past + count - chunk * CHUNK_TOKENS
            coming = pages + 8 * CHUNK_PAGES if n_keys > CHUNK_TOKENS + AHEAD * PAGE_TOKENS else 0
            n_pages = pages_of(min(n_keys, CHUNK_TOKENS))
            list_chunk(s, pages, n_pages, np.int64(1), k, k_bytes, v, v_bytes, coming)
            for i in range(0, count, QUERY_TILE):
                n = min(QUERY_TILE, count - i)
                valid = past + i + 1 - chunk * CHUNK_TOKENS
                if valid + n - 1 <= 0:
                    continue
                at = q + (begin + i) * stride + 4 * head * n_embd_head
                wide(at, stride, n_embd_head, n_padded, s, n_pages, valid, n, scale, scores, parts)
                for j in range(n):
                    if valid + j > 0:
                        merge(states + (i + j) * row, parts + j * row, n_padded, chunk == 0)
        n_groups = n_groups_of(n_head * n_embd_head)
        for i in range(count):
            at = out + (begin + i) * stride + 4 * head * n_embd_head
            finish_head(states + i * row, n_embd_head, at)
        if act:  # heads are whole blocks
            for b in range(head * n_embd_head // QK, (head + 1) * n_embd_head // QK):
                at = out + begin * stride + b * ROW_BYTES
                quantize_tokens(at, stride, count, act, n_groups, begin, b, streamed, s)

    def attention(q, n_head, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, scale: F32, parts, out, act, batch,
                  scratch, scratch_bytes, work, ith, nth):  # fmt: skip
        """out[t] = softmax(scale * q k^T) v per head; q, out: (n_tokens, n_head * n_embd_head) float32.

        With SPLIT_CHUNKS set, only leaves results in `parts` for merge_parts: [token][KV head][chunk][query head of
        the group], widths.parts_nbytes in all. Whichever of the two finishes rows also quantizes them into `act`, if
        it is not 0: heads must then be whole blocks.
        """
        s = scratch + ith * scratch_bytes
        n_split = load_i64(batch + 8 * SPLIT_CHUNKS)
        if n_split:
            n_parts = load_i64(batch + 8 * N_TOKENS) * n_split
            n_heads = heads_of_unit(n_head_kv, n_head // n_head_kv, n_parts, nth)
            n_units = (n_head_kv + n_heads - 1) // n_heads * n_parts
            unit = atomic_add(work, 1)
            while unit < n_units:
                one_token(
                    unit, n_heads, q, n_head, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, scale, parts, batch,
                    nth, s,
                )
                unit = atomic_add(work, 1)
            return
        positions, streamed = load_i64(batch + 8 * POSITIONS), is_streamed(load_i64(batch + 8 * N_TOKENS))
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
                    n_padded, k_offset, v_offset, scale, positions, out, act, streamed, s,
                )
                unit = atomic_add(work, 1)
            passed += n_units

    return kernel(attention)


@kernel
def merge_parts(parts, n_head, n_head_kv, n_embd_head, n_padded, out, act, batch, scratch, scratch_bytes, ith, nth):
    """The chunks that attention left in parts, in order -> finished rows of out and of `act`, as in attention."""
    n_chunks = load_i64(batch + 8 * SPLIT_CHUNKS)
    if n_chunks == 0:
        return
    state = scratch + ith * scratch_bytes
    n_gqa, row = n_head // n_head_kv, 4 * (RESULT_HEAD + n_padded)
    part = rows_of_group(n_gqa) * row
    n_groups = n_groups_of(n_head * n_embd_head)
    positions, n_tokens = load_i64(batch + 8 * POSITIONS), load_i64(batch + 8 * N_TOKENS)
    begin, end = share_of(n_tokens * n_head, ith, nth)
    while begin < end:
        t, first_head = divmod(begin, n_head)
        last_head = min(first_head + end - begin, n_head)
        at = out + 4 * begin * n_embd_head
        mine = (load_i32(positions + 4 * t) + CHUNK_TOKENS) // CHUNK_TOKENS
        for head in range(first_head, last_head):
            head_kv, j = divmod(head, n_gqa)
            first = parts + (t * n_head_kv + head_kv) * n_chunks * part + j * row
            for chunk in range(mine):
                for line in range(0, row, LINE):  # half of which lie in other cores' caches
                    prefetch_near(first + (chunk + PARTS_AHEAD) * part + line)
                merge(state, first + chunk * part, n_padded, chunk == 0)
            finish_head(state, n_embd_head, at + 4 * (head - first_head) * n_embd_head)
        if act:  # heads are whole blocks
            b, last = first_head * n_embd_head // QK, last_head * n_embd_head // QK
            quantize_blocks(at, b, last, act, n_groups, t, is_streamed(n_tokens), state)
        begin += last_head - first_head


attention_f16 = make_attention(kv.F16)
attention_f32 = make_attention(kv.F32)
attention_q8_0 = make_attention(kv.Q8_0)
