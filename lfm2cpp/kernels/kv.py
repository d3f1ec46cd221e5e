"""How K and V lie in a page, one KVType each for f16, f32 and q8_0: stored, multiplied with queries, summed up.

Per head, K is transposed, [n_embd_head][PAGE_TOKENS], so that keys are lanes; V is [PAGE_TOKENS][n_padded]. q8_0 has an
int8 where the others have a float, and after them float16 scales: K's [n_embd_head / 32][PAGE_TOKENS], V's
[PAGE_TOKENS][n_padded / 32].

One head's K or V in one page is a block. Blocks are listed in the order in which a thread uses them, and every one is
asked for up to AHEAD places before its turn and, where that helps, once more soon before its use (prefetch_again).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compiler import device
from .scalar import load_f16, load_f32, load_i64, round_to_i64, store_f16, store_f32, store_i8
from .simd import W, prefetch_again, prefetch_early, prefetch_write
from .tile import make_tile
from .widths import AGAIN_NEAR, CHUNK_TOKENS, KV_COLUMN_BYTES, LINE, PAGE_TOKENS, REGISTERS

QK = 32
AHEAD = 2  # blocks that are asked for before they are used: one takes longer than memory needs to answer
# Of floats, where they are asked for once more behind that or go straight to the first-level cache.
FLOATS_AHEAD = AHEAD if AGAIN_NEAR else 1
# Bytes ahead to ask for floats again. In the first-level cache they would push out each other, and the scores, by
# multiples of 4096. Behind the last head of a page are other blocks of it, which then need not come from memory when it
# is their turn.
NEAR = 2048 if AGAIN_NEAR else 4096
# Queries up to which there are registers for two tiles, so that whole rows of a page are used at once.
FEW_QUERIES = 4 if REGISTERS == 32 else 2


@device
def pages_of(n_keys):
    return (n_keys + PAGE_TOKENS - 1) // PAGE_TOKENS


@dataclass(frozen=True)
class KVType:
    """What attention and store_kv need of one type. Sizes are per column: PAGE_TOKENS elements and their scales."""

    column_bytes: int
    ahead: int  # blocks that are asked for before they are used
    # (n_queries) -> scores(q, q_stride, n_embd_head, blocks, n_keys, out): out[query, key] = q . k for n_keys keys
    # (rounded up), those of each page in one of `blocks`; out: rows of CHUNK_TOKENS.
    make_scores: Callable[[int], Any]
    # (n_queries) -> weighted_sum(p, blocks, n_padded, n_keys, is_first, out, out_stride):
    # out[query, column] = sum of p[query, key] * v[key, column], added to what is there unless is_first.
    make_weighted_sum: Callable[[int], Any]
    store_head: Any  # (k, v, k_out, v_out, slot, n_embd_head, n_padded): one token, one head


def _float_type(name: str, size: int, store: Any) -> KVType:
    def make_scores(n_queries: int) -> Any:
        tile = make_tile(n_queries, name)
        zero, step, put = tile.zero, tile.fma, tile.store
        two = n_queries <= FEW_QUERIES
        span = 4 * W if two else 2 * W

        @device
        def scores(q, q_stride, n_embd_head, blocks, n_keys, out):
            for key in range(0, n_keys, span):
                page, slot = divmod(key, PAGE_TOKENS)
                at = blocks + 8 * page
                k, later = load_i64(at) + size * slot, load_i64(at + 8 * FLOATS_AHEAD) + size * slot
                f, g = zero(0), zero(0)
                for i in range(n_embd_head):
                    row, x = size * i * PAGE_TOKENS, q + 4 * i
                    for line in range(0, size * span, LINE):  # in turn: not make_prefetch_lines, which is 3 % slower
                        if two:
                            prefetch_again(k + row + line + NEAR)
                        prefetch_early(later + row + line)
                    f = step(f, k + row, x, q_stride)
                    if two:
                        g = step(g, k + row + size * 2 * W, x, q_stride)
                put(out + 4 * key, 4 * CHUNK_TOKENS, f)
                if two:
                    put(out + 4 * (key + 2 * W), 4 * CHUNK_TOKENS, g)

        return scores

    def make_weighted_sum(n_queries: int) -> Any:
        tile = make_tile(n_queries, name)
        zero, step, get, put = tile.zero, tile.fma, tile.load, tile.store

        def make_columns(two: bool) -> Any:
            """A pass over the values for 2 W columns, or for twice as many."""
            nbytes = size * (4 * W if two else 2 * W)

            @device
            def columns(p, blocks, offset, row_bytes, n_keys, is_first, out, out_stride):
                f, g = zero(0), zero(0)
                if not is_first:
                    f = get(out, out_stride)
                    if two:
                        g = get(out + 8 * W, out_stride)
                for page in range(pages_of(n_keys)):
                    at = blocks + 8 * page
                    v, later = load_i64(at) + offset, load_i64(at + 8 * FLOATS_AHEAD) + offset
                    first = page * PAGE_TOKENS
                    for key in range(first, min(n_keys, first + PAGE_TOKENS)):
                        row, x = (key - first) * row_bytes, p + 4 * key
                        for line in range(0, nbytes, LINE):
                            if two:
                                prefetch_again(v + row + line + NEAR)
                            prefetch_early(later + row + line)
                        f = step(f, v + row, x, 4 * CHUNK_TOKENS)
                        if two:
                            g = step(g, v + row + size * 2 * W, x, 4 * CHUNK_TOKENS)
                put(out, out_stride, f)
                if two:
                    put(out + 8 * W, out_stride, g)

            return columns

        one_tile, two_tiles = make_columns(False), make_columns(n_queries <= FEW_QUERIES)

        @device
        def weighted_sum(p, blocks, n_padded, n_keys, is_first, out, out_stride):
            column, row_bytes = 0, size * n_padded
            if n_queries <= FEW_QUERIES:
                for _ in range(n_padded // (4 * W)):
                    two_tiles(p, blocks, size * column, row_bytes, n_keys, is_first, out + 4 * column, out_stride)
                    column += 4 * W
            for _ in range((n_padded - column) // (2 * W)):
                one_tile(p, blocks, size * column, row_bytes, n_keys, is_first, out + 4 * column, out_stride)
                column += 2 * W

        return weighted_sum

    @device
    def store_head(k, v, k_out, v_out, slot, n_embd_head, n_padded):
        for i in range(n_embd_head):
            prefetch_write(k_out + size * (i * PAGE_TOKENS + slot))  # each in a line of its own
        for i in range(n_embd_head):
            store(k_out + size * (i * PAGE_TOKENS + slot), load_f32(k + 4 * i))
            store(v_out + size * (slot * n_padded + i), load_f32(v + 4 * i))

    return KVType(KV_COLUMN_BYTES[name], FLOATS_AHEAD, make_scores, make_weighted_sum, store_head)


@device
def ask_for(blocks, first, nbytes):
    """Ask for nbytes from `first` on of the block after this one and of the one AHEAD places on."""
    soon, later = load_i64(blocks + 8), load_i64(blocks + 8 * AHEAD)
    for line in range(first, first + nbytes, LINE):
        if AGAIN_NEAR:  # integers take longer to use than floats, and need no second request that is not nearer
            prefetch_again(soon + line)
        prefetch_early(later + line)


def _make_q8_scores(n_queries: int) -> Any:
    tile = make_tile(n_queries, "i8")
    zero, step, add_scaled, put = tile.zero, tile.fma, tile.add_scaled, tile.store

    @device
    def scores(q, q_stride, n_embd_head, blocks, n_keys, out):
        for key in range(0, n_keys, 2 * W):
            page, slot = divmod(key, PAGE_TOKENS)
            at = blocks + 8 * page
            k = load_i64(at)
            scales = k + n_embd_head * PAGE_TOKENS + 2 * slot
            total = zero(0)
            for block in range(0, n_embd_head, QK):
                f = zero(0)
                if slot == 0:
                    ask_for(at, n_embd_head * PAGE_TOKENS + 2 * PAGE_TOKENS * (block // QK), 2 * PAGE_TOKENS)
                for i in range(block, block + QK):
                    if slot == 0:
                        ask_for(at, i * PAGE_TOKENS, PAGE_TOKENS)
                    f = step(f, k + slot + i * PAGE_TOKENS, q + 4 * i, q_stride)
                total = add_scaled(total, f, scales + 2 * PAGE_TOKENS * (block // QK))
            put(out + 4 * key, 4 * CHUNK_TOKENS, total)

    return scores


def _make_q8_weighted_sum(n_queries: int) -> Any:
    tile = make_tile(n_queries, "i8")
    zero, step, get, put = tile.zero, tile.fma_scaled, tile.load, tile.store

    @device
    def weighted_sum(p, blocks, n_padded, n_keys, is_first, out, out_stride):
        for column in range(0, n_padded, 2 * W):
            f = zero(0)
            if not is_first:
                f = get(out + 4 * column, out_stride)
            for page in range(pages_of(n_keys)):
                at = blocks + 8 * page
                v = load_i64(at)
                if column == 0:
                    ask_for(at, n_padded * PAGE_TOKENS, PAGE_TOKENS * (n_padded // QK) * 2)
                scales = v + n_padded * PAGE_TOKENS + 2 * (column // QK)
                first = page * PAGE_TOKENS
                for key in range(first, min(n_keys, first + PAGE_TOKENS)):
                    slot = key - first
                    if column == 0:
                        ask_for(at, slot * n_padded, n_padded)
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
Q8_0 = KVType(KV_COLUMN_BYTES["q8_0"], AHEAD, _make_q8_scores, _make_q8_weighted_sum, _store_q8_head)
