"""How K and V lie in a page, one KVType each for f16, f32 and q8_0: stored, multiplied with queries, summed up.

Per head, K is transposed, [n_embd_head][PAGE_TOKENS], so that keys are lanes; V is [PAGE_TOKENS][n_padded]. q8_0 has an
int8 where the others have a float, and after them float16 scales: K's [n_embd_head / 32][PAGE_TOKENS], V's
[PAGE_TOKENS][n_padded / 32].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compiler import device
from .scalar import load_f16, load_f32, load_i64, round_to_i64, store_f16, store_f32, store_i8
from .simd import W
from .tile import make_tile
from .widths import CHUNK_TOKENS, KV_COLUMN_BYTES, PAGE_TOKENS

QK = 32


@dataclass(frozen=True)
class KVType:
    """What attention and store_kv need of one type. Sizes are per column: PAGE_TOKENS elements and their scales."""

    column_bytes: int
    make_scores: Callable[[int], Any]  # (n_queries) -> scores of queries by the keys of a chunk
    make_weighted_sum: Callable[[int], Any]  # (n_queries) -> sums of a chunk's values
    store_head: Any  # (k, v, k_out, v_out, slot, n_embd_head, n_padded): one token, one head


def _float_type(name: str, size: int, store: Any) -> KVType:
    def make_scores(n_queries: int) -> Any:
        tile = make_tile(n_queries, name)
        zero, step, put = tile.zero, tile.fma, tile.store

        @device
        def scores(q, q_stride, n_embd_head, pages, k_offset, n_keys, out):
            """out[query, key] = q . k for the first n_keys of a chunk (rounded up); out rows of CHUNK_TOKENS"""
            for key in range(0, n_keys, 2 * W):
                page, slot = divmod(key, PAGE_TOKENS)
                k = load_i64(pages + 8 * page) + k_offset + size * slot
                f = zero(0)
                for i in range(n_embd_head):
                    f = step(f, k + size * i * PAGE_TOKENS, q + 4 * i, q_stride)
                put(out + 4 * key, 4 * CHUNK_TOKENS, f)

        return scores

    def make_weighted_sum(n_queries: int) -> Any:
        tile = make_tile(n_queries, name)
        zero, step, put = tile.zero, tile.fma, tile.store

        @device
        def weighted_sum(p, pages, v_offset, n_padded, n_keys, out, out_stride):
            """out[query, column] = sum of p[query, key] * v[key, column]"""
            for column in range(0, n_padded, 2 * W):
                f = zero(0)
                for page in range((n_keys + PAGE_TOKENS - 1) // PAGE_TOKENS):
                    v = load_i64(pages + 8 * page) + v_offset + size * column
                    first = page * PAGE_TOKENS
                    for key in range(first, min(n_keys, first + PAGE_TOKENS)):
                        f = step(f, v + size * (key - first) * n_padded, p + 4 * key, 4 * CHUNK_TOKENS)
                put(out + 4 * column, out_stride, f)

        return weighted_sum

    @device
    def store_head(k, v, k_out, v_out, slot, n_embd_head, n_padded):
        for i in range(n_embd_head):
            store(k_out + size * (i * PAGE_TOKENS + slot), load_f32(k + 4 * i))
            store(v_out + size * (slot * n_padded + i), load_f32(v + 4 * i))

    return KVType(KV_COLUMN_BYTES[name], make_scores, make_weighted_sum, store_head)


def _make_q8_scores(n_queries: int) -> Any:
    tile = make_tile(n_queries, "i8")
    zero, step, add_scaled, put = tile.zero, tile.fma, tile.add_scaled, tile.store

    @device
    def scores(q, q_stride, n_embd_head, pages, k_offset, n_keys, out):
        for key in range(0, n_keys, 2 * W):
            page, slot = divmod(key, PAGE_TOKENS)
            k = load_i64(pages + 8 * page) + k_offset
            scales = k + n_embd_head * PAGE_TOKENS + 2 * slot
            total = zero(0)
            for block in range(0, n_embd_head, QK):
                f = zero(0)
                for i in range(block, block + QK):
                    f = step(f, k + slot + i * PAGE_TOKENS, q + 4 * i, q_stride)
                total = add_scaled(total, f, scales + 2 * PAGE_TOKENS * (block // QK))
            put(out + 4 * key, 4 * CHUNK_TOKENS, total)

    return scores


def _make_q8_weighted_sum(n_queries: int) -> Any:
    tile = make_tile(n_queries, "i8")
    zero, step, put = tile.zero, tile.fma_scaled, tile.store

    @device
    def weighted_sum(p, pages, v_offset, n_padded, n_keys, out, out_stride):
        for column in range(0, n_padded, 2 * W):
            f = zero(0)
            for page in range((n_keys + PAGE_TOKENS - 1) // PAGE_TOKENS):
                v = load_i64(pages + 8 * page) + v_offset
                scales = v + n_padded * PAGE_TOKENS + 2 * (column // QK)
                first = page * PAGE_TOKENS
                for key in range(first, min(n_keys, first + PAGE_TOKENS)):
                    slot = key - first
                    scale = load_f16(scales + 2 * slot * (n_padded // QK))
                    f = step(f, v + slot * n_padded + column, scale, p + 4 * key, 4 * CHUNK_TOKENS)
            put(out + 4 * column, out_stride, f)

    return weighted_sum


@device
def _store_block(x, out, step, scale_out):
    """32 float32 at x -> int8 at out, `step` bytes apart, and their float16 scale."""
    amax = np.float32(0.0)
    for i in range(QK):
        amax = max(amax, abs(load_f32(x + 4 * i)))
    store_f16(scale_out, amax / np.float32(127.0))
    d = load_f16(scale_out)
    inverse = np.float32(1.0) / d if d > 0.0 else np.float32(0.0)
    for i in range(QK):
        q = round_to_i64(load_f32(x + 4 * i) * inverse)
        store_i8(out + step * i, min(127, max(-127, q)))


@device
def _store_q8_head(k, v, k_out, v_out, slot, n_embd_head, n_padded):
    for i in range(0, n_embd_head, QK):
        k_scales = k_out + n_embd_head * PAGE_TOKENS + 2 * (i // QK * PAGE_TOKENS + slot)
        _store_block(k + 4 * i, k_out + i * PAGE_TOKENS + slot, PAGE_TOKENS, k_scales)
        v_scales = v_out + n_padded * PAGE_TOKENS + 2 * (slot * (n_padded // QK) + i // QK)
        _store_block(v + 4 * i, v_out + slot * n_padded + i, 1, v_scales)


F16 = _float_type("f16", 2, store_f16)
F32 = _float_type("f32", 4, store_f32)
Q8_0 = KVType(KV_COLUMN_BYTES["q8_0"], _make_q8_scores, _make_q8_weighted_sum, _store_q8_head)
