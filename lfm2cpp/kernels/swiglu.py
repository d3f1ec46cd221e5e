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
    first_tile,
    n_groups_of,
    quantize_blocks,
    quantize_tokens,
    tile_stride,
)
from .compiler import device, kernel
from .dot_matrix import leave_matrices, use_matrices
from .few_tokens import make_few_tokens
from .mul_mat import TAIL_BYTES, make_decode
from .ops import swiglu_part
from .panel import SUMS, ask_for_totals, make_panel_product, store_totals
from .scalar import atomic_add, load_i64
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .shares import distance, is_streamed, next_unit, take_rows
from .simd import W
from .weights import BLOCK_TYPES
from .widths import FEW_TOKENS, QUANTIZE_NBYTES, SLICED_TOKENS, TILE_TOKENS, TOTALS

ROWS = 2 * W  # rows of a unit
ROWS_AT_ONCE = 16 * ROWS  # of one token, finished together: what waits long for a few numbers waits together
FINISHED_TOKENS = 2 * TILE_TOKENS  # of many, the same: they fill more of the lanes of quantize_lanes than a tile does


@device
def finish_token(gate, up, hidden, act, row, last, n_rows, room):
    """hidden = silu(gate) * up for rows row .. last - 1 of one token; then their blocks of `act`."""
    swiglu_part(gate, up, gate, 0, last - row)
    if act:
        quantize_blocks(gate, row // QK, last // QK, act, n_groups_of(n_rows), 0, True, room)
    if hidden:
        for i in range(0, 4 * (last - row), 4):
            store_scalar(hidden + 4 * row + i, load_scalar(gate + i))


@device
def finish_tile(gate, up, hidden, act, t, count, row, n_rows, room):
    """The same for ROWS rows from `row` on of tokens t .. t + count - 1; gate, up: SUMS bytes a token."""
    swiglu_part(gate, up, gate, 0, count * SUMS // 4)
    if act:
        quantize_tokens(gate, SUMS, count, act, n_groups_of(n_rows), t, row // QK, False, room)
    if hidden:
        store_totals(gate, hidden, 0, t, count, row, n_rows)


def make_stream(weights: ModuleType) -> Any:
    decode_rows = make_decode(weights)

    @device
    def stream(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, nth, work, scratch):
        """The rows that this thread takes, by one token."""
        gate_sums = scratch + TAIL_BYTES + 8 * W * W
        up_sums, room = gate_sums + 4 * ROWS_AT_ONCE, gate_sums + 8 * ROWS_AT_ONCE
        nbytes = ROWS * row_bytes
        first, last = take_rows(work, n_rows, nth, ROWS)
        row = first  # the sums from `first` on are not finished
        while row < last:
            end, following, following_last = next_unit(work, n_rows, nth, ROWS, row, last)
            gate_rows, up_rows, at = gate + row * row_bytes, up + row * row_bytes, 4 * (row - first)
            far = distance(gate_rows, nbytes, up_rows)
            n_now = end - row
            decode_rows(gate_rows, row_bytes, n_now, n, act, gate_sums + at, 0, 0, n_now, far, scratch)
            far = distance(up_rows, nbytes, gate + following * row_bytes)
            decode_rows(up_rows, row_bytes, n_now, n, act, up_sums + at, 0, 0, n_now, far, scratch)
            if end == last or end - first == ROWS_AT_ONCE:
                finish_token(gate_sums, up_sums, hidden, hidden_act, first, end, n_rows, room)
                first = following
            row, last = following, following_last

    return stream


def make_use_registers(weights: ModuleType) -> Any:
    by_few = make_few_tokens(weights)

    @device
    def use_registers(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, n_tokens, nth, work, room):
        """The rows that this thread takes, by up to FEW_TOKENS tokens."""
        gate_sums = room + QUANTIZE_NBYTES
        up_sums, scratch = gate_sums + TOTALS, gate_sums + 2 * TOTALS
        row, last = take_rows(work, n_rows, nth, ROWS)
        while row < last:
            _, following, following_last = next_unit(work, n_rows, nth, ROWS, row, last)
            now, coming = row * row_bytes, following * row_bytes
            by_few(gate + now, row_bytes, n_rows - row, n, gate + coming, act, n_tokens, gate_sums, scratch)
            by_few(up + now, row_bytes, n_rows - row, n, up + coming, act, n_tokens, up_sums, scratch)
            finish_tile(gate_sums, up_sums, hidden, hidden_act, 0, n_tokens, row, n_rows, room)
            row, last = following, following_last

    return use_registers


def make_use_panels(weights: ModuleType) -> Any:
    product = make_panel_product(weights)
    unpack, by_tiles, by_slices = product.unpack, product.by_tiles, product.by_slices
    block_nbytes = product.block_nbytes

    @device
    def use_panel(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, n_tokens, row, coming, room):
        gate_sums, now = room + QUANTIZE_NBYTES, row * row_bytes
        up_sums, panel = gate_sums + TOTALS, gate_sums + 2 * TOTALS
        if FEW_TOKENS < n_tokens <= SLICED_TOKENS:  # at some levels no number is
            by_slices(gate + now, row_bytes, n_rows - row, n, panel, gate + coming, act, n_tokens, gate_sums)
            by_slices(up + now, row_bytes, n_rows - row, n, panel, up + coming, act, n_tokens, up_sums)
            finish_tile(gate_sums, up_sums, hidden, hidden_act, 0, n_tokens, row, n_rows, room)
            return
        up_panel = panel + n // 32 * block_nbytes
        unpack(gate + now, row_bytes, n_rows - row, n, panel, gate + coming)
        unpack(up + now, row_bytes, n_rows - row, n, up_panel, up + coming)
        for t in range(0, n_tokens, FINISHED_TOKENS):
            count = min(n_tokens - t, FINISHED_TOKENS)
            if hidden_act:
                for i in range(0, count, TILE_TOKENS):
                    ask_for_block(hidden_act, n_groups_of(n_rows), t + i, row // QK)
            if hidden:
                ask_for_totals(hidden, 0, t, count, row, n_rows)
            by_tiles(panel, n, act, count, gate_sums)
            by_tiles(up_panel, n, act, count, up_sums)
            finish_tile(gate_sums, up_sums, hidden, hidden_act, t, count, row, n_rows, room)
            act += FINISHED_TOKENS // TILE_TOKENS * tile_stride(n_groups_of(n))

    @device
    def use_panels(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, n_tokens, nth, work, room):
        """The panels that this thread takes, by many tokens."""
        use_matrices()
        row = atomic_add(work, 1) * ROWS
        while row < n_rows:
            coming = (row + nth * ROWS) * row_bytes
            use_panel(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, n_tokens, row, coming, room)
            row = atomic_add(work, 1) * ROWS
        leave_matrices()

    return use_panels


def make_swiglu(weights: ModuleType) -> Any:
    stream, use_registers, use_panels = make_stream(weights), make_use_registers(weights), make_use_panels(weights)

    def swiglu(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, count, scratch, scratch_bytes, work, ith, nth):
        """hidden[t] = silu(gate act[t]) * (up act[t]); gate, up: (n_rows, n), act: quantized rows.

        The result goes to `hidden`, float32 (n_tokens, n_rows), and to hidden_act, quantized, whichever is not 0;
        hidden_act only where ROWS is a whole block.
        """
        n_tokens, mine = load_i64(count), scratch + ith * scratch_bytes
        tiles = first_tile(act, n_groups_of(n))
        if is_streamed(n_tokens):
            stream(gate, up, row_bytes, n_rows, n, act, hidden, hidden_act, nth, work, mine)
        elif n_tokens <= FEW_TOKENS:
            use_registers(gate, up, row_bytes, n_rows, n, tiles, hidden, hidden_act, n_tokens, nth, work, mine)
        else:
            use_panels(gate, up, row_bytes, n_rows, n, tiles, hidden, hidden_act, n_tokens, nth, work, mine)

    return kernel(swiglu)


globals().update({f"swiglu_{name}": make_swiglu(weights) for name, weights in BLOCK_TYPES.items()})
