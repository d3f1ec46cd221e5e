"""swiglu.py for F32, F16 and BF16 weights: silu(gate x) * (up x), chained for the product that follows.

The arithmetic is that of mul_mat_float and the row op `swiglu` one after the other, bit for bit.
"""

from __future__ import annotations

from typing import Any

from .compiler import device, kernel
from .mul_mat_float import (
    STEP,
    TAIL_BYTES,
    chain_stride,
    make_by_tile,
    make_decode,
    make_unpack,
    runs_of,
    tile_stride,
)
from .ops import swiglu_part
from .panel import SUMS, store_totals
from .scalar import load_i64
from .shares import distance, is_float_streamed, next_unit, rows_of_unit, take_rows
from .simd import W, make_transpose_rows, prefetch_write
from .weights import floats
from .widths import FLOAT_TILE_TOKENS, LINE

ROWS = 2 * W  # of a panel
# A tile's sums, half by half of a panel's rows: the order of a chain.
transpose_tile = make_transpose_rows([t * SUMS + half * 4 * W for half in range(2) for t in range(FLOAT_TILE_TOKENS)])


@device
def ask_for_chains(chained, n_rows):
    """Ask for what transpose_tile will write."""
    for lane in range(W):
        for line in range(0, 2 * STEP + LINE - 1, LINE):
            prefetch_write(chained + lane * runs_of(n_rows) * STEP + line)


def make_prefill_swiglu(weights: floats.FloatWeights) -> Any:
    unpack_panel, by_tile, size = make_unpack(weights), make_by_tile(weights), weights.size

    @device
    def prefill_swiglu(gate, up, n_rows, n, chained, hidden, hidden_chained, row, coming, n_tokens, scratch):
        """Rows row .. row + ROWS - 1 by every token; those from `coming` on will be next."""
        gate_sums = scratch
        up_sums = gate_sums + FLOAT_TILE_TOKENS * SUMS
        square = up_sums + FLOAT_TILE_TOKENS * SUMS
        panel = square + 4 * W * W
        up_panel = panel + W * chain_stride(runs_of(n))
        row_bytes = n * size
        unpack_panel(gate + row * row_bytes, n, panel, gate + coming * row_bytes, square)
        unpack_panel(up + row * row_bytes, n, up_panel, up + coming * row_bytes, square)
        chains = hidden_chained + row // W * STEP
        for t in range(0, n_tokens, FLOAT_TILE_TOKENS):
            count = min(n_tokens - t, FLOAT_TILE_TOKENS)
            if hidden_chained:
                ask_for_chains(chains, n_rows)
            by_tile(panel, n, chained, count, gate_sums)
            by_tile(up_panel, n, chained, count, up_sums)
            swiglu_part(gate_sums, up_sums, gate_sums, 0, count * SUMS // 4)
            if hidden_chained:
                transpose_tile(gate_sums, chains, runs_of(n_rows) * STEP)
                chains += tile_stride(n_rows)
            else:
                store_totals(gate_sums, hidden, 0, t, count, row, n_rows)
            chained += tile_stride(n)

    return prefill_swiglu


def make_swiglu(weights: floats.FloatWeights) -> Any:
    prefill_swiglu, decode_rows, size = make_prefill_swiglu(weights), make_decode(weights), weights.size

    @device
    def decode_swiglu(gate, up, n_rows, n, x, n_tokens, hidden, row, end, coming, scratch):
        """Rows row .. end - 1 by up to FLOAT_STREAMED_TOKENS tokens; those from `coming` on will be next."""
        row_bytes = n * size
        sums = scratch + TAIL_BYTES + 8 * W * W
        n_now, stride = end - row, 4 * (end - row)
        up_sums = sums + n_tokens * stride
        nbytes, gate_rows, up_rows = n_now * row_bytes, gate + row * row_bytes, up + row * row_bytes
        far = distance(gate_rows, nbytes, up_rows)
        decode_rows(gate_rows, n_now, n, x, n_tokens, sums, 0, stride, 0, n_now, far, scratch)
        far = distance(up_rows, nbytes, gate + coming * row_bytes)
        decode_rows(up_rows, n_now, n, x, n_tokens, up_sums, 0, stride, 0, n_now, far, scratch)
        for t in range(n_tokens):
            held = t * stride
            swiglu_part(sums + held, up_sums + held, hidden + 4 * (t * n_rows + row), 0, n_now)

    def swiglu(gate, up, n_rows, n, x, chained, hidden, hidden_chained, count, scratch, scratch_bytes, work, ith, nth):
        """hidden[t] = silu(gate x[t]) * (up x[t]); gate, up: (n_rows, n), n_rows a multiple of ROWS.

        x: (n_tokens, n) float32, chained: by chain_rows. The result of tokens that are not streamed goes to
        hidden_chained, as chain_rows would write it, if that is not 0, else to hidden, (n_tokens, n_rows).
        """
        n_tokens, mine = load_i64(count), scratch + ith * scratch_bytes
        if n_tokens == 0:
            return
        unit = rows_of_unit(n * size) if is_float_streamed(n_tokens) else ROWS
        row, last = take_rows(work, n_rows, nth, unit)
        while row < last:
            end, following, following_last = next_unit(work, n_rows, nth, unit, row, last)
            if is_float_streamed(n_tokens):
                decode_swiglu(gate, up, n_rows, n, x, n_tokens, hidden, row, end, following, mine)
            else:
                prefill_swiglu(gate, up, n_rows, n, chained, hidden, hidden_chained, row, following, n_tokens, mine)
            row, last = following, following_last

    return kernel(swiglu)


swiglu_f32 = make_swiglu(floats.f32)
swiglu_f16 = make_swiglu(floats.f16)
swiglu_bf16 = make_swiglu(floats.bf16)
swiglu_bf16_pairs = make_swiglu(floats.bf16_pairs)
