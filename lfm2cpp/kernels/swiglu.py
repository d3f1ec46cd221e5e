"""The first half of the feed-forward, fused: silu(gate x) * (up x), quantized for the product that follows.

Both matrices' rows are multiplied together, so gate and up never reach memory. The arithmetic is that of mul_mat and
swiglu one after the other, bit for bit.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from .activation import (
    QK,
    ask_for_block,
    find_scale,
    first_tile,
    n_groups_of,
    quantize_blocks,
    tile_stride,
    write_block,
)
from .compiler import device, kernel
from .mul_mat import (
    FEW_TOKENS,
    SUMS,
    TAIL_BYTES,
    ask_for_totals,
    make_decode,
    make_panel_product,
    store_totals,
    totals_nbytes,
)
from .ops import swiglu_part
from .scalar import atomic_add, load_i64
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .shares import distance, is_streamed, next_unit, take_rows
from .simd import W
from .weights import q4_0, q4_1, q6_K, q8_0
from .widths import STREAMED_TOKENS, TILE_TOKENS

ROWS = 2 * W  # rows of a unit
ROWS_AT_ONCE = 8 * ROWS  # of a streamed token, finished together: what waits long for a few numbers waits together
SUMS_AT_ONCE = 4 * ROWS_AT_ONCE  # bytes


@device
def finish_token(gate, up, hidden, act, t, row, last, n_rows):
    """hidden = silu(gate) * up for rows row .. last - 1 of token t; then their blocks of `act`."""
    swiglu_part(gate, up, gate, 0, last - row)
    if act:
        quantize_blocks(gate, row // QK, last // QK, act, n_groups_of(n_rows), t, True)
    if hidden:
        for i in range(0, 4 * (last - row), 4):
            store_scalar(hidden + 4 * (t * n_rows + row) + i, load_scalar(gate + i))


@device
def finish_tile(gate, up, hidden, act, t, count, row, n_rows):
    """The same for ROWS rows from `row` on of tokens t .. t + count - 1; gate, up: SUMS bytes a token."""
    n_groups = n_groups_of(n_rows)
    swiglu_part(gate, up, gate, 0, count * SUMS // 4)
    if act:
        for i in range(count):
            find_scale(gate + i * SUMS, act, n_groups, t + i, row // QK, False)
        for i in range(count):
            write_block(gate + i * SUMS, act, n_groups, t + i, row // QK, False)
    if hidden:
        store_totals(gate, hidden, 0, t, count, row, n_rows)


def make_decode_swiglu(weights: ModuleType) -> Any:
    decode_rows = make_decode(weights)

    @device
    def decode_swiglu(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, n_tokens, nth, work, scratch):
        """The rows that this thread takes, by up to STREAMED_TOKENS tokens."""
        gate_sums = scratch + TAIL_BYTES + 8 * W * W
        up_sums = gate_sums + STREAMED_TOKENS * SUMS_AT_ONCE
        nbytes = ROWS * row_bytes
        first, last = take_rows(work, n_rows, nth, ROWS)
        row = first  # the sums from `first` on are not finished
        while row < last:
            end, following, following_last = next_unit(work, n_rows, nth, ROWS, row, last)
            gate_rows, up_rows, at = gate + row * row_bytes, up + row * row_bytes, 4 * (row - first)
            far = distance(gate_rows, nbytes, up_rows)
            n_now, sums = end - row, gate_sums + at
            decode_rows(gate_rows, row_bytes, n_now, n, act, n_tokens, sums, 0, SUMS_AT_ONCE, 0, n_now, far, scratch)
            far = distance(up_rows, nbytes, gate + following * row_bytes)
            sums = up_sums + at
            decode_rows(up_rows, row_bytes, n_now, n, act, n_tokens, sums, 0, SUMS_AT_ONCE, 0, n_now, far, scratch)
            if end == last or end - first == ROWS_AT_ONCE:
                for t in range(n_tokens):
                    held = t * SUMS_AT_ONCE
                    finish_token(gate_sums + held, up_sums + held, hidden, hidden_act, t, first, end, n_rows)
                first = following
            row, last = following, following_last

    return decode_swiglu


def make_prefill_swiglu(weights: ModuleType) -> Any:
    product = make_panel_product(weights)
    unpack, by_tile, by_few = product.unpack, product.by_tile, product.by_few
    panel_block = weights.PANEL_BLOCK

    @device
    def prefill_swiglu(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, row, n_tokens, nth, scratch):
        """Rows row .. row + ROWS - 1 by every token."""
        gate_sums = scratch
        up_sums = gate_sums + totals_nbytes(FEW_TOKENS)
        panel = up_sums + totals_nbytes(FEW_TOKENS)
        first, coming = row * row_bytes, (row + nth * ROWS) * row_bytes
        if n_tokens <= FEW_TOKENS:
            by_few(gate + first, row_bytes, n_rows - row, n, panel, gate + coming, act, n_tokens, gate_sums)
            by_few(up + first, row_bytes, n_rows - row, n, panel, up + coming, act, n_tokens, up_sums)
            finish_tile(gate_sums, up_sums, hidden, hidden_act, 0, n_tokens, row, n_rows)
            return
        up_panel = panel + n // 32 * panel_block
        unpack(gate + first, row_bytes, n_rows - row, n, panel, gate + coming)
        unpack(up + first, row_bytes, n_rows - row, n, up_panel, up + coming)
        for t in range(0, n_tokens, TILE_TOKENS):
            count = min(n_tokens - t, TILE_TOKENS)
            if hidden_act:
                ask_for_block(hidden_act, n_groups_of(n_rows), t, row // QK)
            if hidden:
                ask_for_totals(hidden, 0, t, count, row, n_rows)
            by_tile(panel, n, act, count, gate_sums)
            by_tile(up_panel, n, act, count, up_sums)
            finish_tile(gate_sums, up_sums, hidden, hidden_act, t, count, row, n_rows)
            act += tile_stride(n_groups_of(n))

    return prefill_swiglu


def make_swiglu(weights: ModuleType) -> Any:
    decode_swiglu, prefill_swiglu = make_decode_swiglu(weights), make_prefill_swiglu(weights)

    def swiglu(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, count, scratch, scratch_bytes, work, ith, nth):
        """hidden[t] = silu(gate act[t]) * (up act[t]); gate, up: (n_rows, n), act: quantized rows.

        The result goes to `hidden`, float32 (n_tokens, n_rows), and to hidden_act, quantized, whichever is not 0;
        hidden_act only where ROWS is a whole block.
        """
        n_tokens, mine = load_i64(count), scratch + ith * scratch_bytes
        if is_streamed(n_tokens):
            decode_swiglu(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, n_tokens, nth, work, mine)
            return
        act = first_tile(act, n_groups_of(n))
        row = atomic_add(work, 1) * ROWS
        while row < n_rows:
            prefill_swiglu(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, row, n_tokens, nth, mine)
            row = atomic_add(work, 1) * ROWS

    return kernel(swiglu)


swiglu_q4_0 = make_swiglu(q4_0)
swiglu_q4_1 = make_swiglu(q4_1)
swiglu_q6_K = make_swiglu(q6_K)
swiglu_q8_0 = make_swiglu(q8_0)
