"""QK norm, rotary positions (NeoX: pairs are half a head apart), and storing K and V into pages."""

from __future__ import annotations

from typing import Any

from . import kv
from .batch import N_TOKENS, POSITIONS, RUN_FIELDS, RUN_OF, RUN_PAGES, RUNS
from .compiler import F32, device, kernel
from .ops import inverse_rms, scale_part, share_of
from .scalar import load_f32 as load_scalar
from .scalar import load_i32, load_i64
from .scalar import store_f32 as store_scalar
from .simd import W, load_f32, store_f32
from .widths import PAGE_TOKENS


@device
def rotate(x, table, half, out):
    """out = x rotated; table holds half cosines, then half sines, of one position"""
    whole, other = half // W * W, 4 * half
    for i in range(0, 4 * whole, 4 * W):
        a, b = load_f32(x + i), load_f32(x + i + other)
        cos, sin = load_f32(table + i), load_f32(table + i + other)
        store_f32(out + i, a * cos - b * sin)
        store_f32(out + i + other, b * cos + a * sin)
    for i in range(4 * whole, 4 * half, 4):
        a, b = load_scalar(x + i), load_scalar(x + i + other)
        cos, sin = load_scalar(table + i), load_scalar(table + i + other)
        store_scalar(out + i, a * cos - b * sin)
        store_scalar(out + i + other, b * cos + a * sin)


@kernel
def norm_rope(x, weight, eps: F32, n_head, n_embd_head, table, normed, out, batch, ith, nth):
    """Per head: out = rope(weight * x / rms(x)); x, normed, out: (n_tokens, n_head * n_embd_head).

    table: (n_ctx, n_embd_head) float32, cosines then sines of every position; it follows HF's float32 arithmetic.
    """
    positions = load_i64(batch + 8 * POSITIONS)
    begin, end = share_of(load_i64(batch + 8 * N_TOKENS) * n_head, ith, nth)
    for unit in range(begin, end):
        head = 4 * unit * n_embd_head
        scale_part(x + head, weight, inverse_rms(x + head, n_embd_head, eps), normed + head, 0, n_embd_head)
        position = load_i32(positions + 4 * (unit // n_head))
        rotate(normed + head, table + 4 * position * n_embd_head, n_embd_head // 2, out + head)


def make_store_kv(kv_type: kv.KVType) -> Any:
    store_head, column_bytes = kv_type.store_head, kv_type.column_bytes

    def store_kv(k, v, n_head_kv, n_embd_head, n_padded, k_offset, v_offset, batch, ith, nth):
        """Append K and V, (n_tokens, n_head_kv * n_embd_head) float32, to the pages of their sequences (kv.py).

        Units are dealt as norm_rope deals them, so a thread stores what it has itself rotated.
        """
        positions, run_of = load_i64(batch + 8 * POSITIONS), load_i64(batch + 8 * RUN_OF)
        runs = load_i64(batch + 8 * RUNS)
        begin, end = share_of(load_i64(batch + 8 * N_TOKENS) * n_head_kv, ith, nth)
        for unit in range(begin, end):
            t, head = divmod(unit, n_head_kv)
            run = runs + 8 * RUN_FIELDS * load_i32(run_of + 4 * t)
            page, slot = divmod(load_i32(positions + 4 * t), PAGE_TOKENS)
            base = load_i64(load_i64(run + 8 * RUN_PAGES) + 8 * page)
            k_out = base + k_offset + head * column_bytes * n_embd_head
            v_out = base + v_offset + head * column_bytes * n_padded
            row = 4 * unit * n_embd_head
            store_head(k + row, v + row, k_out, v_out, slot, n_embd_head, n_padded)

    return kernel(store_kv)


store_kv_f16 = make_store_kv(kv.F16)
store_kv_f32 = make_store_kv(kv.F32)
store_kv_q8_0 = make_store_kv(kv.Q8_0)
