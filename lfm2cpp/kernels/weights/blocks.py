"""What types of 32 elements share: W blocks side by side are a group, and each begins with a float16 scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lfm2cpp.kernels.compiler import device
from lfm2cpp.kernels.shares import make_prefetches
from lfm2cpp.kernels.simd import W, fma, gather_f16, load_f32, load_i32, make_gather_f16, to_f32
from lfm2cpp.kernels.widths import ACT_D, ACT_DS, ACT_GROUP


def make_row_group(block_bytes: int) -> Any:
    @device
    def row_group(row, g):
        return row + g * (W * block_bytes)

    return row_group


def make_block_scales(block_bytes: int, minimum: int | None = None) -> Any:
    """block_scales: the scale, and the minimum, if there is one, at `minimum` in a block"""

    @device
    def scale_alone(w, row_bytes, b):
        return (gather_f16(w + b * block_bytes, row_bytes),)

    @device
    def scale_and_minimum(w, row_bytes, b):
        block = w + b * block_bytes
        return gather_f16(block, row_bytes), gather_f16(block + minimum, row_bytes)

    return scale_alone if minimum is None else scale_and_minimum


def make_sum_levels(block_bytes: int, dots: Sequence[Any], sum_pieces: Any) -> Any:
    """sum_levels(w, a, far): lane b is the sum of level * activation over block b of the group at w.

    dots: of each pair of activation vectors a word dot(w, a), the four partial sums of each piece's block, which
    sum_pieces adds up.
    """
    dot_0, dot_1, dot_2, dot_3 = dots
    ask_0, ask_1, ask_2, ask_3 = make_prefetches(W * block_bytes, 4)

    @device
    def sum_levels(w, a, far):
        ask_0(w, far)
        s0 = dot_0(w, a)
        ask_1(w, far)
        s1 = dot_1(w, a + 8 * W)
        ask_2(w, far)
        s2 = dot_2(w, a + 16 * W)
        ask_3(w, far)
        s3 = dot_3(w, a + 24 * W)
        return sum_pieces(s0, s1, s2, s3)

    return sum_levels


def make_dot_scaled(block_bytes: int, sum_levels: Any, table: int, times: int = 1) -> Any:
    """dot_group for x = d * (level - offset).

    `times` entries of `table` are minus the offset times the sum of the activations.
    """
    gather_scales = make_gather_f16(block_bytes, 0)

    @device
    def dot_group(acc, w, act, n_groups, g, far):
        tables = act + g * (4 * W)
        sums = sum_levels(w, act + g * (32 * W), far)
        for _ in range(times):
            sums = sums + load_i32(tables + n_groups * table)
        scale = gather_scales(w) * load_f32(tables + n_groups * ACT_D)
        return fma(to_f32(sums), scale, acc)

    return dot_group


def make_dot_affine(block_bytes: int, minimum: int, sum_levels: Any) -> Any:
    """dot_group for x = d * level + m; m is at `minimum` in a block."""
    gather_scales, gather_minima = make_gather_f16(block_bytes, 0), make_gather_f16(block_bytes, minimum)

    @device
    def dot_group(acc, w, act, n_groups, g, far):
        tables = act + g * (4 * W)
        scale = gather_scales(w) * load_f32(tables + n_groups * ACT_D)
        acc = fma(to_f32(sum_levels(w, act + g * (32 * W), far)), scale, acc)
        return fma(gather_minima(w), load_f32(tables + n_groups * ACT_DS), acc)

    return dot_group


def make_sum_block(word: str, table: int) -> Any:
    """sum_block by a tile's word that takes what weights are too large by, from a table"""

    def sum_block(tile: Any) -> Any:
        dot = getattr(tile, word)

        @device
        def sums(q, a, tables, table_step, room):
            return (dot(tables + table_step * table, q, a, table_step * ACT_GROUP, room),)

        return sums

    return sum_block
