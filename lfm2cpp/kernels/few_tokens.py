"""Rows by a few tokens, more than are streamed and fewer than pay for a panel.

W rows at a time: their blocks become integers side by side in registers, and one tile of tokens uses them at once. A
token's sums are added up as in a panel.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

from .activation import n_groups_of, tile_stride
from .compiler import device
from .dot_tile import REGISTERS, make_dot_tile
from .panel import SUMS, VECTOR, clear_totals, file_nbytes, whole_rows
from .scalar import hold, keep_apart
from .simd import W, make_prefetch_lines
from .tile import BLOCK, ENTRY
from .widths import FEW_TOKENS, LINE, ROW_TILE_TOKENS, TILE_TOKENS

WIDEST = ROW_TILE_TOKENS[-1]
assert FEW_TOKENS <= WIDEST or WIDEST % TILE_TOKENS == 0  # where a second tile of tokens begins


@cache
def make_few_tokens(weights: ModuleType) -> Any:
    """by_few(w, row_bytes, n_rows, n, coming, act, n_tokens, totals, scratch): totals, SUMS bytes a token, = up to 2 W
    of the n_rows rows at w by up to FEW_TOKENS tokens; the rows at `coming` will be next."""
    run_rows, prepare_rows = _make_run_rows(weights, ROW_TILE_TOKENS), weights.prepare_rows

    @device
    def by_few(w, row_bytes, n_rows, n, coming, act, n_tokens, totals, scratch):
        n_blocks, n_groups = n // 32, n_groups_of(n)
        w = whole_rows(w, row_bytes, n_rows, scratch)
        room = totals + (FEW_TOKENS + TILE_TOKENS) * SUMS
        clear_totals(totals, n_tokens + TILE_TOKENS)
        for half in range(2):
            rows = prepare_rows(w + half * W * row_bytes, row_bytes, n_blocks, scratch + 2 * W * row_bytes)
            sums = totals + half * VECTOR
            for t in range(0, n_tokens, WIDEST):
                tiles = act + t // TILE_TOKENS * tile_stride(n_groups)
                run_rows(n_tokens - t, rows, row_bytes, coming, n_blocks, n_groups, tiles, sums + t * SUMS, room)
            coming += W * row_bytes

    return by_few


def _make_run_rows(weights: ModuleType, widths: tuple[int, ...]) -> Any:
    """W rows by the narrowest tile that holds n_tokens tokens, or by the widest."""
    narrow = _make_run_tile(weights, widths[0])
    n_narrow, wider = widths[0], _make_run_rows(weights, widths[1:]) if widths[1:] else None

    @device
    def run_rows(n_tokens, w, row_bytes, coming, n_blocks, n_groups, act, totals, room):
        if wider is None or n_tokens <= n_narrow:
            narrow(w, row_bytes, coming, n_blocks, n_groups, act, totals, room)
        else:
            wider(n_tokens, w, row_bytes, coming, n_blocks, n_groups, act, totals, room)

    return run_rows


def _make_run_tile(weights: ModuleType, n_tokens: int) -> Any:
    tile = make_dot_tile(n_tokens, REGISTERS)
    zero, add_to = tile.zero, tile.add_to
    sum_block, finish = weights.sum_block(tile), weights.finish_block(tile)
    block_columns, block_scales, nbytes = weights.block_columns, weights.block_scales, file_nbytes(weights)
    ask_for_block = make_prefetch_lines(range(0, nbytes, LINE), False)

    @device
    def run_tile(w, row_bytes, coming, n_blocks, n_groups, act, totals, room):
        """totals += the products of W rows at w with n_tokens tokens, chain by chain. Meanwhile it asks for `coming`.

        The sums of a chain may lie at `room`.
        """
        keep_apart()
        for c in range(min(W, n_blocks)):
            f = zero(room)
            a = hold(act + c * n_groups * (TILE_TOKENS * BLOCK))
            tables = hold(act + c * n_groups * (TILE_TOKENS * ENTRY))
            for b in range(c, n_blocks, W):
                ask_for_block(coming)
                coming += nbytes
                q, scales = block_columns(w, row_bytes, b), block_scales(w, row_bytes, b)
                sums = sum_block(q, a, tables, TILE_TOKENS * n_groups, 0)
                f = finish(f, sums, scales, tables, TILE_TOKENS * n_groups)
                a += TILE_TOKENS * BLOCK
                tables += TILE_TOKENS * ENTRY
            add_to(totals, f)

    return run_tile
