"""Encoders of Q4_0, Q4_1, Q5_0 and Q5_1 by importance (gguf/imatrix.py): a block's scale is searched for.

Kernels over addresses, as in legacy.py; `importance` is the address of a row's row_blocks * 32 importances. An
element's error counts by its importance times sqrt(mean square of the row + x^2), as in ggml's quantize_row_*_impl.
Lanes of the searches are blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2cpp.kernels.compiler import device, kernel
from lfm2cpp.kernels.scalar import load_f32, store_i64

from .legacy import finite_half, store_q4_0, store_q4_1, store_q5_0, store_q5_1
from .search import (
    WEIGHTED_SHIFT,
    WEIGHTED_STEP,
    WEIGHTED_STEPS,
    affine_search,
    level_of,
    nearest,
    signed_search,
    sum_of_squares,
    transpose,
    weigh_by_importance,
)
from .vectors import (
    INFINITY,
    MAGNITUDE,
    bits,
    f16_of_f32,
    greater,
    largest,
    lesser,
    load_f32x32,
    splat_16,
    stack,
    store,
    truncated,
)

GROUP = 16  # blocks that are searched at a time


@device
def largest_block(x, n_blocks):
    """Index of the first block with the largest magnitude; NaN and infinity are the largest."""
    found, top = 0, np.int32(-1)
    for ib in range(n_blocks):
        magnitude = largest(bits(load_f32x32(x + 128 * ib)) & MAGNITUDE)
        if magnitude > top:
            found, top = ib, magnitude
    return found


def make_quantize_blocks(block_bytes: int, search: Any, encode: Any) -> Any:
    """search(columns, weights, tried, found): stores, lane by lane, what encode takes of each of GROUP blocks, in up to
    four vectors.

    encode(x, found, out): one block; whether its scale and minimum fit halves.
    """

    def quantize_blocks(src, dst, n_blocks, row_blocks, importance, bad):
        columns, weights, tried, found = stack(2048), stack(2048), stack(2048), stack(256)
        for i in range(32):  # of lanes that no block fills nothing is used
            store(columns + 64 * i, splat_16(np.float32(0)))
            store(weights + 64 * i, splat_16(np.float32(0)))
        for row in range(0, n_blocks, row_blocks):
            sigma2 = sum_of_squares(src + 128 * row, 32 * row_blocks) / np.float32(32 * row_blocks)
            if bits(sigma2) & MAGNITUDE >= INFINITY:
                store_i64(bad, row + largest_block(src + 128 * row, row_blocks))
                return
            for first in range(0, row_blocks, GROUP):
                n, x = min(GROUP, row_blocks - first), src + 128 * (row + first)
                transpose(x, n, 32, columns)
                transpose(importance + 128 * first, n, 32, weights)
                weigh_by_importance(columns, 32, weights, splat_16(sigma2))
                search(columns, weights, tried, found)
                for i in range(n):
                    ib = row + first + i
                    if not encode(x + 128 * i, found + 4 * i, dst + block_bytes * ib):
                        store_i64(bad, ib)
                        return
        store_i64(bad, -1)

    return kernel(quantize_blocks)


def make_quantize_signed(block_bytes: int, n_max: int, store_block: Any) -> Any:
    @device
    def search(columns, weights, tried, found):
        scale, inverse = signed_search(columns, weights, 32, n_max)
        store(found, scale)
        store(found + 64, inverse)

    @device
    def encode(x, found, out):
        d, inverse = f16_of_f32(load_f32(found)), load_f32(found + 64)
        level = greater(lesser(nearest(inverse * load_f32x32(x)), np.float32(n_max - 1)), np.float32(-n_max))
        if inverse == np.float32(0):  # all zero: ggml's levels are, too
            level = level - np.float32(n_max)
        store_block(out, d, truncated(level + np.float32(n_max)))
        return finite_half(d)

    return make_quantize_blocks(block_bytes, search, encode)


def make_quantize_affine(block_bytes: int, n_max: int, store_block: Any) -> Any:
    @device
    def search(columns, weights, tried, found):
        scale, low, inverse, origin, _ = affine_search(
            columns, weights, tried, 32, n_max, WEIGHTED_SHIFT, WEIGHTED_STEP, WEIGHTED_STEPS
        )
        store(found, scale)
        store(found + 64, low)
        store(found + 128, inverse)
        store(found + 192, origin)

    @device
    def encode(x, found, out):
        d, m = f16_of_f32(load_f32(found)), f16_of_f32(load_f32(found + 64))
        inverse, origin = load_f32(found + 128), load_f32(found + 192)
        store_block(out, d, m, level_of(inverse * (load_f32x32(x) - origin), n_max))
        return finite_half(d) and finite_half(m)

    return make_quantize_blocks(block_bytes, search, encode)


quantize_blocks_q4_0 = make_quantize_signed(18, 8, store_q4_0)
quantize_blocks_q5_0 = make_quantize_signed(22, 16, store_q5_0)
quantize_blocks_q4_1 = make_quantize_affine(20, 15, store_q4_1)
quantize_blocks_q5_1 = make_quantize_affine(24, 31, store_q5_1)
